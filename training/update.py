"""The end of a training step: gradients, the check that everything is finite, optimizer and average."""

import torch
from timm.utils import ModelEmaV3
from torch import nn

from training.guard import FRACTION, FiniteGuard


class GuardedUpdate:
    """Backward passes and the update of a step: skipped where a value is not finite or fp16 overflows.

    The host waits for a GPU only where the optimizer is not fused or the average is on the CPU.

    Args:
        model: the stock model.
        model_ema: its average, or None.
        optimizer: of the model.
        loss_scaler: of fp16; disabled for other types.
        guard: decides whether the step may be taken.
        accum_steps: batches per step.
        clip_grad: largest gradient norm, or None.
        num_updates: steps of the run so far, for the warm-up of the average.
    """

    def __init__(
        self,
        model: nn.Module,
        model_ema: ModelEmaV3 | None,
        optimizer: torch.optim.Optimizer,
        loss_scaler: torch.amp.GradScaler,
        guard: FiniteGuard,
        accum_steps: int = 1,
        clip_grad: float | None = None,
        num_updates: int = 0,
    ):
        self.optimizer, self.loss_scaler, self.guard = optimizer, loss_scaler, guard
        self.accum_steps, self.clip_grad, self.num_updates = accum_steps, clip_grad, num_updates
        self.buffers = [*model.buffers()]  # such as BatchNorm's running statistics, which the forward pass changes
        self.saved_buffers = [torch.empty_like(buffer) for buffer in self.buffers]
        self.model_ema = model_ema
        if model_ema is not None:
            frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
            pairs = zip(model_ema.module.state_dict().values(), model.state_dict().items(), strict=True)
            self.pairs = {True: ([], []), False: ([], [])}
            for average, (name, current) in pairs:
                if name in frozen:
                    continue  # the average is the weight
                averages, currents = self.pairs[average.is_floating_point()]
                averages.append(average)
                currents.append(current)
        self.start()

    def start(self):
        """Begin a step: no gradients, no batches."""
        self.optimizer.zero_grad()
        self.terms: list[dict[str, torch.Tensor]] = []  # of the step's batches

    @torch.no_grad()
    def before_forward(self):
        """Save the buffers before the first forward pass of a step."""
        if self.buffers and not self.terms:
            torch._foreach_copy_(self.saved_buffers, self.buffers)

    def backward(self, loss: torch.Tensor, terms: dict[str, torch.Tensor]):
        """Add a batch's gradients to the step's; `terms` are its loss, the raw values and their fractions of it."""
        self.loss_scaler.scale(loss / self.accum_steps).backward()
        self.terms.append(terms)

    def step(self, epoch: int, step: int) -> tuple[list[str], torch.Tensor, torch.Tensor, torch.Tensor | int]:
        """Clip, check and update, and begin the next step.

        Returns:
            names [n] and values [n]: `terms`, averaged over the batches, and "grad_norm" before clipping.
            taken: 0-dim boolean.
            overflowed: whether fp16's loss scale skipped the step to adjust itself, which is no fault.

        Raises:
            SystemExit: too many steps were not finite.
        """
        self.loss_scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        grad_norm = nn.utils.get_total_norm([p.grad for p in parameters])
        if self.clip_grad is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.clip_grad, grad_norm)
        names = [*self.terms[0]]
        num_raw = sum(not name.endswith(FRACTION) for name in names)  # the raw values come first
        means = torch.stack([torch.stack([*terms.values()]) for terms in self.terms]).mean(dim=0)
        names.insert(num_raw, "grad_norm")
        values = torch.cat([means[:num_raw], grad_norm[None], means[num_raw:]])
        checked, overflowed = values, 0
        if self.loss_scaler.is_enabled():  # an overflow is no fault while the scale can still fall
            can_fall = self.loss_scaler.scale(torch.ones_like(grad_norm)) >= 1
            checked = torch.cat([means[:num_raw], grad_norm.where(~can_fall, 0)[None], means[num_raw:]])
        taken = self.guard.check(names, checked, epoch, step)
        if self.loss_scaler.is_enabled():
            overflowed = taken & ~grad_norm.isfinite()
            taken = taken & ~overflowed
        self.apply(taken)
        self.loss_scaler.update()
        self.start()
        self.guard.report_pending()
        return names, values, taken, overflowed

    @torch.no_grad()
    def apply(self, allowed: torch.Tensor):
        """Update the weights if `allowed`, a 0-dim boolean, is true; otherwise restore the buffers.

        The average moves at every step, as timm's and DeiT's does.
        """
        step_if(self.optimizer, allowed)
        for buffer, saved in zip(self.buffers, self.saved_buffers, strict=True):
            buffer.copy_(buffer.where(allowed, saved))
        self.num_updates += 1
        if self.model_ema is not None:
            decay = self.model_ema.decay
            if self.model_ema.use_warmup:
                decay = self.model_ema.get_decay(self.num_updates)
            averages, currents = self.pairs[True]
            if averages[0].device != currents[0].device:
                currents = [current.to(averages[0].device) for current in currents]
            torch._foreach_lerp_(averages, currents, 1 - decay)
            for average, current in zip(*self.pairs[False], strict=True):
                average.copy_(current)


def step_if(optimizer: torch.optim.Optimizer, allowed: torch.Tensor):
    """Take an optimizer step if `allowed`, a 0-dim boolean, is true; an optimizer that is not fused waits for it."""
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.grad_scale, optimizer.found_inf = None, (~allowed).float()  # the interface of torch.amp.GradScaler
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
    elif allowed:
        optimizer.step()
