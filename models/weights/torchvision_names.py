"""The layout of torchvision's `vit_*`."""

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from models.weights.layouts import Layout, enter
from models.weights.names import Names, Tensors
from models.weights.structure import require, require_positions

LAYER = "encoder.layers.encoder_layer_#"
VIT = {
    "cls_token": "class_token",
    "pos_embed": "encoder.pos_embedding",
    "patch_embed.proj.*": "conv_proj.*",
    "blocks.#.norm1.*": f"{LAYER}.ln_1.*",
    "blocks.#.norm2.*": f"{LAYER}.ln_2.*",
    "blocks.#.attn.qkv.*": f"{LAYER}.self_attention.in_proj_*",
    "blocks.#.attn.proj.*": f"{LAYER}.self_attention.out_proj.*",
    "blocks.#.mlp.fc1.*": f"{LAYER}.mlp.0.*",
    "blocks.#.mlp.fc2.*": f"{LAYER}.mlp.3.*",
    "norm.*": "encoder.ln.*",
    "head.*": "heads.head.*",
}
OLD = {f"blocks.#.mlp.fc{i}.*": f"{LAYER}.mlp.linear_{i}.*" for i in (1, 2)}
"""Before torchvision 0.14."""

NAMES = Names(VIT, OLD)


def _to_timm(weights: Tensors, model: nn.Module) -> tuple[Tensors, list[str]]:
    return NAMES.to_timm(weights), []


def _from_timm(weights: Tensors, model: nn.Module) -> Tensors:
    require(model, VisionTransformer, "Block", "token", prefix_tokens=1)
    require_positions(model, weights, num_prefix_tokens=1)
    return NAMES.from_timm(weights)


enter(
    Layout(
        "ViT of torchvision",
        "For timm's `vit_*`.",
        "conv_proj.weight",
        lambda names: "encoder.pos_embedding" in names,
        _to_timm,
        _from_timm,
    )
)
