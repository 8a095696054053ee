"""A folder that transformers loads, for the models that it has too."""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from PIL.Image import Resampling
from torch import nn

from models.exporting.preprocessing import Preprocessing
from models.exporting.registry import Written, export_format
from models.exporting.trained import Trained
from models.weights import LAYOUTS
from models.weights.structure import norm_eps, num_heads

TOLERANCE = 1e-4
"""The largest difference to timm's outputs that is not refused, relative to their largest absolute value."""


@dataclass(frozen=True)
class Family:
    """A model of transformers.

    Attributes:
        prefix: of the names of its classes.
        config: (timm's model, its state_dict) -> arguments of its configuration.
        classifier: end of the name of the class with a classifier.
        features: arguments of the class without one, which leave out a layer that timm's model does not have.
    """

    prefix: str
    config: Callable[[nn.Module, Mapping[str, torch.Tensor]], dict[str, object]]
    classifier: str = "ForImageClassification"
    features: Mapping[str, object] = field(default_factory=dict)


def _of_vit(model: nn.Module, own: Mapping[str, torch.Tensor]) -> dict[str, object]:
    """Arguments that ViT, DeiT, DINOv2 and BEiT share."""
    return {
        "hidden_size": model.embed_dim,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": num_heads(model)[0],
        "patch_size": model.patch_embed.patch_size[0],
        "num_channels": own["patch_embed.proj.weight"].shape[1],
        "layer_norm_eps": norm_eps(model),
    }


def _vit(model: nn.Module, own: Mapping[str, torch.Tensor]) -> dict[str, object]:
    width = len(own["blocks.0.mlp.fc1.weight"])
    return _of_vit(model, own) | {"intermediate_size": width, "qkv_bias": "blocks.0.attn.qkv.bias" in own}


def _dinov2(model: nn.Module, own: Mapping[str, torch.Tensor]) -> dict[str, object]:
    width = own["blocks.0.mlp.fc2.weight"].shape[1]
    is_gated = len(own["blocks.0.mlp.fc1.weight"]) != width
    ratio = width / model.embed_dim * (1.5 if is_gated else 1)  # transformers takes two thirds of it for gated ones
    config = {"mlp_ratio": round(ratio), "use_swiglu_ffn": is_gated, "qkv_bias": "blocks.0.attn.qkv.bias" in own}
    registers = {"num_register_tokens": own["reg_token"].shape[1]} if "reg_token" in own else {}
    return _of_vit(model, own) | config | registers


def _beit(model: nn.Module, own: Mapping[str, torch.Tensor]) -> dict[str, object]:
    return _of_vit(model, own) | {
        "intermediate_size": len(own["blocks.0.mlp.fc1.weight"]),
        "use_absolute_position_embeddings": "pos_embed" in own,
        "use_relative_position_bias": "blocks.0.attn.relative_position_bias_table" in own,
        "use_shared_relative_position_bias": "rel_pos_bias.relative_position_bias_table" in own,
        "layer_scale_init_value": 0.1 if "blocks.0.gamma_1" in own else 0.0,
        "use_mean_pooling": "fc_norm.weight" in own,
    }


def _swin(model: nn.Module, own: Mapping[str, torch.Tensor]) -> dict[str, object]:
    first = model.layers[0].blocks[0]
    return {
        "embed_dim": model.embed_dim,
        "depths": [len(stage.blocks) for stage in model.layers],
        "num_heads": [stage.blocks[0].attn.num_heads for stage in model.layers],
        "window_size": first.window_size[0],
        "mlp_ratio": len(own["layers.0.blocks.0.mlp.fc1.weight"]) / first.dim,
        "patch_size": model.patch_embed.patch_size[0],
        "num_channels": own["patch_embed.proj.weight"].shape[1],
        "qkv_bias": "layers.0.blocks.0.attn.qkv.bias" in own,
        "layer_norm_eps": norm_eps(model),
    }


NO_POOLER = {"add_pooling_layer": False}

FAMILIES = {
    "BEiT of transformers": Family("Beit", _beit),
    "DeiT of transformers": Family("DeiT", _vit, "ForImageClassificationWithTeacher", NO_POOLER),
    "ViT of transformers": Family("ViT", _vit, features=NO_POOLER),
    "DINOv2 of transformers": Family("Dinov2", _dinov2),
    "DINOv2 with registers of transformers": Family("Dinov2WithRegisters", _dinov2),
    "Swin of transformers": Family("Swin", _swin),
}
"""{name of a layout of weights: its model}"""


