"""What the tests of models.export share: small trained models as files, exported, and the lines of the model card."""

import re
from pathlib import Path

import torch
from families import FAMILIES, SWIN, VIT, build
from helpers import model_of, photo

from models import export

FLAGS = {
    "model": "deit_tiny_patch16_224_diverse", "input_size": 32, "patch_size": 8,
    "model_kwargs": {"depth": 2, "embed_dim": 24, "num_heads": 3}, "eval_crop_ratio": 0.875,
    "data_set": "DIGITS", "epochs": 3, "seed": 0, "mixing_coef": 1.0, "emb_so_coef": 0.0,
}  # fmt: skip
"""Flags of a run of `helpers.model_of`."""

CLASSES = [f"class {i}" for i in range(7)]


def exported(run, to, folder, *words):
    """`python -m models.export RUN --to TO FOLDER *words`; returns the folder."""
    export.main([str(run), "--to", to, str(folder), *map(str, words)])
    return Path(folder)


def checkpoint(path: Path, seed=1, flags=FLAGS, **model) -> torch.nn.Module:
    """Write a checkpoint as a run does after its third epoch, and return its model; the average is of another seed."""
    trained, average = larger(model_of(seed, **model)), larger(model_of(seed + 1, **model))
    content = {"model": trained.state_dict(), "model_ema": average.state_dict(), "epoch": 2, "optimizer": {}}
    torch.save(content | {"args": dict(flags), "data": {"classes": CLASSES}}, path)
    return trained


def larger(model: torch.nn.Module) -> torch.nn.Module:
    """The model in eval mode with larger weights, so that each of them changes the logits."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def foreign(path: Path, family: str, **options) -> tuple[torch.nn.Module, list[str]]:
    """Write the weights of a model of `families` without flags; returns it, and flags that describe it."""
    model = build(family, **options).float().eval()
    torch.save(model.state_dict(), path)
    size = SWIN if "swin" in family else VIT
    kwargs = {**size, **FAMILIES[family].options, **options}
    kwargs = {key: value for key, value in kwargs.items() if key not in ("img_size", "num_classes")}
    patch = kwargs.pop("patch_size")
    words = [f"{key}={value!r}" for key, value in kwargs.items()]
    name = FAMILIES[family].timm_name
    return model, ["--model", name, "--input-size", 32, "--patch-size", patch, "--model-kwargs", *words]


def run_card(folder: Path, **names) -> dict:
    """Run the Python of a model card, with its folder in place of the one that it writes; returns its variables."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    code = code.replace(f"/path/to/{folder.name}", str(folder))
    names = {"image": photo(3), **names}
    exec(code, names)
    return names
