"""Terms that spread unit items over the sphere, and look at all of them: at tokens, at heads and at rows of weights.

Each is defined once for items [..., items, D], and then for what the items of a level are, as in the modules of the
levels: the patch tokens of an image, the heads of an image with their flattened maps, the rows of a matrix.
"""

import math

import torch

from .regularizers import regularizer
from .similarity import cosines, distance, distances_to_others, require_pairs, unit
from .weight import Stacks, of_each

KOLEO_EPSILON = 1e-4
"""Added to the distances of `koleo`: it bounds the value by -log 1e-4, and the gradient by 1e4 where two items meet."""

CODING_EPSILON = 0.5
"""The precision up to which `coding_rate` codes a unit item."""

LARGEST_FLOAT32_CONDITION = 1e4
"""A matrix whose condition number may be larger needs float64 for its determinant."""


def koleo(items: torch.Tensor) -> torch.Tensor:
    """Minus the mean over the items of log(distance to the nearest other unit item + 1e-4).

    The nearest items are found without a gradient. Where two coincide, they are pulled apart; see `distance`.

    Args:
        items: [..., items, D] with items >= 2.

    Returns:
        [...], from about -log 2 to -log 1e-4.

    Raises:
        ValueError: there is only one item.
    """
    nearest = distances_to_others(items).argmin(dim=-1)
    items = unit(items)
    others = torch.take_along_dim(items, nearest.unsqueeze(-1), dim=-2)
    first_of_pair = nearest > torch.arange(nearest.shape[-1], device=nearest.device)
    return log_of_nearest(distance(items, others, torch.where(first_of_pair, 1.0, -1.0)))


def log_of_nearest(distances: torch.Tensor) -> torch.Tensor:
    """`koleo` from the distance of every item to the nearest other one, [..., items] -> [...]."""
    return -(distances + KOLEO_EPSILON).log().mean(dim=-1)


def uniformity(cosines: torch.Tensor) -> torch.Tensor:
    """Log of the mean over pairs of exp(-2 * squared distance), the squared distance of unit items being 2 - 2 cos.

    Args:
        cosines: [..., items, items], of every two items, with items >= 2.

    Returns:
        [...], in [-8, 0]: 0 when all items are parallel.

    Raises:
        ValueError: there is only one item.
    """
    count = cosines.shape[-1]
    require_pairs(count)
    itself = torch.eye(count, dtype=torch.bool, device=cosines.device)
    potentials = (4 * cosines - 4).masked_fill(itself, -torch.inf)
    return potentials.flatten(start_dim=-2).logsumexp(dim=-1) - math.log(count * (count - 1))


def coding_rate(items: torch.Tensor) -> torch.Tensor:
    """1/2 logdet(I + D / (n eps^2) Z^T Z) of the n unit items Z [n, D], eps = 0.5, from the smaller of Z Z^T and Z^T Z.

    In nats, up to eps the length of the code of all items. In float64 where D > 2500, since parallel items leave the
    matrix with a condition number of 1 + D / eps^2.

    Args:
        items: [..., items, D].

    Returns:
        [...], in the dtype of `items`: from 1/2 log(1 + D / eps^2) for parallel items to the value of a flat spectrum.
    """
    count, width = items.shape[-2:]
    ill_conditioned = width / CODING_EPSILON**2 > LARGEST_FLOAT32_CONDITION
    units = unit(items.double() if ill_conditioned else items)
    gram = units @ units.mT if count <= width else units.mT @ units
    return rate_of_gram(gram, width / count).to(items.dtype)


def rate_of_gram(gram: torch.Tensor, width_of_each: float) -> torch.Tensor:
    """`coding_rate` from Z Z^T or Z^T Z, [..., k, k] -> [...]; `width_of_each` is D / n."""
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.logdet(identity + width_of_each / CODING_EPSILON**2 * gram) / 2


@regularizer(level="embedding")
def emb_koleo(last: torch.Tensor) -> torch.Tensor:
    """Minus the mean over an image's patch tokens of log(distance of the unit token to the nearest other one + 1e-4).

    Args:
        last: [B, P, D] or [layers, B, P, D], prefix tokens excluded, P >= 2.

    Returns:
        0-dim, from about -log 2 to -log 1e-4: highest when every token coincides with another one, about
        -log sqrt 2 when they are orthogonal. Tokens that coincide are pulled apart.

    Raises:
        ValueError: fewer than two patch tokens.

    Source: Spreading vectors for similarity search (Sablayrolles et al. 2019, arXiv 1806.03198), the KoLeo regularizer;
        DINOv2 (Oquab et al. 2023, arXiv 2304.07193).
    Differs: not in the released code. The neighbours are those of the same image, where DINOv2 compares class tokens.
    """
    return koleo(last).mean()


@regularizer(level="embedding")
def emb_uniformity(last: torch.Tensor) -> torch.Tensor:
    """Log of the mean over all pairs of an image's unit patch tokens of exp(-2 * squared distance).

    Args:
        last: [B, P, D] or [layers, B, P, D], prefix tokens excluded, P >= 2.

    Returns:
        0-dim, in [-8, 0]: 0 when all tokens of an image are parallel, -4 when they are orthogonal.

    Raises:
        ValueError: fewer than two patch tokens.

    Source: Understanding contrastive representation learning (Wang and Isola 2020, arXiv 2005.10242), the uniformity
        loss with t = 2.
    Differs: not in the released code. The pairs are those of an image, not of a batch.
    """
    return uniformity(cosines(last)).mean()


