"""The layouts of transformers, in both directions, with the names of `transformers_names`.

`from_timm` writes the names of the classes ...ForImageClassification for a model with a classifier, otherwise those of
the classes ...Model.
"""

from collections.abc import Callable, Collection

import torch
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from models.weights import transformers_names as names_of
from models.weights.layouts import Layout, enter
from models.weights.names import Names, Tensors
from models.weights.structure import has_classifier, require

ANCHOR = "embeddings.patch_embeddings.projection.weight"
LEFT_OUT = {
    "embeddings.mask_token": "timm's model has none",
    "pooler.dense.": "timm's features and classifier do not use it",
    "relative_position_index": "timm computes it",
}
"""{part of a name: why such a tensor is left out}"""


def _renamed(weights: Tensors, names: Names) -> tuple[Tensors, list[str]]:
    """The tensors under timm's names, without those of `LEFT_OUT`."""
    reasons = {name: why for name in weights for part, why in LEFT_OUT.items() if part in name}
    notes = [f"{name} left out: {why}" for name, why in reasons.items()]
    return names.to_timm({name: tensor for name, tensor in weights.items() if name not in reasons}), notes


def _named(weights: Tensors, names: Names, base: str, model: nn.Module) -> Tensors:
    """The tensors under transformers' names; behind `base` if the model has a classifier."""
    renamed = names.from_timm(weights)
    if not has_classifier(model):
        return renamed
    return {name if name.split(".")[0].endswith("classifier") else base + name: renamed[name] for name in renamed}


def _has_in_block(*parameters: str) -> Callable[[Collection[str]], bool]:
    """Whether the first block of a file has one of these parameters."""
    starts = ("encoder.layer.0.", "layers.0.")
    return lambda names: any(start + parameter in names for start in starts for parameter in parameters)


_has_norm, _has_layer_scale = _has_in_block("layernorm_before.weight"), _has_in_block("layer_scale1.lambda1")


# BEiT


def _is_beit(names: Collection[str]) -> bool:
    return _has_norm(names) and any("relative_position_bias_table" in name or "lambda_1" in name for name in names)


def _beit_to_timm(weights: Tensors, model: nn.Module) -> tuple[Tensors, list[str]]:
    return _renamed(weights, names_of.BEIT_NAMES)


def _beit_from_timm(weights: Tensors, model: nn.Module) -> Tensors:
    pool = "avg" if "fc_norm.weight" in weights else "token"
    require(model, Beit, "Block", pool, prefix_tokens=1)
    return _named(weights, names_of.BEIT_NAMES, "beit.", model)


enter(
    Layout(
        "BEiT of transformers",
        "Query, key and value are joined. `pooler.layernorm`, behind average pooling, is timm's `fc_norm`.",
        ANCHOR,
        _is_beit,
        _beit_to_timm,
        _beit_from_timm,
        beside=("classifier.",),
    )
)


# DeiT and ViT


def _deit_to_timm(weights: Tensors, model: nn.Module) -> tuple[Tensors, list[str]]:
    renamed, notes = _renamed(weights, names_of.DEIT_NAMES)
    single = {name: name.replace("classifier.", "head.") for name in renamed if name.startswith("classifier.")}
    return {single.get(name, name): tensor for name, tensor in renamed.items()}, notes


def _deit_from_timm(weights: Tensors, model: nn.Module) -> Tensors:
    require(model, VisionTransformerDistilled, "Block", "token", prefix_tokens=2)
    return _named(weights, names_of.DEIT_NAMES, "deit.", model)


enter(
    Layout(
        "DeiT of transformers",
        "For timm's distilled DeiT, since the model of transformers always has a distillation token. Query, key and "
        "value are joined.",
        ANCHOR,
        lambda names: _has_norm(names) and "embeddings.distillation_token" in names,
        _deit_to_timm,
        _deit_from_timm,
        beside=("classifier.", "cls_classifier.", "distillation_classifier."),
    )
)


def _vit_to_timm(weights: Tensors, model: nn.Module) -> tuple[Tensors, list[str]]:
    return _renamed(weights, names_of.VIT_NAMES)


def _vit_from_timm(weights: Tensors, model: nn.Module) -> Tensors:
    require(model, VisionTransformer, "Block", "token", prefix_tokens=1)
    _require_positions_of(model, weights, 1)
    return _named(weights, names_of.VIT_NAMES, "vit.", model)


def _require_positions_of(model: nn.Module, weights: Tensors, num_prefix_tokens: int):
    """Refuse a model whose position embeddings are for other tokens (timm: no_embed_class)."""
    needed = model.patch_embed.num_patches + num_prefix_tokens
    if weights["pos_embed"].shape[1] != needed:
        found = weights["pos_embed"].shape[1]
        raise ValueError(f"it needs {needed} position embeddings, of the class token too, instead of {found}")


enter(
    Layout(
        "ViT of transformers",
        "Query, key and value are joined. Also the encoder of ViTMAE and of other models with these names.",
        ANCHOR,
        _has_norm,
        _vit_to_timm,
        _vit_from_timm,
        beside=("classifier.",),
    )
)


