"""Mean, standard deviation, interpolation and crop: from the flags, the weights or DeiT, stored and printed."""

import argparse
import json
import re

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import yaml
from helpers import TINY, few_digits, parse, run_main
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from datasets import DataOptions
from models import published_preprocessing
from training.build import build_augmentation, options_of
from training.flags import build_parser
from training.preprocessing import NAMES, normalisation_warnings

HALF, OTHER = [0.5, 0.5, 0.5], [0.25, 0.5, 0.75]
DEIT = (None, None, None, 0.875, None)
AUGREG = (HALF, HALF, "bicubic", 0.9, "center")  # of vit_tiny_patch16_224
EVA = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711], "bicubic", 1.0, "squash")
OURS = (OTHER, HALF, "bilinear", 0.75, "border")
LARGE = ("--input-size", 64)
EVA_02 = ("--model", "eva02_base_patch14_448", "--patch-size", 16)
VIT = ("--model", "vit_tiny_patch16_224")
TEACHER = ("--distillation-type", "soft", "--teacher-path", "plain.pth", "--teacher-model")
OVER = ("--mean", *OTHER, "--std", *HALF, "--interpolation", "bilinear", "--crop-pct", 0.75, "--crop-mode", "border")


@pytest.fixture
def files(tmp_path):
    """Paths of weights by name; the numbered checkpoints are of a run folder, the newest damaged."""
    weights = {"head.bias": torch.zeros(10)}
    flags = dict(zip(NAMES, OURS, strict=True))
    contents = {
        "plain": weights,
        "deit": {"model": weights, "args": argparse.Namespace(eval_crop_ratio=0.5), "epoch": 1},
        "ours": {"model": weights, "args": flags, "epoch": 1},
        "scratch": {"model": weights, "args": dict(zip(NAMES, DEIT, strict=True)), "epoch": 1},
        "old": {"model": weights, "args": {"eval_crop_ratio": 0.8}, "epoch": 1},
        "checkpoint.1": {"model": weights, "args": flags, "epoch": 1},
    }
    for name, content in contents.items():
        torch.save(content, tmp_path / f"{name}.pth")
    (tmp_path / "checkpoint.pth").write_bytes((tmp_path / "ours.pth").read_bytes()[:-100])
    (tmp_path / "damaged.pth").write_bytes(b"no checkpoint")
    safetensors.torch.save_file(weights, tmp_path / "plain.safetensors")
    described = dict(zip(("mean", "std", "interpolation", "crop_pct", "crop_mode"), OURS, strict=True))
    config = {"architecture": VIT[1], "label_names": ["b", "a"], "pretrained_cfg": described}
    (tmp_path / "config.json").write_text(json.dumps(config))  # describes model.safetensors alone
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps({"model_type": "vit", "id2label": {"0": "tench"}}))
    (tmp_path / "hf" / "preprocessor_config.json").write_text(json.dumps({"image_mean": OTHER, "image_std": OTHER}))
    safetensors.torch.save_file(weights, tmp_path / "hf" / "model.safetensors")
    texts = {"label_names": json.dumps(["b", "a"]), "preprocessing": json.dumps(described)}
    safetensors.torch.save_file(weights, tmp_path / "texts.safetensors", texts)
    return tmp_path


def preprocessing(folder, words):
    """The flags of `NAMES` after parsing, on larger images."""
    args = parse(*LARGE, *paths(folder, words))
    return tuple(getattr(args, name) for name in NAMES)


