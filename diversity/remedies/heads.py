"""Remedies that change the outputs of the heads, y = A v, before the output projection; all are [B, H, N, head_dim].

Means are over all N tokens of an image, or of a window.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from ..similarity import unit
from .registry import check_integer, check_number, remedy
from .sites import BlockShape


def _for_heads(parameter: torch.Tensor) -> torch.Tensor:
    """[H] -> [H, 1, 1]."""
    return parameter.view(-1, 1, 1)


@remedy("gfsa", changes=("heads",), reads=("queries", "keys"))
class GraphFilter(nn.Module):
    """y + b_h (y + (K - 1) (A y - y)): the filter A + b_h A^K of the map A, with A^K taken as A + (K - 1) (A A - A).

    b_h, one for each head, is learned and 0 at first, where the model equals the stock model. A y is a second fused
    attention with the same queries and keys.

    Args:
        gfsa_order: K, an integer >= 2.

    Parameters: H in each block.

    Raises:
        ValueError: a setting out of its range.

    Source: Choi et al., Graph Convolutions Enrich the Self-Attention in Transformers!, NeurIPS 2024.
    Differs: applied to y, so that attention stays fused; the result is the same without attention dropout, which acts
        on the first product only. With reattention, which changes maps, A y is still that of the softmax.
    """

    def __init__(self, blocks: Sequence[BlockShape], *, gfsa_order: int = 4):
        super().__init__()
        self.order = check_integer("gfsa_order", gfsa_order, at_least=2)
        self.strength = nn.ParameterList(block.filled(block.num_heads) for block in blocks)

    def forward(self, i: int, y: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        second = F.scaled_dot_product_attention(queries, keys, y)
        power = y + (self.order - 1) * (second - y)
        return (y + _for_heads(self.strength[i]) * power).to(y.dtype)


@remedy("attnscale", changes=("heads",), reads=("values",))
class AttnScale(nn.Module):
    """(1 + l_h) y - l_h mean_j v_j, with a learned l_h for each head, which scales A - 11^T / N by 1 + l_h.

    l_h = 0 at first, where the model equals the stock model.

    Parameters: H in each block.

    Source: Wang et al., Anti-Oversmoothing in Deep Vision Transformers via the Fourier Domain Analysis, ICLR 2022,
        AttnScale.
    Differs: applied to y, so that attention stays fused; the result is the same without attention dropout, which the
        released code applies after scaling.
    """

    def __init__(self, blocks: Sequence[BlockShape]):
        super().__init__()
        self.strength = nn.ParameterList(block.filled(block.num_heads) for block in blocks)

    def forward(self, i: int, y: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        strength = _for_heads(self.strength[i])
        return ((1 + strength) * y - strength * values.mean(dim=-2, keepdim=True)).to(y.dtype)


@remedy("centered", changes=("heads",), reads=("values",))
class Centered(nn.Module):
    """y - mean_j v_j, which is attention with the map A - 11^T / N, whose rows sum to 0.

    Parameters: none.

    Source: the limit of attnscale in which only the high-frequency part of A remains.
    Differs: no paper trains exactly this.
    """

    def __init__(self, blocks: Sequence[BlockShape]):
        super().__init__()

    def forward(self, i: int, y: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return y - values.mean(dim=-2, keepdim=True)


@remedy("laplacian", changes=("heads",), reads=("values",))
class Laplacian(nn.Module):
    """v - y in place of y in k of the H heads, which is attention with the graph Laplacian I - A.

    It lets these heads smooth tokens on purpose: the opposite direction to the other remedies.

    Args:
        laplacian_heads: k, from 1 to the H of each block: the first k heads. None = half of them, rounded up.

    Parameters: none.

    Raises:
        ValueError: a k that is not an integer from 1 to H.

    Source: Zhang and Papyan, Laplacian Heads Improve Transformers by Smoothing Token Representations, arXiv 2602.09297.
    Differs: which heads and how many by default is our choice.
    """

    def __init__(self, blocks: Sequence[BlockShape], *, laplacian_heads: int | None = None):
        super().__init__()
        fewest = min(block.num_heads for block in blocks)
        if laplacian_heads is not None and check_integer("laplacian_heads", laplacian_heads, at_least=1) > fewest:
            raise ValueError(f"laplacian_heads must be at most {fewest}, the heads of a block; got {laplacian_heads}")
        self.counts = [laplacian_heads or (block.num_heads + 1) // 2 for block in blocks]

    def forward(self, i: int, y: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        k = self.counts[i]
        return torch.cat((values[:, :k] - y[:, :k], y[:, k:]), dim=1)


@remedy("neutreno", changes=("heads",), reads=("values", "first_values"))
class Neutreno(nn.Module):
    """y + a (v_first - v) in all blocks but the first, with v_first the values of the first block.

    Args:
        neutreno_strength: a.

    Parameters: none.

    Raises:
        ValueError: a setting that is not a number.

    Source: Nguyen et al., Mitigating Over-smoothing in Transformers via Regularized Nonlocal Functionals, NeurIPS 2023.
    Differs: none.
    """

    def __init__(self, blocks: Sequence[BlockShape], *, neutreno_strength: float = 0.6):
        super().__init__()
        self.strength = check_number("neutreno_strength", neutreno_strength)

    def forward(self, i: int, y: torch.Tensor, values: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        return y if i == 0 else y + self.strength * (first - values)


@remedy("xsa", changes=("heads",), reads=("values",))
class ExclusiveAttention(nn.Module):
    """y - (y . v^) v^ for each token and head, with v^ the token's own value divided by its length: no part along it.

    A value of length 0 changes nothing.

    Parameters: none.

    Source: Zhai, Exclusive Self Attention, arXiv 2603.09078.
    Differs: the paper trains language models.
    """

    def __init__(self, blocks: Sequence[BlockShape]):
        super().__init__()

    def forward(self, i: int, y: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        precise = torch.promote_types(y.dtype, torch.float32)
        units, precise_y = unit(values.to(precise)), y.to(precise)
        return (precise_y - (precise_y * units).sum(dim=-1, keepdim=True) * units).to(y.dtype)