# DINOv2


def _dinov2_to_timm(weights: Tensors, model: nn.Module) -> tuple[Tensors, list[str]]:
    is_gated = any(".mlp.weights_in." in name or ".mlp.gate_proj." in name for name in weights)
    renamed, notes = _renamed(weights, names_of.SWIGLU_NAMES if is_gated else names_of.GELU_NAMES)
    width = renamed.get("norm.weight", torch.empty(0)).shape
    classifier = renamed.get("head.weight")
    if classifier is not None and classifier.shape[1:] == (2 * width.numel(),):
        of_token, of_patches = classifier.chunk(2, dim=1)
        if of_patches.any():
            notes += [
                f"head.{name} dropped: the classifier of transformers reads the mean of the patch tokens too"
                for name in ("weight", "bias")
                if renamed.pop(f"head.{name}", None) is not None
            ]
        else:  # as `from_timm` writes it
            renamed["head.weight"] = of_token
    return renamed, notes


def _dinov2_from_timm(weights: Tensors, model: nn.Module) -> Tensors:
    require(model, VisionTransformer, "Block", "token", prefix_tokens=1)
    _require_positions_of(model, weights, 1)
    return _dinov2_named(weights, "dinov2.", model)


def _dinov2_named(weights: Tensors, base: str, model: nn.Module) -> Tensors:
    """The classifier of transformers reads the class token and the mean of the patches, which gets zeros here."""
    weights = dict(weights)
    if "blocks.0.ls1.gamma" not in weights:
        raise ValueError("it needs LayerScale")
    if has_classifier(model):
        weights["head.weight"] = torch.cat([weights["head.weight"], torch.zeros_like(weights["head.weight"])], dim=1)
    is_gated = len(weights["blocks.0.mlp.fc1.weight"]) == 2 * weights["blocks.0.mlp.fc2.weight"].shape[1]
    named = _named(weights, names_of.SWIGLU_NAMES if is_gated else names_of.GELU_NAMES, base, model)
    mask = base if has_classifier(model) else ""
    return named | {f"{mask}embeddings.mask_token": torch.zeros_like(weights["cls_token"][0])}


def _registers_to_timm(weights: Tensors, model: nn.Module) -> tuple[Tensors, list[str]]:
    """timm adds the first position embedding to the class token once, and has none for it."""
    renamed, notes = _dinov2_to_timm(weights, model)
    renamed["reg_token"] = renamed.pop("embeddings.register_tokens")
    if {"cls_token", "pos_embed"} <= renamed.keys():
        renamed["cls_token"] = renamed["cls_token"] + renamed["pos_embed"][:, :1]
        renamed["pos_embed"] = renamed["pos_embed"][:, 1:]
    return renamed, notes


def _registers_from_timm(weights: Tensors, model: nn.Module) -> Tensors:
    weights = dict(weights)
    if "reg_token" not in weights:
        raise ValueError("it needs register tokens")
    registers = weights.pop("reg_token")
    require(model, VisionTransformer, "Block", "token", prefix_tokens=1 + registers.shape[1])
    _require_positions_of(model, weights, 0)
    weights["pos_embed"] = torch.cat([torch.zeros_like(weights["cls_token"]), weights["pos_embed"]], dim=1)
    base = "dinov2_with_registers."
    start = base if has_classifier(model) else ""
    return _dinov2_named(weights, base, model) | {f"{start}embeddings.register_tokens": registers.clone()}


enter(
    Layout(
        "DINOv2 of transformers",
        "For timm's `vit_*_dinov2`. Query, key and value are joined; the mask token is left out.",
        ANCHOR,
        lambda names: _has_layer_scale(names) and "embeddings.register_tokens" not in names,
        _dinov2_to_timm,
        _dinov2_from_timm,
        beside=("classifier.",),
    )
)
enter(
    Layout(
        "DINOv2 with registers of transformers",
        "For timm's `vit_*_reg4_dinov2`, whose class token contains its position embedding.",
        ANCHOR,
        lambda names: _has_layer_scale(names) and "embeddings.register_tokens" in names,
        _registers_to_timm,
        _registers_from_timm,
        beside=("classifier.",),
    )
)


# Swin


def _is_swin(names: Collection[str]) -> bool:
    start = "encoder.layers.0.blocks.0."
    return f"{start}layernorm_before.weight" in names and not any("logit_scale" in name for name in names)  # version 2


def _swin_to_timm(weights: Tensors, model: nn.Module) -> tuple[Tensors, list[str]]:
    return _renamed(weights, names_of.SWIN_NAMES)


def _swin_from_timm(weights: Tensors, model: nn.Module) -> Tensors:
    require(model, SwinTransformer, "SwinTransformerBlock", "avg")
    return _named(weights, names_of.SWIN_NAMES, "swin.", model)


enter(
    Layout(
        "Swin of transformers",
        "Query, key and value are joined. transformers merges patches at the end of a stage, timm at the start of the "
        "next one.",
        ANCHOR,
        _is_swin,
        _swin_to_timm,
        _swin_from_timm,
        beside=("classifier.",),
    )
)
