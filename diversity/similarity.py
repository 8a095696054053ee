"""The mathematics the terms share, in the form whose cost is linear in the number of items where one exists.

"Items" are the vectors that are to become diverse: tokens, flattened attention maps or weight rows, as [..., items, D].
"""

import torch
from torch.nn import functional as F


def unit(items: torch.Tensor) -> torch.Tensor:
    """x / max(|x|, 1e-8) over the last axis: unit vectors, and zero vectors left at zero."""
    return F.normalize(items, dim=-1, eps=1e-8)


def mean_cosine(items: torch.Tensor) -> torch.Tensor:
    """Signed cosine averaged over all ordered pairs of items, an item with itself included.

    Equal to the squared norm of the mean unit item, so the pairs are never formed.

    Args:
        items: [..., items, D].

    Returns:
        [...], in [0, 1]: 1 for parallel items, 1/items for orthogonal ones.
    """
    lengths = torch.linalg.vector_norm(items, dim=-1, keepdim=True).clamp_min(1e-8)
    mean_unit = (lengths.reciprocal().mT @ items).squeeze(-2) / items.shape[-2]  # no normalised copy of the items
    return mean_unit.square().sum(dim=-1)


def contrast(first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Contrastive loss that ties item i of `last` to item i of `first` and pushes it from the other items.

    softplus(neg_i - pos_i), pos_i = cos(first_i, last_i), neg_i = mean over j != i of cos(first_i, last_j). The sum
    over j needs only the sum of all unit items of `last`.

    Args:
        first, last: [..., items, D] with items >= 2.

    Returns:
        [..., items], in [softplus(-2), softplus(2)]; softplus(0) where an item is as close to the others as to its own.

    Raises:
        ValueError: there is only one item, so there is nothing to push from.
    """
    items = first.shape[-2]
    if items < 2:
        raise ValueError(f"a contrast needs at least two items; got {items}")
    first, last = unit(first), unit(last)
    positive = (first * last).sum(dim=-1)
    to_all = (first @ last.sum(dim=-2).unsqueeze(-1)).squeeze(-1)
    negative = (to_all - positive) / (items - 1)
    return F.softplus(negative - positive)


def spectral_spread(weights: torch.Tensor, probes: torch.Tensor) -> torch.Tensor:
    """Estimate of (largest - smallest) eigenvalue of W W^T, from one power step each.

    With G = W W^T and a start vector x: y = G x, largest = <G y, y> / <y, y>. The same step on G - largest * I, from a
    second start vector, finds the eigenvalue farthest from `largest`, which is smallest - largest. G itself is never
    formed, and all matrices and both start vectors share each pass over W.

    Args:
        weights: [M, Dout, Din].
        probes: [2, M, Dout, 1], the start vectors for the largest and for the smallest eigenvalue.

    Returns:
        [M], normally negative: smallest - largest. Its size never exceeds the exact spread; one step underestimates it.
    """

    start = probes.squeeze(-1).transpose(0, 1)  # [M, 2, Dout]
    pushed = _GramProduct.apply(weights, start)
    towards_largest, second = pushed[:, :1], pushed[:, 1:]
    largest = _rayleigh_quotient(towards_largest, _GramProduct.apply(weights, towards_largest))
    shifted = second - largest * start[:, 1:]
    farthest = _rayleigh_quotient(shifted, _GramProduct.apply(weights, shifted) - largest * shifted)
    return farthest[:, 0, 0]


class _GramProduct(torch.autograd.Function):
    """x W W^T for rows x [M, k, Dout] and W [M, Dout, Din].

    Autograd alone would form the gradient of W twice, once transposed, and add the two; this forms it in one product.
    """

    @staticmethod
    def forward(ctx, weights, x):
        inner = x @ weights
        ctx.save_for_backward(weights, x, inner)
        return inner @ weights.mT

    @staticmethod
    def backward(ctx, grad):
        weights, x, inner = ctx.saved_tensors
        grad_inner = grad @ weights
        grad_weights = torch.cat((grad, x), dim=1).mT @ torch.cat((inner, grad_inner), dim=1)
        return grad_weights, grad_inner @ weights.mT if ctx.needs_input_grad[1] else None


def _rayleigh_quotient(x: torch.Tensor, gram_x: torch.Tensor) -> torch.Tensor:
    """<G x, x> / <x, x> for rows [M, 1, D], as [M, 1, 1]; 0 where x is 0."""
    norm = x.square().sum(dim=-1, keepdim=True)
    return (gram_x * x).sum(dim=-1, keepdim=True) / norm.clamp_min(torch.finfo(norm.dtype).tiny)
