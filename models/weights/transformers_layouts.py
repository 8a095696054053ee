"""The layouts of ViT, DeiT, BEiT and Swin of transformers, in both directions, with the names of `transformers_names`.

`from_timm` writes the names of the classes ...ForImageClassification for a model with a classifier, otherwise those of
the classes ...Model.
"""

from collections.abc import Callable, Collection

from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from models.weights import transformers_names as names_of
from models.weights.layouts import Layout, enter
from models.weights.names import Names, Tensors
from models.weights.structure import has_classifier, require, require_positions

ANCHOR = "embeddings.patch_embeddings.projection.weight"
LEFT_OUT = {
    "embeddings.mask_token": "timm's model has none",
    "pooler.dense.": "timm's features and classifier do not use it",
    "relative_position_index": "timm computes it",
}
"""{part of a name: why such a tensor is left out}"""


def renamed_to_timm(weights: Tensors, names: Names) -> tuple[Tensors, list[str]]:
    """The tensors under timm's names, without those of `LEFT_OUT`."""
    reasons = {name: why for name in weights for part, why in LEFT_OUT.items() if part in name}
    notes = [f"{name} left out: {why}" for name, why in reasons.items()]
    return names.to_timm({name: tensor for name, tensor in weights.items() if name not in reasons}), notes


def _renames(names: Names) -> Callable[[Tensors, nn.Module], tuple[Tensors, list[str]]]:
    """The `to_timm` of a layout that differs from timm's in the names alone."""
    return lambda weights, model: renamed_to_timm(weights, names)


def named_as_transformers(weights: Tensors, names: Names, base: str, model: nn.Module) -> Tensors:
    """The tensors under transformers' names; behind `base` if the model has a classifier."""
    renamed = names.from_timm(weights)
    if not has_classifier(model):
        return renamed
    return {name if name.split(".")[0].endswith("classifier") else base + name: renamed[name] for name in renamed}


def has_in_block(*parameters: str) -> Callable[[Collection[str]], bool]:
    """Whether the first block of a file has one of these parameters."""
    starts = ("encoder.layer.0.", "layers.0.")
    return lambda names: any(start + parameter in names for start in starts for parameter in parameters)


_has_norm = has_in_block("layernorm_before.weight")


# BEiT


def _is_beit(names: Collection[str]) -> bool:
    return _has_norm(names) and any("relative_position_bias_table" in name or "lambda_1" in name for name in names)


def _beit_from_timm(weights: Tensors, model: nn.Module) -> Tensors:
    pool = "avg" if "fc_norm.weight" in weights else "token"
    require(model, Beit, "Block", pool, prefix_tokens=1)
    return named_as_transformers(weights, names_of.BEIT_NAMES, "beit.", model)


enter(
    Layout(
        "BEiT of transformers",
        "Query, key and value are joined. `pooler.layernorm`, behind average pooling, is timm's `fc_norm`.",
        ANCHOR,
        _is_beit,
        _renames(names_of.BEIT_NAMES),
        _beit_from_timm,
        beside=("classifier.",),
        layer_norm_eps=1e-12,
    )
)


# DeiT and ViT


def _deit_to_timm(weights: Tensors, model: nn.Module) -> tuple[Tensors, list[str]]:
    renamed, notes = renamed_to_timm(weights, names_of.DEIT_NAMES)
    single = {name: name.replace("classifier.", "head.") for name in renamed if name.startswith("classifier.")}
    return {single.get(name, name): tensor for name, tensor in renamed.items()}, notes


def _deit_from_timm(weights: Tensors, model: nn.Module) -> Tensors:
    require(model, VisionTransformerDistilled, "Block", "token", prefix_tokens=2)
    return named_as_transformers(weights, names_of.DEIT_NAMES, "deit.", model)


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
        layer_norm_eps=1e-12,
    )
)


def _vit_from_timm(weights: Tensors, model: nn.Module) -> Tensors:
    require(model, VisionTransformer, "Block", "token", prefix_tokens=1)
    require_positions(model, weights, num_prefix_tokens=1)
    return named_as_transformers(weights, names_of.VIT_NAMES, "vit.", model)


enter(
    Layout(
        "ViT of transformers",
        "Query, key and value are joined. Also the encoder of ViTMAE and of other models with these names.",
        ANCHOR,
        _has_norm,
        _renames(names_of.VIT_NAMES),
        _vit_from_timm,
        beside=("classifier.",),
        layer_norm_eps=1e-12,
    )
)


# Swin


def _is_swin(names: Collection[str]) -> bool:
    start = "encoder.layers.0.blocks.0."
    return f"{start}layernorm_before.weight" in names and not any("logit_scale" in name for name in names)  # version 2


def _swin_from_timm(weights: Tensors, model: nn.Module) -> Tensors:
    require(model, SwinTransformer, "SwinTransformerBlock", "avg")
    return named_as_transformers(weights, names_of.SWIN_NAMES, "swin.", model)


enter(
    Layout(
        "Swin of transformers",
        "Query, key and value are joined. transformers merges patches at the end of a stage, timm at the start of the "
        "next one.",
        ANCHOR,
        _is_swin,
        _renames(names_of.SWIN_NAMES),
        _swin_from_timm,
        beside=("classifier.",),
        layer_norm_eps=1e-5,
    )
)