def paths(folder, words):
    """Words of a command line whose names of files, and RUN, are in the folder."""
    is_path = re.compile(r"RUN|.*\.(pth|safetensors|yaml)").fullmatch
    return [str(folder / str(word).removeprefix("RUN")) if is_path(str(word)) else word for word in words]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        # Without --finetune as DeiT, whatever the model.
        ((), DEIT),
        (VIT, DEIT),
        ((*VIT, *OVER), OURS),
        ((*VIT, "--crop-pct", 0.5), (*DEIT[:3], 0.5, None)),
        ((*VIT, "--eval-crop-ratio", 0.5), (*DEIT[:3], 0.5, None)),
        # Weights of others: timm's configuration of the model, if it has one; flags over it.
        ((*VIT, "--finetune", "plain.pth"), AUGREG),
        ((*VIT, "--finetune", "plain.safetensors", "--eval"), AUGREG),
        ((*VIT, "--finetune", "deit.pth"), AUGREG),
        ((*EVA_02, "--finetune", "plain.pth"), EVA),
        # Exported weights: timm's config.json beside them, or their metadata.
        ((*VIT, "--finetune", "model.safetensors", "--eval"), OURS),
        ((*VIT, "--finetune", "texts.safetensors"), OURS),
        ((*VIT, "--finetune", "hf/model.safetensors"), (OTHER, OTHER, *AUGREG[2:])),
        ((*VIT, "--finetune", "model.safetensors", "--mean", *HALF), (HALF, *OURS[1:])),
        ((*VIT, "--finetune", "plain.pth", *OVER), OURS),
        ((*VIT, "--finetune", "plain.pth", "--std", *OTHER), (HALF, OTHER, *AUGREG[2:])),
        ((*VIT, "--finetune", "plain.pth", "--input-size", 32), (*AUGREG[:3], 0.875, None)),
        (("--finetune", "plain.pth"), DEIT),
        (("--model", "vit_tiny_patch16_224.no_such_tag", "--finetune", "plain.pth"), DEIT),
        # Checkpoints of this program: what they were trained with, whatever the model.
        ((*VIT, "--finetune", "ours.pth"), OURS),
        ((*VIT, "--finetune", "scratch.pth", "--eval"), DEIT),
        ((*VIT, "--finetune", "old.pth"), (*DEIT[:3], 0.8, None)),
        ((*VIT, "--finetune", "ours.pth", "--mean", *HALF, "--crop-pct", 0.9), (HALF, *OURS[1:3], 0.9, "border")),
        ((*VIT, "--resume", "ours.pth"), OURS),
        ((*VIT, "--resume", "ours.pth", "--eval", "--mean", *HALF), (HALF, *OURS[1:])),
        ((*VIT, "--resume", "scratch.pth", "--eval"), DEIT),
        ((*VIT, "--resume", "deit.pth"), DEIT),
        # The newest undamaged checkpoint of the run folder, over --finetune.
        ((*VIT, "--resume", "auto", "--output-dir", "RUN", "--finetune", "plain.pth"), OURS),
        ((*VIT, "--resume", "auto", "--output-dir", "RUN", "--finetune", "missing.pth"), OURS),
        ((*VIT, "--resume", "auto", "--output-dir", "missing", "--finetune", "plain.pth"), AUGREG),
        ((*VIT, "--resume", "auto", "--output-dir", "missing"), DEIT),
        # Loading reports what cannot be read.
        ((*VIT, "--finetune", "damaged.pth"), DEIT),
        ((*VIT, "--finetune", "missing.pth"), DEIT),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_flags_over_weights_over_deits(files, words, expected):
    assert preprocessing(files, words) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), "bicubic"),
        (("--interpolation", "bilinear"), "bilinear"),
        (("--train-interpolation", "random", "--interpolation", "bilinear"), "random"),
        (("--model", "tf_efficientnet_b7.ns_jft_in1k", "--interpolation", "bilinear"), "bilinear"),
    ],
)
def test_training_crops_are_interpolated_as_validation_images(words, expected):
    assert parse(*words).train_interpolation == expected


def test_args_yaml_gives_the_same_values(files):
    """It contains those of a fine-tuned run, and otherwise none that would hide the values of other weights."""
    for words in (("--finetune", "ours.pth"), ("--finetune", "plain.pth"), ()):
        args = parse(*LARGE, *VIT, *paths(files, words))
        (files / "args.yaml").write_text(yaml.safe_dump(vars(args)))
        again = parse("--config", files / "args.yaml", *LARGE, *VIT)
        again.config = None
        assert again == args
    fine = parse("--config", files / "args.yaml", "--finetune", files / "plain.pth", *LARGE, *VIT)
    assert (fine.mean, fine.std) == (HALF, HALF)


def test_the_flags_accept_every_configuration_of_timm():
    actions = {action.dest: action for action in build_parser()._actions}
    configurations = [published_preprocessing(name) for name in timm.list_models(pretrained=True)]
    for name in NAMES:
        values = {str(value) for found in configurations for value in np.atleast_1d(found[name])}
        choices, parse_value = actions[name].choices, actions[name].type
        assert values <= {*choices} if choices else all(parse_value(value) >= 0 for value in values)
    assert {len(found[name]) for found in configurations for name in ("mean", "std")} == {3}


@pytest.mark.parametrize("words", [("--mean", "123", "116", "103"), ("--std", "0", "0.2", "0.2"), ("--std", "0.5"),
                                   ("--interpolation", "lanczos3"), ("--crop-pct", "0")])  # fmt: skip
