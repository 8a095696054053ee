"""gradient_norms: how strongly each summand of the loss moves the weights, measured without changing the training."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

if TYPE_CHECKING:
    from .loss import DiverseLoss

SCALES = (2.0**16, 2.0**8, 1.0)
"""What a value is multiplied by before its backward pass, so that float16 does not flush small gradients to 0."""


def gradient_norms(loss_fn: "DiverseLoss", images: torch.Tensor, labels: torch.Tensor, draws=None):
    """The norm, over all parameters, of the gradient of each summand of a batch's loss.

    A term's fraction of the loss does not say whether the term changes anything; the norm of its gradient beside that
    of "classification" does. Coefficients and the factor of a schedule are included. This takes one forward pass and a
    backward pass for each summand, in eager mode and with the memory of such a step. Weights, gradients, buffers and
    random states are afterwards as before, so a training step that follows is the same with or without the call.

    Args:
        loss_fn: in train mode; not the DistributedDataParallel around it. Call it under the autocast of the training.
        images, labels, draws: as for `DiverseLoss.forward`.

    Returns:
        {name: 0-dim tensor >= 0}: "classification", the loss without the terms, then its components "cls_ce", "mixing"
        and "distillation" with the weights that they have in it, and every active term times its coefficient. In the
        units of the loss per unit of a weight; 0 where no gradient arises, inf or NaN where it is not finite.

    Raises:
        ValueError: `loss_fn` is in eval mode, or the loss has no gradient at all.

    Source: none.
    Differs: none.
    """
    if not loss_fn.training:
        raise ValueError("gradient norms are those of a training step; call train() first")
    parameters = [parameter for parameter in loss_fn.model.parameters() if parameter.requires_grad]
    with _unchanged(loss_fn, images.device), torch.enable_grad():
        samples, target = loss_fn.mixup(images, labels, loss_fn.draw(images) if draws is None else draws)
        classification, _, weighted = loss_fn.objective.components(loss_fn.tapped(samples), target, samples)
        if not classification.requires_grad:
            raise ValueError("the loss has no gradient: are all parameters frozen, or is this inference mode?")
        with torch.autocast(images.device.type, enabled=False):
            values = {"classification": classification} | weighted
            return {name: _norm(value, parameters) for name, value in values.items()}


def _norm(value: torch.Tensor, parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    """The norm of the gradient of a 0-dim value, whose graph stays."""
    norm = torch.zeros_like(value.detach())
    if not value.requires_grad:
        return norm
    for scale in SCALES:
        grads = torch.autograd.grad(value * scale, parameters, retain_graph=True, allow_unused=True)
        norm = nn.utils.get_total_norm([grad for grad in grads if grad is not None]) / scale
        if norm.isfinite():
            break
    return norm


@contextlib.contextmanager
def _unchanged(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Restore the buffers of a module, and the random states of numpy and torch, also that of the device."""
    buffers = [*module.buffers()]
    saved, of_numpy = [buffer.clone() for buffer in buffers], np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        np.random.set_state(of_numpy)
        with torch.no_grad():
            for buffer, value in zip(buffers, saved, strict=True):
                buffer.copy_(value)
