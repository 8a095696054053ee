"""The recipes of fine-tuning: each trains a step on made data of the layout that it names, from made weights."""

import json
import re

import pytest
import torch
import torchvision
from data_files import CAR_NAMES, write_cars, write_cifar, write_flowers, write_inat
from helpers import REPOSITORY, make_image_folder, model_of, run_main
from torch import nn

from training import arguments
from training.build import build_optimizer

FOLDER = REPOSITORY / "recipes"
SMALL = (
    *("--device", "cpu", "--num-workers", 0, "--batch-size", 2, "--input-size", 48, "--patch-size", 16),
    *("--no-tensorboard", "--model-kwargs", "depth=1", "embed_dim=24", "num_heads=3"),
)
"""Flags over those of a recipe; they end in arguments of the model, which replace the recipe's."""
CIFAR = torchvision.datasets.CIFAR10, torchvision.datasets.CIFAR100
RECIPES = {  # recipe: how its data is written, and a line of its run about the classes
    "transfer_cifar10": (lambda root: few_cifar(root, CIFAR[0]), "10 classes: class 0, class 1, class 2, ..."),
    "transfer_cifar100": (lambda root: few_cifar(root, CIFAR[1]), "100 classes: class 0, class 1, class 2, ..."),
    "transfer_flowers": (write_flowers, "102 classes: pink primrose, hard-leaved pocket orchid, canterbury bells, ..."),
    "transfer_cars": (write_cars, f"3 classes: {', '.join(CAR_NAMES)}"),
    "transfer_inat18": (lambda root: write_inat(root, 2018, flattened=False), "3 classes: oak, lynx, wolf"),
    "transfer_inat19": (lambda root: write_inat(root, 2019, flattened=False), "3 classes: oak, lynx, wolf"),
    "finetune_384": (lambda root: make_image_folder(root, n=2), "2 classes: cat, dog"),
    "finetune_mae": (lambda root: make_image_folder(root, n=2), "2 classes: cat, dog"),
    "linear_probe": (lambda root: make_image_folder(root, n=2), "2 classes: cat, dog"),
    "dinov2_small_98": (lambda root: make_image_folder(root, n=2), "2 classes: cat, dog"),
}
AS_ON_IMAGENET = {
    "input_size": 224, "model": "deit_base_patch16_224", "mixup": 0.8, "cutmix": 1, "smoothing": 0.1, "sched": "cosine",
    "aa": "rand-m9-mstd0.5-inc1", "repeated_aug": True, "warmup_epochs": 5, "freeze": "none", "layer_decay": None,
}  # fmt: skip
SMALL_SETS = AS_ON_IMAGENET | {"opt": "sgd", "weight_decay": 1e-4, "epochs": 1000, "drop_path": 0, "reprob": 0}
INAT = AS_ON_IMAGENET | {"opt": "adamw", "weight_decay": 0.05, "epochs": 360, "drop_path": 0.1, "reprob": 0.1}
MAE = {"repeated_aug": False, "model_ema": False, "model": "vit_base_patch16_224.mae", "clip_grad": None}
PUBLISHED = {  # recipe: (processes, images a step, learning rate, other flags), see the heads of the recipes
    "transfer_cifar10": (8, 768, 0.01, SMALL_SETS), "transfer_cifar100": (8, 768, 0.01, SMALL_SETS),
    "transfer_flowers": (8, 768, 0.01, SMALL_SETS), "transfer_cars": (8, 768, 0.01, SMALL_SETS),
    "transfer_inat18": (8, 768, 7.5e-5, INAT), "transfer_inat19": (8, 768, 7.5e-5, INAT),
    "finetune_384": (16, 512, 5e-6, AS_ON_IMAGENET | {
        "input_size": 384, "model": "deit_base_patch16_384", "min_lr": 5e-6, "weight_decay": 1e-8, "epochs": 30,
    }),
    "finetune_mae": (32, 1024, 5e-4 * 1024 / 256, MAE | {
        "layer_decay": 0.65, "weight_decay": 0.05, "drop_path": 0.1, "reprob": 0.25, "mixup": 0.8, "cutmix": 1,
        "epochs": 100, "warmup_epochs": 5, "head_init": 2e-5, "smoothing": 0.1, "min_lr": 1e-6, "opt": "adamw",
    }),
    "linear_probe": (32, 16384, 0.1 * 16384 / 256, MAE | {
        "freeze": "backbone", "head_init": 0.01, "epochs": 90, "warmup_epochs": 10, "min_lr": 0, "momentum": 0.9,
        "aa": None, "color_jitter": 0, "reprob": 0, "mixup": 0, "cutmix": 0, "smoothing": 0, "opt": "lars",
    }),
}  # fmt: skip
TRAIN_IMAGES = {  # table 6 of DeiT
    "transfer_cifar10": 50_000, "transfer_cifar100": 50_000, "transfer_flowers": 2040, "transfer_cars": 8144,
    "transfer_inat18": 437_513, "transfer_inat19": 265_240,
}  # fmt: skip
KWARGS = {"input_size": 32, "patch_size": 16, "depth": 1}