@export_format("hf", extra="hf", packages=("transformers",))
def to_hf(trained: Trained, folder: Path) -> Written:
    """config.json, preprocessor_config.json and model.safetensors for transformers: a ViT, a distilled DeiT, BEiT,
    DINOv2 or Swin whose structure is that of transformers.

    Raises:
        ValueError: transformers has no such model, or computes other outputs from these files.
    """
    import transformers

    tensors, family = _renamed(trained)
    config = family.config(trained.model, trained.model.state_dict()) | {"image_size": trained.preprocessing.input_size}
    labels = [*trained.classes] or [f"LABEL_{i}" for i in range(trained.model.num_classes)]
    if labels:
        config |= {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    name = family.prefix + (family.classifier if labels else "Model")
    config = getattr(transformers, f"{family.prefix}Config")(**config, architectures=[name])
    config.save_pretrained(folder)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    limits = _write_processor(trained.preprocessing, folder)
    options = {} if labels else family.features
    check = _compare(trained, getattr(transformers, name), options, folder)
    return Written(_usage("" if labels else name, options), "transformers", check, limits)


def _layout_of(model: nn.Module) -> str:
    """The layout, of `FAMILIES`, that a model of this class can have.

    Raises:
        ValueError: there is none.
    """
    kind, own = type(model).__name__, model.state_dict()
    if kind == "VisionTransformer" and "blocks.0.ls1.gamma" in own:
        return f"DINOv2 {'with registers ' if 'reg_token' in own else ''}of transformers"
    names = {
        "VisionTransformer": "ViT",
        "VisionTransformerDistilled": "DeiT",
        "Beit": "BEiT",
        "SwinTransformer": "Swin",
    }
    if kind not in names:
        raise ValueError(f"cannot hold a {kind}; it can hold timm's {', '.join(names)}")
    return f"{names[kind]} of transformers"


def _renamed(trained: Trained) -> tuple[dict[str, torch.Tensor], Family]:
    """The model's tensors with transformers' names, and which model of transformers they are for.

    Raises:
        ValueError: it has no such model.
    """
    if trained.remedies:
        line = f"cannot hold the remedies {', '.join(trained.remedies)}: transformers has no such blocks"
        raise ValueError(f"{line}; --to onnx can, and --to timm has their parameters in a file beside the stock model")
    name = _layout_of(trained.model)
    try:
        return LAYOUTS[name].from_timm(trained.model.state_dict(), trained.model), FAMILIES[name]
    except ValueError as error:
        raise ValueError(f"cannot hold the model: for {name}, {error}") from None


def _write_processor(preprocessing: Preprocessing, folder: Path) -> list[str]:
    """Write preprocessor_config.json; a sentence if transformers cannot do the same."""
    import transformers

    side, size = preprocessing.input_size, preprocessing.resize
    resize = {"height": size, "width": size} if preprocessing.crop_mode == "squash" else {"shortest_edge": size}
    transformers.BitImageProcessor(
        size=resize,
        crop_size={"height": side, "width": side},
        resample=Resampling[preprocessing.interpolation.upper()],
        image_mean=[*preprocessing.mean],
        image_std=[*preprocessing.std],
        do_convert_rgb=True,
    ).save_pretrained(folder)
    if preprocessing.crop_mode == "border":
        return ["preprocessor_config.json crops images, where they were padded to a square (crop mode border)."]
    return []


def _compare(trained: Trained, cls: type, options: Mapping[str, object], folder: Path) -> str:
    """One line about the largest difference between the outputs of transformers and timm.

    Raises:
        ValueError: it is above `TOLERANCE`, or the files lack tensors of the model, or have others.
    """
    with _no_progress_bar():
        loaded, report = cls.from_pretrained(folder, output_loading_info=True, attn_implementation="eager", **options)
    misfits = [f"{kind.replace('_', ' ')} {min(map(str, names))}" for kind, names in report.items() if names]
    if misfits:
        raise ValueError(f"cannot hold the model: {cls.__name__} has {', '.join(misfits)}")
    images = trained.images()
    with torch.no_grad():
        output = loaded.eval()(images)
        if trained.model.num_classes:
            found, expected = output.logits, trained.logits(images)
        else:
            found = output.last_hidden_state
            expected = trained.model.forward_features(images).reshape(found.shape)
    difference, largest = (found - expected).abs().max().item(), expected.abs().max().item()
    if not difference <= TOLERANCE * largest:
        raise ValueError(
            f"cannot hold the model: outputs of {cls.__name__} differ from timm's by up to {difference:.1e}"
        )
    return f"outputs of {cls.__name__} differ from timm's by at most {difference:.1e} (largest output {largest:.3g})"


@contextlib.contextmanager
def _no_progress_bar():
    from transformers.utils import logging

    was_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            logging.enable_progress_bar()


def _usage(features: str, options: Mapping[str, object]) -> str:
    """Lines of Python from the files to the class of an image, or to its tokens with the class `features`."""
    lines = ["import transformers", "", 'processor = transformers.AutoImageProcessor.from_pretrained("DIR")']
    if features:
        arguments = "".join(f", {name}={value}" for name, value in options.items())
        lines.append(f'model = transformers.{features}.from_pretrained("DIR"{arguments})')
        lines.append('tokens = model(**processor(image, return_tensors="pt")).last_hidden_state  # image: of PIL')
    else:
        lines.append('model = transformers.AutoModelForImageClassification.from_pretrained("DIR")')
        lines.append('output = model(**processor(image, return_tensors="pt")).logits  # image: an RGB image of PIL')
        lines.append("label = model.config.id2label[output.argmax().item()]")
    return "\n".join(lines)
