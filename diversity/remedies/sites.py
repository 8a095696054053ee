"""Where timm's blocks compute the tensors that remedies change and read, and checks for models that lack one.

Letters: B images (windows of a Swin count as images, except for the residual), N tokens with prefix tokens, D channels,
H heads. y = A v are the outputs of the heads before the output projection.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from timm.layers import Attention
from timm.models import beit, eva, swin_transformer, swin_transformer_v2
from timm.models import vision_transformer as vit
from torch import nn

from ..backbones import Backbone
from ..block_parts import ATTENTIONS, has_padding

PRE_NORM_BLOCKS = (vit.Block, eva.EvaBlock, beit.Block, swin_transformer.SwinTransformerBlock)
"""The blocks that add drop_path1(attn(norm1(x))) to x, and then drop_path2(mlp(norm2(x)))."""


@dataclass(frozen=True)
class BlockShape:
    """What the parameters of a remedy depend on in a block: H, D, and where and how its own parameters are stored."""

    num_heads: int
    dim: int
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, block: nn.Module) -> "BlockShape":
        weight = block.attn.proj.weight
        return cls(block.attn.num_heads, weight.shape[0], weight.device, weight.dtype)

    def filled(self, size: int, value: float = 0.0) -> nn.Parameter:
        """A parameter [size] of one value."""
        return nn.Parameter(torch.full((size,), float(value), device=self.device, dtype=self.dtype))


def split_heads(merged: torch.Tensor, num_heads: int) -> torch.Tensor:
    """[B, N, H * head_dim] -> [B, H, N, head_dim]."""
    return merged.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(heads: torch.Tensor) -> torch.Tensor:
    """[B, H, N, head_dim] -> [B, N, H * head_dim]."""
    return heads.transpose(1, 2).flatten(2)


def has_joint_projection(attn: nn.Module) -> bool:
    """Whether one layer `qkv` computes queries, keys and values, and not three layers."""
    return getattr(attn, "qkv", None) is not None


def output_projection(attn: nn.Module) -> nn.Module:
    """The module whose input is y, [B, N, H * head_dim]: a norm within attention, or `proj`."""
    return attn.norm if isinstance(getattr(attn, "norm", None), nn.Module) else attn.proj


def blocks_of(model: nn.Module) -> Sequence[nn.Module] | None:
    """Every block of a ViT, DeiT, BEiT, EVA or Swin of timm in order; None for any other model."""
    backbone = Backbone.of(model)
    return None if backbone is None or not backbone.is_timm else backbone.all_blocks


# Each check returns what a model lacks at one of its blocks, or None.

Check = Callable[[nn.Module, nn.Module], str | None]


def _attention(model: nn.Module, block: nn.Module) -> str | None:
    attn = getattr(block, "attn", None)
    if hasattr(attn, "lambda_init"):
        return "its differential attention has two maps for each head"
    if type(attn) not in ATTENTIONS:
        return f"the attention of its {type(block).__name__} is not one of those whose forward pass is known"
    if has_padding(block):
        windows, grid = block.window_size, tuple(block.input_resolution)
        return f"its windows of {windows} do not divide the grid of {grid}; padding would count as tokens"
    return None


def _values(model: nn.Module, block: nn.Module) -> str | None:
    attn = block.attn
    if getattr(attn, "q_bias", None) is not None or type(attn) is swin_transformer_v2.WindowAttention:
        hint = "; the model argument qkv_fused=False builds three layers" if type(attn) is eva.EvaAttention else ""
        return f"its attention computes queries, keys and values outside of the module `qkv`{hint}"
    if getattr(attn, "num_kv_groups", 1) > 1:
        return "several of its heads have the same values"
    return None


def _first_values(model: nn.Module, block: nn.Module) -> str | None:
    if hasattr(model, "layers"):
        return "the values of its first block have another shape than those of later stages, or other windows"
    if len(model.blocks) < 2:
        return "it has a single block, and the values of the first block change those of later ones"
    if block.attn.num_heads != model.blocks[0].attn.num_heads:
        return "its blocks have different numbers of heads"
    return None


def _queries(model: nn.Module, block: nn.Module) -> str | None:
    if type(block.attn) is not Attention:
        return "no module gives the queries and keys as its softmax sees them"
    return None


def _branches(model: nn.Module, block: nn.Module) -> str | None:
    if type(block) not in PRE_NORM_BLOCKS:
        return f"its {type(block).__name__} does not have a norm before attention and one before the MLP"
    return None


CHANGED: dict[str, tuple[Check, ...]] = {
    "attention_input": (_branches,),
    "values": (_attention, _values),
    "maps": (_attention,),
    "heads": (_attention,),
    "attention_output": (_attention,),
    "attention_update": (_branches,),
    "mlp_input": (_branches,),
    "mlp_update": (_branches,),
}
"""{a tensor that remedies change: checks of a model}, in the order in which a block computes them.

attention_input and mlp_input: x before norm1 and norm2, [B, N, D]; a Swin's norm1 sees [B, rows, columns, D].
values: v, [B, H, N, head_dim]. maps: the maps A after softmax and dropout, [B, H, N, N]. heads: y, [B, H, N, head_dim].
attention_output: the output of the attention module, [B, N, D].
attention_update and mlp_update: what is added to x, after LayerScale and drop path, in the shape of x.
"""

READ: dict[str, tuple[Check, ...]] = {
    "values": (_attention, _values),
    "first_values": (_attention, _values, _first_values),
    "queries": (_attention, _queries),
    "keys": (_attention, _queries),
    "residual": (_branches,),
}
"""{a tensor that remedies read: checks of a model}.

values: v as attention uses them. first_values: v of the first block, unchanged. queries, keys: after their norm, before
scaling, [B, H, N, head_dim]. residual: x of the branch, before a remedy changes what its norm sees.
"""


def missing(model: nn.Module, needs: Sequence[str]) -> str | None:
    """What a model lacks of the tensors that a remedy needs, as the end of an error; None where it has all."""
    blocks = blocks_of(model)
    if blocks is None:
        return "it is not one of timm's ViT, DeiT, BEiT, EVA and Swin models"
    for block in blocks:
        for need in needs:
            for check in CHANGED.get(need) or READ[need]:
                lacks = check(model, block)
                if lacks is not None:
                    return lacks
    return None