def test_values_out_of_range_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        parse(*words)
    line = capsys.readouterr().err
    assert line.startswith("error: argument ") and words[0] in line and line.count("\n") == 1


def test_options_of_a_run_from_scratch_are_deits():
    options = options_of(DataOptions, parse())
    assert [getattr(options, name) for name in NAMES] == [
        IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, "bicubic", 0.875, "center",
    ]  # fmt: skip


def test_the_device_normalises_with_the_runs_values():
    images, labels = torch.full((2, 3, 8, 8), 255, dtype=torch.uint8), torch.tensor([0, 1])
    for words, mean, std in (((), IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD), (OVER, OTHER, HALF)):
        args = parse("--mixup", 0, "--cutmix", 0, "--reprob", 0, *words)
        augment = build_augmentation(args, of_bytes=True)
        samples, _ = augment(images, labels, augment.draw(images, 0, 0, 0, 0))
        expected = (1 - torch.tensor(mean)) / torch.tensor(std)
        torch.testing.assert_close(samples, expected[:, None, None].expand_as(samples))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--finetune", "plain.pth"), {}),
        (("--finetune", "plain.pth", "--mean", *HALF), {}),
        (("--finetune", "plain.pth", "--mean", *OTHER), {"mean": ("0.5 0.5 0.5", "0.25 0.5 0.75")}),
        (("--finetune", "scratch.pth", "--std", *HALF), {"std": ("0.229 0.224 0.225", "0.5 0.5 0.5")}),
        (("--finetune", "missing.pth", "--mean", *HALF), {}),
        ((*TEACHER, "deit_tiny_patch16_224"), {}),
        ((*TEACHER, VIT[1], "--mean", *HALF), {"std": ("0.5 0.5 0.5", "0.229 0.224 0.225")}),
        ((*TEACHER, VIT[1], "--distillation-type", "none"), {}),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_weights_that_get_other_images_are_named(files, words, expected):
    args = parse(*VIT, *paths(files, words))
    flag = "--teacher-path" if "--teacher-path" in words else "--finetune"
    assert normalisation_warnings(args) == [
        f"the weights of {flag} were trained with --{name} {theirs}, and get images with {ours}"
        for name, (theirs, ours) in expected.items()
    ]


def line_of(capsys):
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("images of")]
    return line


def test_a_run_prints_and_stores_its_values(tmp_path, capsys):
    """From scratch; fine-tuned from weights of others, resumed without them; fine-tuned from that; and evaluated."""
    run = (*TINY, *VIT, "--no-model-ema")
    plain, tuned, again = (tmp_path / name for name in ("plain", "tuned", "again"))
    deit = "images of 32 px: mean 0.485 0.456 0.406, std 0.229 0.224 0.225, bicubic, no crop"
    half = "images of 32 px: mean 0.5 0.5 0.5, std 0.5 0.5 0.5, bicubic, no crop"
    longer = ("--epochs", 2, "--resume-with-changes")
    with few_digits():
        run_main(*run, "--output-dir", plain)
        assert line_of(capsys) == deit
        weights = torch.load(plain / "checkpoint.pth", weights_only=True)["model"]
        torch.save(weights, tmp_path / "others.pth")
        run_main(*run, "--output-dir", tuned, "--finetune", tmp_path / "others.pth")
        assert line_of(capsys) == half
        stored = torch.load(tuned / "checkpoint.pth", weights_only=True)["args"]
        assert stored["mean"] == stored["std"] == yaml.safe_load((tuned / "args.yaml").read_text())["mean"] == HALF
        (tmp_path / "others.pth").unlink()
        run_main(*run, "--output-dir", tuned, "--resume", tuned / "checkpoint.pth", *longer)
        assert line_of(capsys) == half
        with pytest.raises(SystemExit, match=r"--mean 0.5 0.5 0.5 -> 0.25 0.5 0.75.*--resume-with-changes"):
            run_main(*run, "--output-dir", tuned, "--resume", "auto", "--mean", *OTHER)
        run_main(*run, "--output-dir", again, "--finetune", tuned / "checkpoint.pth")
        assert line_of(capsys) == half
        for flag, folder, line in (("--resume", again, half), ("--finetune", again, half), ("--resume", plain, deit)):
            run_main(*run, "--eval", flag, folder / "checkpoint.pth")
            assert line_of(capsys) == line
