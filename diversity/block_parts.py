"""The modules within one block that are tapped and measured: attention, MLP, and their matrices.

timm's blocks have them as `attn` and `mlp`, those of transformers as `attention` and `mlp`; `attention_of` gives both
under timm's names.
"""

from dataclasses import dataclass

import torch
from timm.layers import Attention, AttentionRope
from timm.models import beit, eva, swin_transformer, swin_transformer_v2
from torch import nn


@dataclass(frozen=True)
class TransformersAttention:
    """The attention module of a block of transformers, under timm's names.

    Its maps are computed beside it from its queries and keys, so they are the same for every `attn_implementation`.

    Attributes:
        module: transformers' module.
    """

    module: nn.Module

    @property
    def num_heads(self) -> int:
        return self.module.num_attention_heads

    @property
    def q_proj(self) -> nn.Module:
        return self.module.q_proj

    @property
    def k_proj(self) -> nn.Module:
        return self.module.k_proj

    @property
    def v_proj(self) -> nn.Module:
        return self.module.v_proj

    @property
    def proj(self) -> nn.Module:
        return self.module.o_proj

    def parameters(self):
        return self.module.parameters()

    def maps(self, queries: torch.Tensor, keys: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Softmax maps [B, H, N, N] before dropout, in at least float32.

        Args:
            queries, keys: [B, N, D], the outputs of `q_proj` and `k_proj`.
            bias: what is added to the scores, such as the relative position bias of a BEiT, or a mask that is False
                where nothing may be attended to; None = nothing.
        """
        q, k = (tensor.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for tensor in (queries, keys))
        scores = q * self.module.scaling @ k.mT
        if bias is not None:
            scores = scores.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else scores + bias
        return scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))


ATTENTIONS = (
    Attention,
    AttentionRope,
    eva.EvaAttention,
    beit.Attention,
    swin_transformer.WindowAttention,
    swin_transformer_v2.WindowAttention,
    TransformersAttention,
)
"""The attention modules whose forward pass is known: weights head by head, and one softmax map for each head."""


def attention_of(block: nn.Module) -> nn.Module | TransformersAttention | None:
    """The attention of a block, which has `num_heads` and `proj`; None where it has none."""
    attention = getattr(block, "attention", None)
    if all(hasattr(attention, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj", "num_attention_heads")):
        return TransformersAttention(attention)
    return getattr(block, "attn", None)


def activation_of(block: nn.Module) -> nn.Module | None:
    """The activation function of a block's MLP as a module, in a gated MLP that of the gate; None where it has none."""
    mlp = getattr(block, "mlp", None)
    found = [getattr(mlp, name, None) for name in ("act", "activation_fn", "act_fn")]
    return next((module for module in found if isinstance(module, nn.Module)), None)


def shows_maps(attention: object) -> bool:
    """Whether the attention maps of a block can be read."""
    return isinstance(attention, TransformersAttention) or isinstance(getattr(attention, "attn_drop", None), nn.Module)


def trains_maps(attention: nn.Module | TransformersAttention) -> bool:
    """Whether the weights of an attention's queries and keys are trained."""
    layers = [getattr(attention, name, None) for name in ("qkv", "q_proj", "k_proj")]
    return any(parameter.requires_grad for layer in layers if layer is not None for parameter in layer.parameters())


def has_padding(block: nn.Module) -> bool:
    """Whether a Swin block's windows reach beyond its grid, so that their maps contain padding."""
    sizes = getattr(block, "input_resolution", ()), getattr(block, "window_size", ())
    return any(side % window for side, window in zip(*sizes, strict=True))


def block_matrices(block: nn.Module, group: str) -> list[torch.Tensor] | None:
    """One group's matrices in a block as stacks [k, Dout, Din]; None where the block has no such linear layer."""
    part = attention_of(block) if group in ("qkv", "proj") else getattr(block, "mlp", None)
    if hasattr(part, "gate_proj") and group in ("fc1", "fc2"):  # transformers' gated MLP; timm joins gate and up in fc1
        joined = [part.gate_proj.weight, part.up_proj.weight] if group == "fc1" else [part.down_proj.weight]
        return [torch.cat(joined)[None]]
    joint = getattr(part, group, None)
    if group == "qkv" and joint is None:
        layers, rows = [getattr(part, name, None) for name in ("q_proj", "k_proj", "v_proj")], 1
    else:
        layers, rows = [joint], 3 if group == "qkv" else 1
    if any(getattr(layer, "weight", None) is None or layer.weight.dim() != 2 for layer in layers):
        return None
    return [layer.weight.unflatten(0, (rows, -1)) for layer in layers]
