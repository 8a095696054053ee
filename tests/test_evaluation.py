"""`main.py --eval`: which weights, which flags, which images, and classes by their names."""

import json

import pytest
import torch
from helpers import TINY, make_image_folder, model_of, one_line, run_main
from PIL import Image

from models.weights import load_weights, origin

CLASSES = ("ant", "bee", "cat", "dog")
MODEL = TINY[TINY.index("--model") :]


def colours(root, classes=CLASSES, splits=("train", "val")):
    """An image folder whose classes are colours, which a tiny ViT learns in a few epochs."""
    for split in splits:
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for number in range(6):
                colour = (64 * CLASSES.index(name), 230, 150 + 10 * number)
                Image.new("HSV", (32, 32), colour).convert("RGB").save(root / split / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that knows the four classes of `colours`, and its data."""
    folder = tmp_path_factory.mktemp("trained")
    data = colours(folder / "data")
    flags = "--lr 3e-3 --unscale-lr --warmup-epochs 0 --sched constant --mixup 0 --cutmix 0 --aa none --color-jitter 0"
    flags += " --reprob 0 --no-repeated-aug --model-ema-decay 0.5 --log-interval 0"
    words = ("--data-set", "IMNET", "--data-path", data, "--batch-size", 8, "--epochs", 14, *flags.split())
    run_main(*TINY, *words, "--output-dir", folder / "run")
    assert json.loads((folder / "run" / "summary.json").read_text())["test_acc1"] == 100
    return folder / "run", data


def accuracies(capsys, *words):
    """What an evaluation prints: {weights: (loss, top-1, top-5)}, and all of it."""
    capsys.readouterr()
    run_main("--eval", "--device", "cpu", "--num-workers", 0, *words)
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    table = lines[lines.index(next(line for line in lines if line.startswith("weights"))) + 1 : -1]
    rows = [line.replace("%", "").split() for line in table]
    return {name: tuple(map(float, values)) for name, *values in rows}, printed


def test_a_checkpoint_brings_its_flags_and_the_output_says_what_was_evaluated(trained, capsys):
    folder, _ = trained
    stats, printed = accuracies(capsys, "--resume", folder / "checkpoint.pth")
    summary = json.loads((folder / "summary.json").read_text())
    assert f"{folder / 'checkpoint.pth'}, trained until epoch 13: 24 images, 4 classes\n" in printed
    for name, end in (("raw", ""), ("EMA", "_ema")):
        expected = [summary[f"test_{key}{end}"] for key in ("loss", "acc1", "acc5")]
        assert stats[name] == pytest.approx(expected, rel=1e-3)
    again, _ = accuracies(capsys, "--resume", "auto", "--output-dir", folder)
    alone, _ = accuracies(capsys, "--finetune", folder / "checkpoint.pth")
    assert again == stats and alone == {"raw": stats["raw"]}


def test_averaged_weights_alone_are_called_so(trained, capsys):
    folder, _ = trained
    stats, printed = accuracies(capsys, "--resume", folder / "checkpoint_best_ema.pth")
    assert [*stats] == ["EMA"] and printed.splitlines()[-1] == f"test accuracy: EMA {stats['EMA'][1]:.2f} %"
    assert origin(str(folder / "checkpoint_best_ema.pth")).is_average
    stats, _ = accuracies(capsys, "--resume", folder / "checkpoint_best.pth")
    assert [*stats] == ["raw"]
    both, _ = accuracies(capsys, "--resume", folder / "checkpoint.pth")
    chosen = ("--finetune", folder / "checkpoint.pth", "--checkpoint-key")
    assert accuracies(capsys, *chosen, "model_ema")[0] == {"EMA": both["EMA"]}
    assert accuracies(capsys, *chosen, "model")[0] == {"raw": both["raw"]}


def test_the_epoch_of_a_checkpoint_is_the_last_one_of_its_weights(tmp_path):
    stored = {"model": model_of().state_dict(), "args": {}, "epoch": -1, "step": 3}
    for step, epoch in ((3, 0), (0, -1)):
        torch.save(stored | {"step": step}, tmp_path / "checkpoint.pth")
        assert origin(str(tmp_path / "checkpoint.pth")).epoch == epoch


def test_a_file_of_flags_is_added_to_those_of_the_checkpoint(trained, tmp_path, capsys):
    folder, data = trained
    data.rename(tmp_path / "moved")
    (tmp_path / "machine.yaml").write_text(f"data_path: {tmp_path / 'moved'}\nloader-timeout: 7\n")
    words = ("--resume", folder / "checkpoint.pth")
    stats, _ = accuracies(capsys, *words, "--config", tmp_path / "machine.yaml")
    (tmp_path / "moved").rename(data)
    assert stats == accuracies(capsys, *words)[0]


@pytest.mark.parametrize("names", [("bee", "dog"), ("dog",)])
def test_a_subset_of_the_classes_is_evaluated_by_name(trained, tmp_path, capsys, names):
    folder, _ = trained
    data = colours(tmp_path / "data", names, splits=("val",))
    for flag in ("--resume", "--finetune"):
        stats, printed = accuracies(capsys, flag, folder / "checkpoint.pth", "--data-path", data, "--num-classes", 4)
        assert stats["raw"][1] == 100
        assert f"images of {len(names)} of the model's 4 classes, matched by name: {', '.join(names)}; none of ant" in (
            printed
        )
        assert f": {6 * len(names)} images, {len(names)} of 4 classes\n" in printed
    with pytest.raises(SystemExit) as caught:
        run_main("--eval", "--resume", folder / "checkpoint.pth", "--data-path", data, "--num-classes", len(names))
    one_line(caught, f"--num-classes is {len(names)}, but the checkpoint's model has 4 classes")


def test_weights_without_names_are_evaluated_on_some_classes_only_by_those_of_imagenet(trained, tmp_path, capsys):
    folder, _ = trained
    data = colours(tmp_path / "data", ("bee", "dog"), splits=("val",))
    torch.save(torch.load(folder / "checkpoint.pth")["model"], tmp_path / "plain.pth")
    words = (*MODEL, "--input-size", 32, "--data-set", "IMNET", "--data-path", data)
    with pytest.raises(SystemExit) as caught:
        run_main("--eval", *words, "--finetune", tmp_path / "plain.pth", "--num-classes", 4)
    one_line(caught, "--num-classes 4, but the data has 2 classes", "nothing says which outputs are the data's classes")
    synsets = {"bee": "n01443537", "dog": "n15075141"}  # outputs 1 and 999 of published models
    for name, synset in synsets.items():
        (data / "val" / name).rename(data / "val" / synset)
    model = model_of(num_classes=1000)
    torch.nn.init.zeros_(model.head.weight)
    model.head.bias.data[:] = torch.eye(1000)[999]
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    stats, printed = accuracies(capsys, *words, "--finetune", tmp_path / "plain.pth", "--num-classes", 1000)
    assert stats["raw"][1] == 50 and "12 images, 2 of 1000 classes\n" in printed
    assert "the weights do not name their classes: the synsets of ImageNet-1k" in printed


def test_classes_that_the_model_does_not_have_are_refused(trained, tmp_path):
    folder, _ = trained
    data = colours(tmp_path / "data", ("bee", "dog"), splits=("val",))
    (data / "val" / "bee").rename(data / "val" / "elk")
    with pytest.raises(SystemExit, match="only in the data: elk; only in the checkpoint: ant, bee, cat"):
        run_main("--eval", "--device", "cpu", "--resume", folder / "checkpoint.pth", "--data-path", data)


@pytest.mark.parametrize(
    "flags",
    ["--model-kwargs depth=2 embed_dim=24 num_heads=6", "--patch-size 16", "--model vit_tiny_patch16_224"],
)
def test_another_model_than_the_checkpoints_is_refused(trained, flags):
    folder, _ = trained
    flag, *_ = words = flags.split()
    with pytest.raises(SystemExit, match=f"error: {flag} is .*, but the checkpoint's model has .*; leave the flag out"):
        run_main("--eval", "--device", "cpu", "--resume", folder / "checkpoint.pth", *words)


def test_weights_that_are_not_all_from_the_file_are_not_evaluated(trained, tmp_path, capsys):
    folder, data = trained
    words = ("--eval", *TINY, "--data-set", "IMNET", "--data-path", data)
    with pytest.raises(SystemExit, match=f"error: --eval --resume auto: {tmp_path} has no checkpoint to evaluate"):
        run_main(*words, "--resume", "auto", "--output-dir", tmp_path)
    weights = torch.load(folder / "checkpoint.pth")["model"]
    torch.save({name: value for name, value in weights.items() if "head" not in name}, tmp_path / "headless.pth")
    with pytest.raises(
        SystemExit, match=r"error: --finetune .*headless.pth does not fit .*: head.bias is not in the file"
    ):
        run_main(*words, "--finetune", tmp_path / "headless.pth")
    torch.save(weights, tmp_path / "plain.pth")
    _, printed = accuracies(capsys, *MODEL, "--input-size", 32, *words[-4:], "--finetune", tmp_path / "plain.pth")
    assert "24 images, 4 classes, whose order is taken from the data: ant, bee, cat, ...\n" in printed


# Fine-tuning


def test_a_head_is_fine_tuned_by_the_names_of_its_classes(trained, tmp_path):
    folder, _ = trained
    path = str(folder / "checkpoint.pth")
    head = torch.load(path)["model"]["head.weight"]
    model = model_of(num_classes=4)
    assert load_weights(model, path, classes=CLASSES) == []
    notes = load_weights(model, path, classes=("dog", "cat", "bee", "ant"))
    assert torch.equal(model.head.weight, head.flip(0)) and "by the names of the classes" in notes[0]
    torch.save(torch.load(path)["model"], tmp_path / "plain.pth")
    notes = load_weights(model, str(tmp_path / "plain.pth"), classes=CLASSES)
    assert torch.equal(model.head.weight, head) and "which does not name its classes" in notes[0]
    fresh = model_of(num_classes=4, seed=3)
    initial = fresh.head.weight.clone()
    notes = load_weights(fresh, path, classes=("ant", "bee", "cat", "elk"))
    assert torch.equal(fresh.head.weight, initial) and "dropped: the file's classes are others" in notes[0]


def test_a_fine_tuned_run_says_that_its_head_is_new(trained, tmp_path, capsys):
    folder, _ = trained
    data = make_image_folder(tmp_path / "data", classes=("elk", "fly", "gnu", "hen"))
    words = ("--data-set", "IMNET", "--data-path", data, "--batch-size", 2, "--no-repeated-aug")
    run_main(*TINY, *words, "--finetune", folder / "checkpoint.pth")
    assert "head.weight dropped: the file's classes are others, such as 'ant'" in capsys.readouterr().out