@regularizer(level="embedding")
def emb_coding_rate(last: torch.Tensor) -> torch.Tensor:
    """Minus the coding rate 1/2 logdet(I + D / (P eps^2) T^T T), T the unit patch tokens of an image, eps = 0.5.

    Args:
        last: [B, P, D] or [layers, B, P, D], prefix tokens excluded.

    Returns:
        0-dim, for P <= D in [-P/2 log(1 + 4 D / P), -1/2 log(1 + 4 D)], in nats: highest when all tokens of an image
        are parallel, lowest when they are orthogonal.

    Source: Maximal coding rate reduction (Yu et al. 2020, arXiv 2006.08558), the rate of all items.
    Differs: not in the released code. The items are the tokens of an image, not of a batch.
    """
    return -coding_rate(last).mean()


@regularizer(level="attention")
def attn_koleo(attention: torch.Tensor) -> torch.Tensor:
    """Minus the mean over heads of log(distance of the head's unit map to the nearest other one + 1e-4).

    Args:
        attention: [B, H, N, N] or [layers, B, H, N, N], rows sum to 1, H >= 2.

    Returns:
        0-dim, from about -log sqrt 2 to -log 1e-4: highest when every head of an image has the map of another one,
        lowest when no two heads attend to a common place. Maps that coincide are pulled apart.

    Raises:
        ValueError: a single head.

    Source: as emb_koleo.
    Differs: as emb_koleo, with the heads as tokens.
    """
    return koleo(attention.flatten(start_dim=-2)).mean()


@regularizer(level="attention")
def attn_uniformity(attention: torch.Tensor) -> torch.Tensor:
    """Log of the mean over all pairs of an image's heads of exp(-2 * squared distance of their unit maps).

    Args:
        attention: [B, H, N, N] or [layers, B, H, N, N], rows sum to 1, H >= 2.

    Returns:
        0-dim, in [-4, 0]: 0 when all heads of an image have the same map, -4 when no two attend to a common place.

    Raises:
        ValueError: a single head.

    Source: as emb_uniformity.
    Differs: as emb_uniformity, with the heads as tokens.
    """
    return uniformity(cosines(attention.flatten(start_dim=-2))).mean()


@regularizer(level="attention")
def attn_coding_rate(attention: torch.Tensor) -> torch.Tensor:
    """Minus the coding rate 1/2 logdet(I + N^2 / (H eps^2) A A^T), A the heads' flattened unit maps, eps = 0.5.

    Args:
        attention: [B, H, N, N] or [layers, B, H, N, N], rows sum to 1.

    Returns:
        0-dim, in [-H/2 log(1 + 4 N^2 / H), -1/2 log(1 + 4 N^2)], in nats: highest when all heads of an image have the
        same map, lowest when no two attend to a common place.

    Source: as emb_coding_rate.
    Differs: as emb_coding_rate, with the heads as tokens.
    """
    return -coding_rate(attention.flatten(start_dim=-2)).mean()


@regularizer(level="weight")
def weight_mha_koleo(weights: Stacks) -> torch.Tensor:
    """Minus the mean over rows of log(distance of the unit row to the nearest other one + 1e-4), summed over matrices.

    Args:
        weights: [M, Dout, Din] with Dout >= 2, or a sequence of such stacks.

    Returns:
        0-dim, from about -M log 2 to -M log 1e-4: highest when every row of each matrix coincides with another one.
        Rows that coincide are pulled apart.

    Raises:
        ValueError: a matrix with a single row.

    Source: as emb_koleo.
    Differs: as emb_koleo, with the rows of a matrix as tokens.
    """
    return of_each(koleo, weights).sum()


@regularizer(level="weight")
def weight_mha_uniformity(weights: Stacks) -> torch.Tensor:
    """Log of the mean over all pairs of a matrix's unit rows of exp(-2 * squared distance), summed over the matrices.

    Args:
        weights: [M, Dout, Din] with Dout >= 2, or a sequence of such stacks.

    Returns:
        0-dim, in [-8 M, 0]: 0 when all rows of every matrix are parallel, -4 M when they are orthogonal.

    Raises:
        ValueError: a matrix with a single row.

    Source: as emb_uniformity.
    Differs: as emb_uniformity, with the rows of a matrix as tokens.
    """
    return of_each(lambda matrices: uniformity(cosines(matrices)), weights).sum()


@regularizer(level="weight")
def weight_mha_coding_rate(weights: Stacks) -> torch.Tensor:
    """Minus the coding rate 1/2 logdet(I + Din / (Dout eps^2) W^T W) of a matrix's unit rows W, summed; eps = 0.5.

    Args:
        weights: [M, Dout, Din], or a sequence of such stacks.

    Returns:
        0-dim, <= -M/2 log(1 + 4 Din), in nats: highest when all rows of every matrix are parallel.

    Source: as emb_coding_rate.
    Differs: as emb_coding_rate, with the rows of a matrix as tokens.
    """
    return -of_each(coding_rate, weights).sum()
