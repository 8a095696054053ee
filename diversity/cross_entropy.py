"""The cross-entropy of every token with its own mixture of two labels."""

import torch

from . import fusible


def token_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, partner: torch.Tensor, lam: torch.Tensor, smoothing: float = 0.0
) -> torch.Tensor:
    """Cross-entropy of every token with its own mixture of two labels, without a dense target.

    logsumexp(z) - (1 - s) (lam z[labels] + (1 - lam) z[partner]) - s mean_c z, which is timm's soft-target loss on
    smoothed, mixed one-hot labels.

    Args:
        logits: [B, T, C]; computed in float32 or, when given it, float64.
        labels, partner: [B], integer classes.
        lam: [B, T], fraction of `labels` in each token's target.
        smoothing: label smoothing s, in [0, 1).

    Returns:
        [B, T], in nats.

    Source: the mixing loss of The Principle of Diversity, for one token.
    Differs: no [B, T, C] target is built; the value is the same.
    """
    with torch.autocast(device_type=logits.device.type, enabled=False):
        lam = lam.to(torch.promote_types(logits.dtype, torch.float32))
        if torch.compiler.is_compiling():
            return fusible.MixedCrossEntropy.apply(logits, labels, partner, lam, smoothing)
        classes = torch.stack((labels, partner), dim=-1)[:, None].expand(-1, logits.shape[1], -1)
        fractions = (1 - smoothing) * torch.stack((lam, 1 - lam), dim=-1)
        return _MixedCrossEntropy.apply(logits, classes, fractions, smoothing)


class _MixedCrossEntropy(torch.autograd.Function):
    """logsumexp(z) - sum_k fractions_k z[classes_k] - smoothing * mean(z), over the last axis of z.

    Computed in the precision of the fractions. Only one buffer of the size of the logits is allocated at a time: the
    exponentials in the forward pass; softmax(z) - targets, the gradient, in the backward pass. When the gradient itself
    is differentiated (create_graph), no operation is in place.
    """

    @staticmethod
    def forward(ctx, logits, classes, fractions, smoothing):
        precise = fractions.dtype
        highest = logits.amax(dim=-1, keepdim=True)
        exponentials = logits.to(precise, copy=True).sub_(highest).exp_()
        normaliser = exponentials.sum(dim=-1).log() + highest.squeeze(-1)
        del exponentials  # before the mean makes another copy of half precision
        ctx.save_for_backward(logits, classes, fractions, normaliser)
        ctx.smoothing = smoothing
        chosen = (fractions * logits.gather(-1, classes)).sum(dim=-1)
        return normaliser - chosen - smoothing * logits.mean(dim=-1, dtype=precise)

    @staticmethod
    def backward(ctx, grad):
        logits, classes, fractions, normaliser = ctx.saved_tensors
        precise = fractions.dtype
        floor = ctx.smoothing / logits.shape[-1]
        if torch.is_grad_enabled():
            difference = (logits.softmax(dim=-1, dtype=precise) - floor).scatter_add(-1, classes, -fractions)
            return (difference * grad.unsqueeze(-1)).to(logits.dtype), None, None, None
        softmax = logits.to(precise, copy=True).sub_(normaliser.unsqueeze(-1)).exp_()
        difference = softmax.sub_(floor).scatter_add_(-1, classes, -fractions)
        return difference.mul_(grad.unsqueeze(-1)).to(logits.dtype), None, None, None
