"""The mathematics that the terms have in common, at a cost linear in the number of items where that is possible.

"Items" are the vectors that a term makes diverse: tokens, flattened attention maps or weight rows, as [..., items, D].
"""

import torch
from torch.nn import functional as F

from . import fusible

GRAM_JITTER = 1e-6
"""Added to the diagonal of the kernel matrix of `log_gram_determinant`, so that identical items leave it definite."""


def precise(tensor: torch.Tensor) -> torch.Tensor:
    """float64 as it is, and everything else as float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def unit(items: torch.Tensor) -> torch.Tensor:
    """x / max(|x|, 1e-8) over the last axis: unit vectors, and zero vectors left at zero."""
    return F.normalize(items, dim=-1, eps=fusible.EPS)


def mean_unit(items: torch.Tensor, num_prefix: int = 0) -> torch.Tensor:
    """Mean of the unit items, [..., items, D] -> [..., D], without a normalised copy of them.

    The first `num_prefix` items are left out.
    """
    if torch.compiler.is_compiling():  # a product would need the items in memory; a sum compiles into what makes them
        inverse = fusible.inverse_length(items, num_prefix)
        return (inverse * items).sum(dim=-2) / (items.shape[-2] - num_prefix)
    items = items[..., num_prefix:, :]
    return (fusible.inverse_length(items).mT @ items).squeeze(-2) / items.shape[-2]


def mean_cosine(items: torch.Tensor, num_prefix: int = 0) -> torch.Tensor:
    """Signed cosine averaged over all ordered pairs of items, an item with itself included.

    Equal to the squared norm of the mean unit item, so the pairs are never formed.

    Args:
        items: [..., items, D].
        num_prefix: number of items at the front to leave out.

    Returns:
        [...], in [0, 1]: 1 for parallel items, 1/items for orthogonal ones.
    """
    return mean_unit(items, num_prefix).square().sum(dim=-1)


def mean_map_cosine(maps: torch.Tensor) -> torch.Tensor:
    """`mean_cosine` of attention maps, [..., H, N, N] -> [...], the maps of the heads being the items."""
    if torch.compiler.is_compiling():
        return fusible.MeanMapCosine.apply(maps)
    return mean_cosine(maps.flatten(start_dim=-2))


def mean_cross_cosine(first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Signed cosine averaged over all pairs of an item of `first` and an item of `last`.

    Equal to the inner product of the two mean unit items, so the pairs are never formed.

    Args:
        first, last: [..., items, D], leading axes that broadcast.

    Returns:
        [...], in [-1, 1].
    """
    return (mean_unit(first) * mean_unit(last)).sum(dim=-1)


def cosines(first: torch.Tensor, last: torch.Tensor | None = None) -> torch.Tensor:
    """Cosine of every pair, [..., items, items]; among the items of `first` itself when `last` is None."""
    first = unit(first)
    return first @ (first if last is None else unit(last)).mT


