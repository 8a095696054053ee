"""Remedies that change the heads' outputs y before the output projection: y = A v, [B, H, N, head_dim]."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from .registry import remedy
from .sites import BlockShape


def parameters_of_blocks(
    blocks: Sequence[BlockShape], size: Callable[[BlockShape], int], value: float = 0.0
) -> nn.ParameterList:
    """A parameter [size] for each block, filled with a value."""
    return nn.ParameterList(
        nn.Parameter(torch.full((size(block),), value, device=block.device, dtype=block.dtype)) for block in blocks
    )


@remedy("attnscale", "heads", "values")
class AttnScale(nn.Module):
    """(1 + l_h) y - l_h mean_j v_j, with a learned l_h for each head: the high-frequency part of A times 1 + l_h.

    The map A becomes 11^T/N + (1 + l_h) (A - 11^T/N). l_h = 0 at first, where the model equals the stock model.

    Parameters: one for each head.

    Source: Wang et al., Anti-Oversmoothing in Deep Vision Transformers via the Fourier Domain Analysis, ICLR 2022,
        AttnScale.
    Differs: applied to y, so that attention stays fused; the result is the same.
    """

    def __init__(self, blocks: Sequence[BlockShape]):
        super().__init__()
        self.strength = parameters_of_blocks(blocks, lambda block: block.num_heads)

    def heads(self, i: int, y: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        strength = self.strength[i].view(-1, 1, 1)
        return ((1 + strength) * y - strength * values.mean(dim=-2, keepdim=True)).to(y.dtype)
