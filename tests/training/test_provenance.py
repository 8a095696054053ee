"""environment.json: one entry for each start of a run, and what identifies its data."""

import json
import sys

import pytest
from data_files import write_inat, write_webdataset
from helpers import FOLDER, TINY, data_options, few_digits, log_of, make_image_folder, run_main, world
from ranks import run_ranks
from torchvision.datasets import ImageFolder

from datasets import build_data
from training import provenance


def test_every_start_of_a_run_has_an_entry(tmp_path, capsys):
    images = make_image_folder(tmp_path / "images")
    words = (*TINY, *FOLDER, images, "--accum-steps", 2, "--lr", 0.5, "--output-dir", tmp_path / "run")
    run_main(*words)
    run_main(*words, "--epochs", 2, "--sched", "constant", "--resume", "auto", "--resume-with-changes")
    first, second = provenance.read_starts(tmp_path / "run")
    data = {"name": "images", "path": str(images), "classes": 2, "train_images": 8, "val_images": 8}
    assert first["data"].items() >= data.items() and first["data"] == second["data"]
    numbers = {"processes": 1, "global_batch": 4, "accum_steps": 2, "learning_rate": 0.5 * 4 / 512}
    assert first.items() >= (numbers | {"device": "cpu", "precision": "float32", "epoch": 0, "step": 0}).items()
    assert (second["epoch"], second["step"], len(log_of(tmp_path / "run"))) == (1, 0, 2)
    assert {"time", "command", "host", "card", "python", "torch", "torchvision", "timm", "commit"} < first.keys()
    assert first["python"].split() == sys.version.split()[:1] and first["time"][-6] in "+-"
    assert "warning: the" not in capsys.readouterr().out


def test_other_files_are_reported_when_a_run_continues(tmp_path, capsys):
    images = make_image_folder(tmp_path / "images")
    words = (*TINY, *FOLDER, images, "--output-dir", tmp_path / "run", "--sched", "constant")
    run_main(*words)
    with open(images / "val" / "cat" / "0.png", "ab") as file:
        file.write(b"0")
    run_main(*words, "--epochs", 2, "--resume", "auto")
    first, second = (start["data"] for start in provenance.read_starts(tmp_path / "run"))
    assert first["train_digest"] == second["train_digest"]
    digests = f"{first['val_digest']} -> {second['val_digest']}"
    assert f"warning: the validation files are not those of the last start: {digests}" in capsys.readouterr().out
    (images / "val" / "cat" / "0.png").rename(images / "val" / "cat" / "9.png")
    run_main(*words, "--epochs", 2, "--resume", "auto")  # which has finished
    assert "warning: the validation files are not those of the last start" in capsys.readouterr().out


def test_a_damaged_file_is_not_replaced(tmp_path, refused):
    (tmp_path / "environment.json").write_text("[{")
    assert "environment.json is not a complete list" in refused("--output-dir", tmp_path)
    assert (tmp_path / "environment.json").read_text() == "[{"


def test_the_digest_is_of_paths_and_sizes(tmp_path):
    def digest(root):
        return provenance.digest(ImageFolder(root / "train"), "IMNET", f"{root}/")

    first, second = (make_image_folder(tmp_path / name) for name in ("one", "two"))
    assert digest(first) == digest(second) and len(digest(first)) == 16
    (second / "train" / "dog" / "3.png").rename(second / "train" / "dog" / "9.png")
    renamed = digest(second)
    with open(second / "train" / "dog" / "9.png", "ab") as file:
        file.write(b"0")
    assert len({digest(first), renamed, digest(second)}) == 3


def test_data_without_files_is_identified_by_its_name_and_size():
    with few_digits():
        data = build_data(data_options(), world())
    found = provenance.fingerprint(data, "DIGITS", "")
    digest = found["train_digest"]
    assert found["name"] == "DIGITS" and (found["train_images"], found["val_images"]) == (102, 26)
    assert digest != found["val_digest"] and digest != provenance.digest(data.val.dataset.source, "CIFAR", "")


@pytest.mark.parametrize(
    ("data_set", "path", "name"),
    [
        ("IMNET", "/data/imagenet/", "imagenet"),
        ("CIFAR10", "/data", "CIFAR10 (data)"),
        ("DIGITS", "", "DIGITS"),
        ("hfds/mnist", "", "hfds/mnist"),
    ],
)
def test_names_of_data(data_set, path, name):
    assert provenance.data_name(data_set, path) == name


def test_two_processes_write_one_entry(tmp_path):
    with few_digits():
        result = run_ranks(2, "main.py", *TINY, "--output-dir", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    (start,) = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert (start["processes"], start["global_batch"]) == (2, 32)


def test_images_of_lists_are_known_by_their_files(tmp_path):
    def found():
        data = build_data(data_options("--data-set", "INAT", "--data-path", tmp_path, "--batch-size", 2), world())
        return provenance.fingerprint(data, "INAT", str(tmp_path))

    write_inat(tmp_path, 2018, flattened=True)
    before = found()
    assert before == found() and before["train_digest"] != before["val_digest"]
    for path in tmp_path.rglob("val*.jpg"):
        path.write_bytes(path.read_bytes() + b"0")
    assert {name for name, value in found().items() if value != before[name]} == {"val_digest"}


def test_a_stream_is_known_by_its_shards(tmp_path):
    words = write_webdataset(tmp_path, train=[4, 4], validation=[3])
    options = data_options(*words, "--num-classes", 3, "--batch-size", 2, "--no-repeated-aug")
    before = provenance.fingerprint(build_data(options, world()), "wds/any", str(tmp_path))
    assert (before["train_images"], before["val_images"]) == (8, 3)
    with open(tmp_path / "train-1.tar", "ab") as file:
        file.write(b"0" * 512)
    after = provenance.fingerprint(build_data(options, world()), "wds/any", str(tmp_path))
    assert {name for name, value in after.items() if value != before[name]} == {"train_digest"}
