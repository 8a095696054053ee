"""The flags: spellings, help, and the original DeiT's command line."""

import argparse

import pytest
from flag_files import DEIT
from helpers import run_process

from diversity import REGULARIZERS
from training.arguments import build_parser, coefficients, parse_args

FLAGS = [
    (action, flag)
    for action in build_parser()._actions
    if action.help != argparse.SUPPRESS and action.dest not in ("help", "config")
    for flag in action.option_strings
]
NEEDS = {
    "--eval-sets": ("--eval", "--resume", "a.pth"),
    "--eval": ("--resume", "a.pth"),
    "--distillation-type": ("--teacher-path", "a.pth"),
    "--remedy-kwargs": ("--remedy", "neutreno"),
}
SPECIAL = {
    "--device": ["cpu"],
    "--eval-sets": ["imagenet-v2=a", "folder=b"],
    "--opt": ["sgd"],
    "--model-kwargs": ["depth=4", "embed_dim=96"],
    "--preset": ["corrected"],
    "--remedy": ["xsa"],
    "--remedy-kwargs": ["neutreno_strength=0.5"],
    "--weight-groups": ["proj,fc1"],
}


def accepts(action, word):
    try:
        return action.type is None or action.type(word) != action.default
    except (argparse.ArgumentTypeError, ValueError):
        return False


def sample_values(action, flag):
    """Words for a flag that change its default."""
    if action.nargs == 0:
        return []
    if flag in SPECIAL:
        return SPECIAL[flag]
    if action.choices:
        return [next(choice for choice in reversed(action.choices) if choice != action.default)]
    if isinstance(action.nargs, int):
        return ["0.25", "0.5", "0.75"][: action.nargs]
    return [next(word for word in ("4", "0.375", "a_b") if accepts(action, word))]


@pytest.mark.parametrize(("action", "flag"), FLAGS, ids=[flag for _, flag in FLAGS])
def test_hyphens_and_underscores_are_the_same(action, flag):
    values, needs = sample_values(action, flag), NEEDS.get(flag, ())
    parsed = parse_args([flag, *values, *needs])
    underscored = "--" + flag.removeprefix("--").replace("-", "_")
    assert parse_args([underscored, *values, *needs]) == parsed
    if len(values) == 1:
        assert parse_args([f"{underscored}={values[0]}", *needs]) == parsed
    if values:
        assert getattr(parsed, action.dest) != action.default


def test_underscores_in_values_stay():
    args = parse_args(["--output_dir=my_runs/a_b", "--data_path", "some_where", "--model-kwargs", "embed_dim=96"])
    assert (args.output_dir, args.data_path, args.model_kwargs) == ("my_runs/a_b", "some_where", {"embed_dim": 96})


@pytest.mark.parametrize("action", {id(action): action for action, _ in FLAGS}.values(), ids=lambda action: action.dest)
def test_every_flag_explains_itself(action):
    assert action.help.strip()


def test_help_does_not_import_what_only_a_run_needs():
    process = run_process("-X", "importtime", "main.py", "--help")
    assert process.returncode == 0 and "--emb-cos-within-coef" in process.stdout
    imported = {line.split("|")[-1].strip().split(".")[0] for line in process.stderr.splitlines()}
    assert "timm" in imported
    assert not imported & {"sklearn", "scipy", "pandas", "matplotlib", "tensorboard"}


def test_every_term_has_a_flag():
    words = [f"--{name}_coef={index}.5" for index, name in enumerate(("mixing", *REGULARIZERS))]
    values = [index + 0.5 for index in range(len(words))]
    assert coefficients(parse_args(words)) == dict(zip(("mixing", *REGULARIZERS), values, strict=True))
    assert not any(coefficients(parse_args([])).values())


def test_original_command_line():
    args = parse_args(DEIT)
    default = parse_args([])
    stay = {"--model-ema", "--repeated-aug", "--dist-eval"}  # switches that are on anyway
    flags = [word for word in DEIT if word.startswith("--") and not word.startswith("--no-")]
    for flag in set(flags) - stay:
        name = flag.removeprefix("--").replace("-", "_")
        assert getattr(args, name) != getattr(default, name), flag
    assert (args.lr, args.opt_betas, args.cutmix_minmax, args.seed) == (1e-3, [0.8, 0.99], [0.2, 0.8], 3)
    assert args.pin_mem is False
    assert coefficients(args) == {name: 0.0 for name in REGULARIZERS} | {
        "mixing": 1.0,
        "emb_cos_within": 0.5,
        "emb_contrast_cross": 0.5,
        "attn_cos_within": 1e-4,
        "weight_mha_cond_orth": 5e-4,
    }


def test_original_switches_the_other_way():
    args = parse_args(["--no-model-ema", "--no-repeated-aug", "--resume", "checkpoint.pth", "--output_dir", ""])
    assert (args.model_ema, args.repeated_aug, args.resume, args.output_dir) == (False, False, "checkpoint.pth", "")
