"""The model card: each number is of the exported weights, or it is not there; nothing of the machine that trained."""

import json
import re

import pytest
import yaml
from exporting import FLAGS, checkpoint, exported
from helpers import REPOSITORY

SUMMARY = {
    "epochs": 3, "test_acc1": 81.5, "test_acc5": 97.25, "test_ece": 3.125, "test_images": 360,
    "test_acc1_ema": 84.75, "test_acc5_ema": 98.5, "test_ece_ema": 2.5, "test_images_ema": 360,
}  # fmt: skip
MEASURED = {
    "measured_on": {"data_set": "DIGITS", "split": "validation", "input_size": 32, "images": 64, "weights": "raw",
                    "epoch": 2},
    "summary": {"embedding_token_cosine_last": 0.125, "attention_head_cosine": 0.75, "embedding_rankme": 2.5},
}  # fmt: skip


def write_run(folder, summary=SUMMARY, measured=MEASURED, flags=FLAGS):
    folder.mkdir()
    checkpoint(folder / "checkpoint.pth", flags=flags)
    (folder / "args.yaml").write_text(yaml.safe_dump(flags))
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "redundancy.json").write_text(json.dumps(measured))
    start = {"commit": "abc1234", "torch": "2.14.1", "timm": "1.0.31", "card": "a GPU", "host": "secret-host"}
    start["command"] = "python /home/me/main.py"
    (folder / "environment.json").write_text(json.dumps([{"commit": "old"}, start]))
    return folder


def card_of(run, folder, *words):
    return (exported(run, "timm", folder, *words) / "README.md").read_text()


def test_the_numbers_of_the_exported_weights(tmp_path):
    run = write_run(tmp_path / "run")
    card = card_of(run, tmp_path / "raw")
    for row in ("top-1 | 81.50 %", "top-5 | 97.25 %", "calibration error | 3.12 %", "images | 360"):
        assert f"| {row} |" in card
    assert "the first 64 images of DIGITS (validation)" in card
    shown, all_measures = card.split("## Redundancy")[1].split("<details>")[:2]
    assert "| token cosine, last layer ↓ | 0.125 |" in shown and "| head cosine, all blocks ↓ | 0.75 |" in shown
    assert "RankMe" not in shown and "| RankMe of mean tokens, all layers ↑ | 2.5 |" in all_measures
    assert "raw weights after epoch 3 of 3" in card and "abc1234" in card and "old" not in card.split("## Training")[1]
    for name, *words in (("ema", "--ema"), ("key", "--checkpoint-key", "model_ema")):
        card = card_of(run, tmp_path / name, *words)
        assert "| top-1 | 84.75 % |" in card and "81.50" not in card and "averaged (EMA) weights" in card
        assert "## Redundancy" not in card  # measured with the raw weights


OTHERS = {
    "an earlier epoch": ({"summary": SUMMARY | {"epochs": 2}}, ()),
    "another size": ({}, ("--input-size", 48)),
    "another normalisation": ({}, ("--mean", 0.5, 0.5, 0.5)),
    "a damaged file": ({"summary": [3]}, ()),
}


@pytest.mark.parametrize("what", OTHERS)
def test_numbers_of_other_weights_or_images_are_not_shown(tmp_path, what):
    files, words = OTHERS[what]
    card = card_of(write_run(tmp_path / "run", **files), tmp_path / "out", *words)
    assert "81.50" not in card and "The run folder has no accuracy of these weights." in card
    assert ("## Redundancy" in card) == (not words)


@pytest.mark.parametrize(("name", "value"), [("epoch", 1), ("weights", "EMA"), ("input_size", 48)])
def test_redundancy_of_other_weights_is_not_shown(tmp_path, name, value):
    measured = MEASURED | {"measured_on": MEASURED["measured_on"] | {name: value}}
    assert "## Redundancy" not in card_of(write_run(tmp_path / "run", measured=measured), tmp_path / "out")


def test_flags_are_shown_without_the_folders_of_the_machine(tmp_path):
    flags = FLAGS | {"data_path": "/home/me/images", "output_dir": str(tmp_path / "run"), "world_size": 1,
                     "finetune": "/home/me/first.pth", "data_set": "torch/cifar10"}  # fmt: skip
    run = write_run(tmp_path / "run", flags=flags)
    (run / "changes.jsonl").write_text('{"epoch": 1, "step": 0, "name": "--lr", "before": 1, "after": 2}\n')
    card = card_of(run, tmp_path / "out")
    assert "/home/me" not in card and str(tmp_path) not in card and "secret-host" not in card
    (text,) = re.findall(r"```yaml\n(.*?)```", card, flags=re.DOTALL)
    shown = yaml.safe_load(text)
    assert shown.pop("data_path") == "images" and shown.pop("output_dir") == "run"
    assert shown.pop("finetune") == "first.pth" and "| started from | first.pth |" in card
    assert shown == {name: flags[name] for name in shown} and shown.keys() > {"model_kwargs", "data_set", "emb_so_coef"}
    assert "changed while it trained; the list below has their last values: --lr." in card


def test_the_citation_is_that_of_the_readme(tmp_path):
    (of_readme,) = re.findall(r"```bibtex\n(.*?)```", (REPOSITORY / "README.md").read_text(), flags=re.DOTALL)
    card = card_of(write_run(tmp_path / "run"), tmp_path / "out")
    assert of_readme in card
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "timm" and head["pipeline_tag"] == "image-classification" and "license" not in head


def test_a_folder_of_images_is_not_called_imagenet(tmp_path):
    flags = FLAGS | {"data_set": "IMNET", "data_path": "/home/me/flowers/"}
    card = card_of(write_run(tmp_path / "run", flags=flags), tmp_path / "out")
    text = card.partition("<details><summary>All flags")[0]
    assert "trained on the image folder `flowers` by" in text and "Validation set of the image folder `flowers`" in text
    assert "| data | the image folder `flowers` |" in text and "IMNET" not in text and "/home" not in card
