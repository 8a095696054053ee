"""Where timm's blocks compute what remedies read and change, and what is missing in blocks that cannot give it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from timm.layers import Attention, AttentionRope
from timm.models import beit, eva, swin_transformer, swin_transformer_v2
from timm.models import vision_transformer as vit
from torch import nn

from ..backbones import Backbone, has_padding

ATTENTIONS = (
    Attention,
    AttentionRope,
    eva.EvaAttention,
    beit.Attention,
    swin_transformer.WindowAttention,
    swin_transformer_v2.WindowAttention,
)
"""The attention modules whose forward pass is known."""

PRE_NORM_BLOCKS = (vit.Block, eva.EvaBlock, beit.Block, swin_transformer.SwinTransformerBlock)
"""The blocks that add drop_path(branch(norm(x))) to x, once for attention and once for the MLP."""


@dataclass(frozen=True)
class BlockShape:
    """Sizes of a block for the parameters of a remedy: H heads of `head_dim` channels, D channels of a token."""

    num_heads: int
    head_dim: int
    dim: int
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, block: nn.Module) -> "BlockShape":
        weight = block.attn.proj.weight
        heads = block.attn.num_heads
        return cls(heads, weight.shape[1] // heads, weight.shape[0], weight.device, weight.dtype)


def split_heads(merged: torch.Tensor, num_heads: int) -> torch.Tensor:
    """[B, N, H * head_dim] -> [B, H, N, head_dim]."""
    return merged.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(heads: torch.Tensor) -> torch.Tensor:
    """[B, H, N, head_dim] -> [B, N, H * head_dim]."""
    return heads.transpose(1, 2).flatten(2)


def before_output_projection(attn: nn.Module) -> nn.Module:
    """The module whose input is the heads' outputs [B, N, H * head_dim]: a norm within attention, or `proj`."""
    return attn.norm if isinstance(getattr(attn, "norm", None), nn.Module) else attn.proj


def values_module(attn: nn.Module) -> nn.Module:
    """The linear layer whose output holds the values: `qkv` [B, N, 3 * H * head_dim], or `v_proj`."""
    return attn.v_proj if getattr(attn, "qkv", None) is None else attn.qkv


# Each check returns what a model lacks, or None. They may rely on the checks of `_attention`, which come first.


def _attention(model: nn.Module, block: nn.Module) -> str | None:
    attn = getattr(block, "attn", None)
    if hasattr(attn, "lambda_init"):
        return "its differential attention has two maps for each head"
    if type(attn) not in ATTENTIONS:
        return f"its {type(block).__name__} has no attention module of a known kind"
    if has_padding(block):
        return f"its windows of {block.window_size} do not divide the grid of {block.input_resolution}"
    return None


def _values(model: nn.Module, block: nn.Module) -> str | None:
    attn = block.attn
    if getattr(attn, "q_bias", None) is not None or isinstance(attn, swin_transformer_v2.WindowAttention):
        return f"its {type(attn).__name__} computes queries, keys and values outside of the module `qkv`"
    if getattr(attn, "num_kv_groups", 1) > 1:
        return "several of its heads share their values"
    return None


NEEDS: dict[str, Callable[[nn.Module, nn.Module], str | None]] = {
    "heads": _attention,
    "values": _values,
}
"""{what a remedy needs of a block: its check}."""


def blocks_of(model: nn.Module) -> Sequence[nn.Module] | None:
    """Every block of a ViT, DeiT, BEiT, EVA or Swin of timm in order; None for any other model."""
    backbone = Backbone.of(model)
    return None if backbone is None else backbone.all_blocks


def missing(model: nn.Module, needs: Sequence[str]) -> str | None:
    """What a model lacks for a remedy, as the end of an error; None where it has everything."""
    blocks = blocks_of(model)
    if blocks is None:
        return "it is not one of timm's ViT, DeiT, BEiT, EVA and Swin models"
    for need in needs:
        for block in blocks:
            lacks = NEEDS[need](model, block)
            if lacks is not None:
                return lacks
    return None
