"""A folder that plain timm loads, and one file of safetensors with timm's names."""

import json
from pathlib import Path

import safetensors.torch
import timm
import torch
from timm.models import get_model_args, save_for_hf
from torch import nn

from models.exporting.registry import Written, export_format
from models.exporting.remedies_file import read_remedies, write_remedies
from models.exporting.trained import Trained, metadata

WEIGHTS = "model.safetensors"


@export_format("timm")
def to_timm(trained: Trained, folder: Path) -> Written:
    """config.json (architecture, arguments, names of the classes, preprocessing) and model.safetensors, which
    `timm.create_model("local-dir:DIR", pretrained=True)` loads.

    Raises:
        ValueError: timm's model of these files computes other logits.
    """
    config = {"weights": trained.kind} | ({"remedies": dict(trained.remedies)} if trained.remedies else {})
    if trained.classes:
        config |= {"label_names": [*trained.classes], "label_descriptions": trained.descriptions}
    save_for_hf(
        trained.stock, folder, model_config=config, safe_serialization=True, data_config=trained.preprocessing.of_timm()
    )
    apply, limits = write_remedies(trained, folder)
    check = _compare(trained, timm.create_model(f"local-dir:{folder}", pretrained=True), folder)
    create = 'model = timm.create_model("local-dir:DIR", pretrained=True)'
    return Written(_usage(trained, create, apply, "timm.data.resolve_model_data_config(model)"), "timm", check, limits)


@export_format("safetensors")
def to_safetensors(trained: Trained, folder: Path) -> Written:
    """model.safetensors with timm's names; its metadata contain architecture, arguments, names of the classes and
    preprocessing as JSON.

    Raises:
        ValueError: timm's model of this file computes other logits.
    """
    arguments = json.loads(json.dumps(get_model_args(trained.stock)))
    tensors = {name: tensor.contiguous() for name, tensor in trained.stock.state_dict().items()}
    safetensors.torch.save_file(tensors, folder / WEIGHTS, {"format": "pt", **metadata(trained, arguments)})
    apply, limits = write_remedies(trained, folder)
    loaded = timm.create_model(trained.name, **arguments, checkpoint_path=folder / WEIGHTS)
    words = "".join(f", {key}={value!r}" for key, value in arguments.items())
    create = f'model = timm.create_model("{trained.name}"{words}, checkpoint_path="DIR/{WEIGHTS}")'
    usage = _usage(trained, create, apply, repr(trained.preprocessing.of_timm()))
    return Written(usage, "timm", _compare(trained, loaded, folder), limits)


def _compare(trained: Trained, loaded: nn.Module, folder: Path) -> str:
    """One line about the equality of a loaded model to the stock one, and with remedies to the trained one.

    Raises:
        ValueError: their logits are not the same, bit for bit.
    """
    images = trained.images()
    with torch.no_grad():
        if not torch.equal(loaded.eval()(images), trained.stock(images)):
            raise ValueError("cannot hold the model: timm computes other logits from the files")
        if trained.remedies:
            read_remedies(loaded, trained.remedies, folder)
            if not torch.equal(loaded.eval()(images), trained.logits(images)):
                raise ValueError("cannot hold the model: its remedies, applied to timm's model, give other logits")
    as_what = " as the model without its remedies and, after they are applied, as the model" if trained.remedies else ""
    return f"timm loads the files and computes the same logits{as_what}, bit for bit"


def _usage(trained: Trained, create: str, apply: str, data_config: str) -> str:
    """Lines of Python from the files to the class of an image."""
    lines = ["import timm", create, *apply.splitlines()]
    imports = [line for line in lines if line.startswith("import ")]
    lines = [*imports, "", *(line for line in lines if line not in imports)]
    lines.append(f"transform = timm.data.create_transform(**{data_config})")
    lines.append("output = model.eval()(transform(image)[None])  # image: an RGB image of PIL")
    if trained.classes and create.count("local-dir"):
        lines.append('label = model.pretrained_cfg["label_names"][output.argmax()]')
    return "\n".join(lines)
