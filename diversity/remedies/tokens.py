"""Remedies that change tokens: what a norm sees, the output of attention, and what is added to the residual."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from ..similarity import unit
from .registry import check_number, check_switch, remedy
from .sites import BlockShape

INPUTS_OF = {"norm1": ("attention_input",), "norm2": ("mlp_input",), "both": ("attention_input", "mlp_input")}
"""{what `contranorm_where` says: the tensors that ContraNorm changes}."""


@remedy("contranorm", changes=("attention_input", "mlp_input"))
class ContraNorm(nn.Module):
    """x - s softmax(x^ x^T / tau) x in place of x before a norm, with x^ the unit tokens of an image.

    The residual connection still adds to x itself. All N tokens of an image are compared, also in a Swin, where that is
    the whole grid of a stage.

    Args:
        contranorm_scale: s, >= 0; 0 leaves the model as it is.
        contranorm_temperature: tau, > 0.
        contranorm_where: the norm: "norm1" (of attention), "norm2" (of the MLP) or "both".

    Parameters: none.

    Raises:
        ValueError: a setting out of its range.

    Source: Guo et al., ContraNorm: A Contrastive Learning Perspective on Oversmoothing and Beyond, ICLR 2023.
    Differs: the released training script replaces every norm of a ViT, also the final one, which is never changed here.
        Its module also has a learned scale, a second softmax over the other axis and unit tokens in the product, all
        off by default.
    """

    def __init__(
        self,
        blocks: Sequence[BlockShape],
        *,
        contranorm_scale: float = 0.01,
        contranorm_temperature: float = 1.0,
        contranorm_where: str = "norm1",
    ):
        super().__init__()
        self.scale = check_number("contranorm_scale", contranorm_scale, at_least=0)
        self.temperature = check_number("contranorm_temperature", contranorm_temperature, above=0)
        if contranorm_where not in INPUTS_OF:
            raise ValueError(f"contranorm_where must be one of {', '.join(INPUTS_OF)}; got {contranorm_where!r}")
        self.changes = INPUTS_OF[contranorm_where]

    def forward(self, i: int, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(1, -2).unsqueeze(1)  # fused attention with one head
        units = unit(tokens)
        mean = F.scaled_dot_product_attention(units, units, tokens, scale=1 / self.temperature)
        return x - self.scale * mean.to(x.dtype).view_as(x)


@remedy("featscale", changes=("attention_output",))
class FeatScale(nn.Module):
    """(1 + a) mean_n o + (1 + b) (o - mean_n o) of the output o of attention, with learned a, b for each channel.

    a = b = 0 at first, where the model equals the stock model.

    Args:
        featscale_twice: add the change a mean_n o + b (o - mean_n o) twice, as the released code does.

    Parameters: 2 D in each block.

    Raises:
        ValueError: a setting that is not True or False.

    Source: Wang et al., Anti-Oversmoothing in Deep Vision Transformers via the Fourier Domain Analysis, ICLR 2022,
        FeatScale.
    Differs: added once, as in the paper; twice is a setting. LayerScale, which the released models lack, comes after.
    """

    def __init__(self, blocks: Sequence[BlockShape], *, featscale_twice: bool = False):
        super().__init__()
        self.factor = 2 if check_switch("featscale_twice", featscale_twice) else 1
        self.mean = nn.ParameterList(block.filled(block.dim) for block in blocks)
        self.rest = nn.ParameterList(block.filled(block.dim) for block in blocks)

    def forward(self, i: int, output: torch.Tensor) -> torch.Tensor:
        mean = output.mean(dim=-2, keepdim=True)
        change = self.mean[i] * mean + self.rest[i] * (output - mean)
        return (output + self.factor * change).to(output.dtype)


@remedy("ortho_residual", changes=("attention_update", "mlp_update"), reads=("residual",))
class OrthoResidual(nn.Module):
    """x + f - (x . f) / (x . x + 1e-6) x in place of x + f, for both branches: only the part of f orthogonal to x.

    f is the branch after LayerScale and drop path. The products are those of each token.

    Args:
        ortho_flattened: one product over all tokens and channels of an image, not one for each token.

    Parameters: none.

    Raises:
        ValueError: a setting that is not True or False.

    Source: Oh et al., Revisiting Residual Connections: Orthogonal Updates for Stable and Efficient Deep Networks,
        NeurIPS 2025.
    Differs: none; the products are in float32 under autocast.
    """

    def __init__(self, blocks: Sequence[BlockShape], *, ortho_flattened: bool = False):
        super().__init__()
        self.flattened = check_switch("ortho_flattened", ortho_flattened)

    def forward(self, i: int, update: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        precise = torch.promote_types(x.dtype, torch.float32)
        x, f = x.to(precise), update.to(precise)
        axes = tuple(range(1, x.dim())) if self.flattened else (-1,)
        share = (x * f).sum(axes, keepdim=True) / (x.square().sum(axes, keepdim=True) + 1e-6)
        return (f - share * x).to(update.dtype)
