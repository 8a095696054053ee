"""Forms of the losses for torch.compile: pointwise operations and sums, which compile into few passes over the inputs.

Eager mode has other forms, which run fewer operations. Each backward pass here is written out, so that it repeats cheap
work instead of storing tensors as large as the inputs. None has a second derivative.
"""

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

EPS = 1e-8
"""The shortest length by which `similarity.unit` divides. A shorter item is divided by it, as by a constant."""


def inverse_length(items: torch.Tensor, num_prefix: int = 0) -> torch.Tensor:
    """1 / max(|x|, 1e-8) over the last axis: [..., items, D] -> [..., items, 1]; 0 for the first `num_prefix` items.

    A vision transformer's own passes cover its prefix tokens too. With zeros in place of a slice, these passes match
    them and fuse with them.
    """
    inverse = torch.linalg.vector_norm(items, dim=-1, keepdim=True).clamp_min(EPS).reciprocal()
    if num_prefix == 0:
        return inverse
    is_kept = torch.arange(items.shape[-2], device=items.device) >= num_prefix
    return torch.where(is_kept.unsqueeze(-1), inverse, 0)


class MeanMapCosine(torch.autograd.Function):
    """Mean cosine between all pairs of heads' maps: [..., H, N, N] -> [...].

    The maps are not stored where softmax makes them: each pass computes them again from the scores. The forward pass
    also computes the inner product of each unit map with their mean, which saves the backward pass a pass.
    """

    @staticmethod
    def forward(ctx, maps):
        lengths = torch.linalg.vector_norm(torch.linalg.vector_norm(maps, dim=-1), dim=-1)  # by rows, as softmax
        inverse = lengths.clamp_min(EPS).reciprocal()
        units = (maps * inverse[..., None, None]).unbind(dim=-3)
        mean = sum(units) / len(units)
        towards_mean = torch.stack([(one * mean).sum(dim=(-2, -1)) for one in units], dim=-1)
        ctx.save_for_backward(maps, lengths, mean, towards_mean)
        return towards_mean.mean(dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        maps, lengths, mean, towards_mean = ctx.saved_tensors
        inverse = lengths.clamp_min(EPS).reciprocal()
        along = torch.where(lengths >= EPS, towards_mean * inverse, 0)
        scale = 2 / maps.shape[-3] * inverse * grad.unsqueeze(-1)
        return scale[..., None, None] * (mean.unsqueeze(-3) - along[..., None, None] * maps)


class CosineContrast(torch.autograd.Function):
    """`similarity.contrast` of the unit vectors of both items: two of [..., items, D] -> [..., items].

    The first `num_prefix` items are left out: what is returned for them has no meaning and no gradient.
    """

    @staticmethod
    def forward(ctx, first, last, num_prefix):
        first_inverse, last_inverse = inverse_length(first, num_prefix), inverse_length(last, num_prefix)
        total = (last * last_inverse).sum(dim=-2, keepdim=True)
        positive = (first * last).sum(dim=-1, keepdim=True) * first_inverse * last_inverse
        to_all = (first * total).sum(dim=-1, keepdim=True) * first_inverse
        ctx.num_others = first.shape[-2] - num_prefix - 1
        difference = (to_all - positive) / ctx.num_others - positive
        ctx.save_for_backward(first, last, first_inverse, last_inverse, total, positive, to_all, difference)
        return F.softplus(difference).squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        first, last, first_inverse, last_inverse, total, positive, to_all, difference = ctx.saved_tensors
        slope = grad.unsqueeze(-1) * difference.sigmoid()
        to_all_grad = slope / ctx.num_others
        positive_grad = -slope - to_all_grad
        total_grad = (to_all_grad * first_inverse * first).sum(dim=-2, keepdim=True)
        towards_total = (total_grad * last).sum(dim=-1, keepdim=True) * last_inverse
        # A unit vector does not change as its item grows: this much of each gradient lies along the item.
        first_along = (positive_grad * positive + to_all_grad * to_all) * first_inverse.square()
        last_along = (positive_grad * positive + towards_total) * last_inverse.square()
        first_along = torch.where(first_inverse < 1 / EPS, first_along, 0)
        last_along = torch.where(last_inverse < 1 / EPS, last_along, 0)
        both = positive_grad * first_inverse * last_inverse
        first_grad = both * last + to_all_grad * first_inverse * total - first_along * first
        last_grad = both * first + total_grad * last_inverse - last_along * last
        return first_grad.sum_to_size(first.shape), last_grad.sum_to_size(last.shape), None


class MixedCrossEntropy(torch.autograd.Function):
    """`cross_entropy.token_cross_entropy`, computed in the precision of `lam`.

    It reads the logits once in each pass and writes their gradient once, without gather and scatter.
    """

    @staticmethod
    def forward(ctx, logits, labels, partner, lam, smoothing):
        precise = logits.to(lam.dtype)
        highest = precise.amax(dim=-1)
        normaliser = (precise - highest.unsqueeze(-1)).exp().sum(dim=-1).log() + highest
        ctx.save_for_backward(logits, labels, partner, lam, normaliser)
        ctx.smoothing = smoothing
        of_labels = torch.where(_is_class(labels, logits), precise, 0).sum(dim=-1)
        of_partner = torch.where(_is_class(partner, logits), precise, 0).sum(dim=-1)
        chosen = (1 - smoothing) * (lam * of_labels + (1 - lam) * of_partner)
        return normaliser - chosen - smoothing * precise.mean(dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        logits, labels, partner, lam, normaliser = ctx.saved_tensors
        lam = (1 - ctx.smoothing) * lam.unsqueeze(-1)
        difference = (logits.to(lam.dtype) - normaliser.unsqueeze(-1)).exp() - ctx.smoothing / logits.shape[-1]
        difference = difference - torch.where(_is_class(labels, logits), lam, 0)
        difference = difference - torch.where(_is_class(partner, logits), 1 - ctx.smoothing - lam, 0)
        return (difference * grad.unsqueeze(-1)).to(logits.dtype), None, None, None, None


def _is_class(labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Labels [B] and logits [B, T, C] -> [B, 1, C], True at the label."""
    return torch.arange(logits.shape[-1], device=logits.device) == labels[:, None, None]
