"""The layouts of DINOv2 of transformers, without and with registers, in both directions."""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from models.weights import transformers_names as names_of
from models.weights.layouts import Layout, enter
from models.weights.names import Tensors
from models.weights.structure import has_classifier, require, require_positions
from models.weights.transformers_layouts import ANCHOR, has_in_block, named_as_transformers, renamed_to_timm

_has_layer_scale = has_in_block("layer_scale1.lambda1")


def _dinov2_to_timm(weights: Tensors, model: nn.Module) -> tuple[Tensors, list[str]]:
    is_gated = any(".mlp.weights_in." in name or ".mlp.gate_proj." in name for name in weights)
    renamed, notes = renamed_to_timm(weights, names_of.SWIGLU_NAMES if is_gated else names_of.GELU_NAMES)
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
    require_positions(model, weights, num_prefix_tokens=1)
    return _dinov2_named(weights, "dinov2.", model)


def _dinov2_named(weights: Tensors, base: str, model: nn.Module) -> Tensors:
    """The classifier of transformers reads the class token and the mean of the patches, which gets zeros here."""
    weights = dict(weights)
    if "blocks.0.ls1.gamma" not in weights:
        raise ValueError("it needs LayerScale")
    if has_classifier(model):
        weights["head.weight"] = torch.cat([weights["head.weight"], torch.zeros_like(weights["head.weight"])], dim=1)
    is_gated = len(weights["blocks.0.mlp.fc1.weight"]) == 2 * weights["blocks.0.mlp.fc2.weight"].shape[1]
    named = named_as_transformers(weights, names_of.SWIGLU_NAMES if is_gated else names_of.GELU_NAMES, base, model)
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
    require_positions(model, weights, num_prefix_tokens=0)
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
        layer_norm_eps=1e-6,
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
        layer_norm_eps=1e-6,
    )
)
