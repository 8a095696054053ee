"""Terms on the circuits of attention heads, which a change of basis within a head cannot move.

The heads of a block are the items, each with its QK circuit or its OV circuit as one long vector; see `circuits`. A
term is the mean over the blocks, and over QK and OV. `circuits` is [M, H, 2, hd, D], the factors of the M sets of
circuits, QK and OV of every block; where blocks differ in shape, a sequence of such stacks, one for each shape.

The rows of W_Q, W_K and W_V alone are not identifiable: a change of basis gives them any cosines at no cost, so a term
on rows can be minimised without a change of the model.
"""

import torch

from .circuits import circuit_cosines
from .regularizers import regularizer
from .similarity import require_pairs
from .spread import log_of_nearest, rate_of_gram, uniformity
from .weight import Stacks, of_each

COINCIDENT = 1e-6
"""Distances of circuits below it are rounding, and count as 0."""


def _cosines(stack: torch.Tensor) -> torch.Tensor:
    """Cosines of the circuits of every two heads, [M, H, 2, hd, D] -> [M, H, H]."""
    require_pairs(stack.shape[1])
    return circuit_cosines(*stack.unbind(dim=2))


@regularizer(level="weight")
def weight_circuit_abscos(circuits: Stacks) -> torch.Tensor:
    """Mean absolute cosine between the circuits of two different heads of a block.

    The absolute value, because a circuit and its negative span the same line.

    Args:
        circuits: [M, H, 2, hd, D] with H >= 2, or a sequence of such stacks.

    Returns:
        0-dim, in [0, 1]: 1 when the circuits of a block lie on one line, 0 when they are orthogonal.

    Raises:
        ValueError: a single head.

    Source: DiversePatch (Gong et al. 2021, arXiv 2104.12753), the patch-wise cosine loss, with the circuits of heads
        (Elhage et al. 2021) as items.
    Differs: not in the released code.
    """

    def mean_of_pairs(stack):
        heads = stack.shape[1]
        itself = torch.eye(heads, dtype=torch.bool, device=stack.device)
        return _cosines(stack).abs().masked_fill(itself, 0).sum(dim=(-2, -1)) / (heads * (heads - 1))

    return of_each(mean_of_pairs, circuits).mean()


@regularizer(level="weight")
def weight_circuit_koleo(circuits: Stacks) -> torch.Tensor:
    """Minus the mean over a block's heads of log(distance of the unit circuit to the nearest other one + 1e-4).

    In float64, since the distance is the root of 2 - 2 cos. Circuits that coincide have no gradient.

    Args:
        circuits: [M, H, 2, hd, D] with H >= 2, or a sequence of such stacks.

    Returns:
        0-dim, from about -log 2 to -log 1e-4: highest when every circuit of a block coincides with another one, about
        -log sqrt 2 when they are orthogonal.

    Raises:
        ValueError: a single head.

    Source: as emb_koleo.
    Differs: as emb_koleo, with the circuits of a block as tokens.
    """

    def koleo(stack):
        cosines = _cosines(stack.double())
        itself = torch.eye(stack.shape[1], dtype=torch.bool, device=stack.device)
        squares = 2 - 2 * cosines.masked_fill(itself, -torch.inf).max(dim=-1).values
        coincide = squares <= COINCIDENT**2
        distances = squares.masked_fill(coincide, 1).sqrt().masked_fill(coincide, 0)  # a root has no slope at 0
        return log_of_nearest(distances).to(stack.dtype)

    return of_each(koleo, circuits).mean()


@regularizer(level="weight")
def weight_circuit_uniformity(circuits: Stacks) -> torch.Tensor:
    """Log of the mean over all pairs of a block's heads of exp(-2 * squared distance of their unit circuits).

    Args:
        circuits: [M, H, 2, hd, D] with H >= 2, or a sequence of such stacks.

    Returns:
        0-dim, in [-8, 0]: 0 when all circuits of a block are parallel, -4 when they are orthogonal.

    Raises:
        ValueError: a single head.

    Source: as emb_uniformity.
    Differs: as emb_uniformity, with the circuits of a block as tokens.
    """
    return of_each(lambda stack: uniformity(_cosines(stack)), circuits).mean()


@regularizer(level="weight")
def weight_circuit_coding_rate(circuits: Stacks) -> torch.Tensor:
    """Minus the coding rate 1/2 logdet(I + D^2 / (H eps^2) C C^T), C the flattened unit circuits, eps = 0.5.

    In float64, since parallel circuits leave the matrix with a condition number of 1 + 4 D^2.

    Args:
        circuits: [M, H, 2, hd, D], or a sequence of such stacks.

    Returns:
        0-dim, in [-H/2 log(1 + 4 D^2 / H), -1/2 log(1 + 4 D^2)], in nats: highest when all circuits of a block are
        parallel, lowest when they are orthogonal.

    Source: as emb_coding_rate.
    Differs: as emb_coding_rate, with the circuits of a block as tokens.
    """

    def rate(stack):
        heads, width = stack.shape[1], stack.shape[-1]
        left, right = stack.double().unbind(dim=2)
        return rate_of_gram(circuit_cosines(left, right), width**2 / heads).to(stack.dtype)

    return -of_each(rate, circuits).mean()