def without_diagonal(mean: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
    """A mean cosine over all pairs of items as the mean over pairs of two different items.

    Args:
        mean: [...], signed or absolute cosines averaged over all ordered pairs of `items`.
        items: [..., items, D] with items >= 2.

    Raises:
        ValueError: there is only one item, and so no pair.
    """
    count = items.shape[-2]
    require_pairs(count)
    lengths = torch.linalg.vector_norm(items.detach(), dim=-1)
    with_itself = (lengths / lengths.clamp_min(1e-8)).square().mean(dim=-1)  # 1, and 0 for an item of zeros
    return (count * mean - with_itself) / (count - 1)


def contrast(first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Contrastive loss that ties item i of `last` to item i of `first` and pushes it from the other items.

    softplus(neg_i - pos_i), pos_i = <first_i, last_i>, neg_i = mean over j != i of <first_i, last_j>. The sum over j
    needs only the sum of all items of `last`. Give unit items to contrast cosines.

    Args:
        first, last: [..., items, D] with items >= 2, leading axes that broadcast.

    Returns:
        [..., items], positive; log 2 where an item is as close to the others as to its own.

    Raises:
        ValueError: there is only one item, so there is nothing to push from.
    """
    items = first.shape[-2]
    require_pairs(items)
    positive = (first * last).sum(dim=-1)
    to_all = (first @ last.sum(dim=-2).unsqueeze(-1)).squeeze(-1)
    negative = (to_all - positive) / (items - 1)
    return F.softplus(negative - positive)


def cosine_contrast(first: torch.Tensor, last: torch.Tensor, num_prefix: int = 0) -> torch.Tensor:
    """`contrast` of the unit items of both, without the first `num_prefix` items."""
    if torch.compiler.is_compiling():
        require_pairs(first.shape[-2] - num_prefix)
        return fusible.CosineContrast.apply(first, last, num_prefix)[..., num_prefix:]
    return contrast(unit(first[..., num_prefix:, :]), unit(last[..., num_prefix:, :]))


def orthogonality_gap(items: torch.Tensor) -> torch.Tensor:
    """Squared Frobenius norm of (X X^T - I) for items X as they are, computed on the smaller of X X^T and X^T X.

    Args:
        items: [..., items, D].

    Returns:
        [...], >= 0; 0 for orthonormal items.
    """
    surplus = items.shape[-2] - items.shape[-1]
    if surplus > 0:
        items = items.mT
    gram = items @ items.mT
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return (gram - identity).square().sum(dim=(-2, -1)) + max(surplus, 0)


def separation(items: torch.Tensor, collapse_aware: bool = False) -> torch.Tensor:
    """Squared distance 2 - 2 cos of the two unit items that are closest to each other.

    Only this pair has a gradient, so all pairs are compared without one.

    Args:
        items: [..., items, D] with items >= 2.
        collapse_aware: take the distance, not its square. The gradient of the square vanishes as the pair meets; that
            of the distance keeps its length, and at an exact meeting pulls the two apart along the coordinate axis
            farthest from their common direction.

    Returns:
        [...], in [0, 4], or [0, 2] when collapse-aware; 0 when two items are parallel.

    Raises:
        ValueError: there is only one item.
    """
    count = items.shape[-2]
    closest = distances_to_others(items).flatten(start_dim=-2).argmin(dim=-1)
    pair = torch.stack((closest // count, closest % count), dim=-1)
    one, other = unit(torch.take_along_dim(items, pair.unsqueeze(-1), dim=-2)).unbind(dim=-2)
    return distance(one, other) if collapse_aware else (one - other).square().sum(dim=-1)


@torch.no_grad()
def distances_to_others(items: torch.Tensor) -> torch.Tensor:
    """Squared distances of every two unit items, without a gradient: [..., items, items], infinite on the diagonal.

    Raises:
        ValueError: there is only one item.
    """
    require_pairs(items.shape[-2])
    centred = unit(items)
    centred = centred - centred.mean(dim=-2, keepdim=True)  # otherwise rounding hides items that nearly coincide
    squares = centred.square().sum(dim=-1)
    distances = squares.unsqueeze(-1) + squares.unsqueeze(-2) - 2 * centred @ centred.mT
    distances.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
    return distances


def distance(one: torch.Tensor, other: torch.Tensor, side: torch.Tensor | float = 1.0) -> torch.Tensor:
    """Euclidean distance of two unit items, [..., D] -> [...], whose gradient has length 1 also where they coincide.

    At an exact meeting the gradient pulls the two apart along the coordinate axis farthest from their common direction.
    Two items of zeros have no direction, and no gradient.

    Args:
        one, other: [..., D].
        side: 1 or -1, [...]: the side of the other to which `one` is pulled there. Where a pair is compared twice, once
            from each end, it needs both, or the two pulls cancel.
    """
    difference = one - other
    with torch.no_grad():
        length = torch.linalg.vector_norm(difference, dim=-1, keepdim=True)
        away = torch.arange(one.shape[-1], device=one.device) == one.abs().argmin(dim=-1, keepdim=True)
        away = away * torch.linalg.vector_norm(one, dim=-1, keepdim=True)  # 1, and 0 for an item of zeros
        away = away * torch.as_tensor(side, dtype=one.dtype, device=one.device).unsqueeze(-1)
        direction = torch.where(length > 0, difference / length, away)
    return (direction * difference).sum(dim=-1)


def log_gram_determinant(items: torch.Tensor) -> torch.Tensor:
    """logdet(exp(-(2 - 2 cos)) + 1e-6 I), the log-volume that the items span under a Gaussian kernel.

    Computed in float64, since identical items leave the matrix with a condition number of items x 10^6.

    Args:
        items: [..., items, D].

    Returns:
        [...], <= items x log(1 + 1e-6), in the dtype of `items`; lowest for parallel items.
    """
    similarity = cosines(items.double())
    kernel = torch.exp(2 * similarity - 2)
    jitter = GRAM_JITTER * torch.eye(items.shape[-2], dtype=kernel.dtype, device=kernel.device)
    return torch.logdet(kernel + jitter).to(items.dtype)


def require_pairs(items: int):
    if items < 2:
        raise ValueError(f"at least two items are needed to compare; got {items}")