def flags_of(name):
    return arguments.parse_args(["--config", str(FOLDER / f"{name}.yaml")])


def few_cifar(root, kind):
    write_cifar(root, kind, {file: 2 for file, _ in kind.train_list} | {file: 3 for file, _ in kind.test_list})


@pytest.fixture
def any_checksum(monkeypatch):
    """torchvision takes files whose checksums are not those of the published files."""
    for module in (torchvision.datasets.flowers102, torchvision.datasets.cifar):
        monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: True)


def made_weights(name, path):
    """Weights of a model for images of 32 px and 7 classes; MAE's without a head, as its encoder is published."""
    model = flags_of(name).model if name != "finetune_384" else "deit_base_patch16_224"
    weights = model_of(name=model, **KWARGS).state_dict()
    if model.endswith(".mae"):
        weights = {key: value for key, value in weights.items() if not key.startswith("head.")}
    torch.save({"model": weights}, path)
    return weights


def test_every_recipe_that_starts_from_weights_is_here():
    names = {path.stem for path in FOLDER.glob("*.yaml") if "--finetune" in path.read_text()}
    assert names == {*RECIPES} == {*PUBLISHED, "dinov2_small_98"}  # a study's, nowhere published


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_has_the_published_values(name):
    processes, batch, rate, flags = PUBLISHED[name]
    args = flags_of(name)
    assert args.batch_size * processes == batch
    assert args.lr * (1 if args.unscale_lr else batch / 512) == pytest.approx(rate)
    assert {flag: getattr(args, flag) for flag in flags} == flags
    if name in TRAIN_IMAGES:
        steps = TRAIN_IMAGES[name] // 256 * 256 // batch * args.epochs
        (written,) = re.findall(r"([\d,]+) steps of 768 images", (FOLDER / f"{name}.yaml").read_text())
        assert int(written.replace(",", "")) == pytest.approx(steps, abs=500)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_a_step_on_its_data(name, tmp_path, any_checksum, capsys):
    write, classes = RECIPES[name]
    (tmp_path / "data").mkdir()
    write(tmp_path / "data")
    made_weights(name, tmp_path / "weights.pth")
    words = ("--config", FOLDER / f"{name}.yaml", "--data-path", tmp_path / "data")
    pooling = [f"{key}={value}" for key, value in flags_of(name).model_kwargs.items()]
    preset = () if name == "linear_probe" else ("--preset", "released")
    run_main(*words, "--finetune", tmp_path / "weights.pth", *SMALL, *pooling, *preset, "--dry-run")
    printed = capsys.readouterr().out
    assert f"\n{classes}\n" in printed and "\ntest accuracy: " in printed
    assert "pos_embed resampled" in printed and ("center crop 0.875\n" in printed) == (name in PUBLISHED)
    assert ("at step 0, before any update" in printed) == bool(preset)
    assert "step skipped" not in printed
    assert ("fc_norm" in printed) == bool(pooling)  # MAE has published the norm of each token


def test_the_linear_probe_trains_the_head_alone(tmp_path):
    make_image_folder(tmp_path / "data", n=2)
    before = made_weights("linear_probe", tmp_path / "weights.pth")
    recipe = ("--config", FOLDER / "linear_probe.yaml", "--finetune", tmp_path / "weights.pth")
    size = ("--input-size", 32, "--data-path", tmp_path / "data", "--epochs", 1, "--output-dir", tmp_path / "run")
    run_main(*recipe, *SMALL, *size)
    after = torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)["model"]
    assert {*after} - {*before} == {"head.weight", "head.bias"}
    assert all(torch.equal(after[name], before[name]) for name in {*after} & {*before})
    assert after["head.bias"].abs().max() > 0
    record = json.loads((tmp_path / "run" / "log.txt").read_text())
    assert record["train_skipped_steps"] == 0


def test_the_rate_of_the_linear_probe_is_adapted_as_maes():
    """A weight moves by rate x 0.001 |weight| / |gradient|, a bias by the rate, as MAE's LARS has it."""
    args = flags_of("linear_probe")
    torch.manual_seed(0)
    model = nn.Linear(6, 4)
    optimizer = build_optimizer(args, model, lr=2.0)
    generator = torch.Generator().manual_seed(1)
    old, buffers = {name: value.clone() for name, value in model.state_dict().items()}, {}
    for _ in range(2):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            step = parameter.grad.clone()
            if name == "weight":
                step *= 0.001 * old[name].norm() / step.norm()
            buffers[name] = 0.9 * buffers.get(name, 0) + step
            old[name] = old[name] - 2.0 * buffers[name]
        optimizer.step()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.detach(), old[name], rtol=1e-4, atol=1e-6)
