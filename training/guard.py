"""The end of a training step: gradients, the check that everything is finite, optimizer and average."""

import collections
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from timm.utils import ModelEmaV3
from torch import nn

from utils import World


class FiniteGuard:
    """Decides, the same on all ranks, whether a step may be taken, and reports the steps that were skipped.

    The decision is made on the device. On a GPU the host reads it `LAG` steps later: by then the device has made it, as
    its queue holds fewer steps than that, and all ranks read the same decisions at the same step.

    Args:
        budget: skipped steps before training stops.
        world: this process.
        skipped: steps that have been skipped before.
        images: returns the images of this rank's step, for messages.
    """

    LAG = 20

    def __init__(self, budget: int, world: World, skipped: int = 0, images: Callable[[int], str] = lambda step: ""):
        self.budget = budget
        self.world = world
        self.skipped = skipped
        self.images = images
        self._pending: collections.deque[_Check] = collections.deque()

    def check(self, names: Sequence[str], values: torch.Tensor, epoch: int, step: int) -> torch.Tensor:
        """A 0-dim boolean: whether all values are finite on all ranks.

        Args:
            names: of the values: the loss, the terms, the gradient norm.
            values: [n].
            epoch, step: for the message.
        """
        finite = values.isfinite()
        allowed = self.world.sum((~finite.all()).float()) == 0
        flags = torch.cat([allowed[None], finite])
        copied = None
        if flags.is_cuda:
            flags = torch.empty_like(flags, device="cpu", pin_memory=True).copy_(flags, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self._pending.append(_Check(flags, copied, names, epoch, step))
        return allowed

    def report_pending(self, wait: bool = False):
        """Report which steps were skipped: up to `LAG` steps ago on a GPU, and all of them elsewhere or with `wait`.

        Raises:
            SystemExit: more than `budget` steps have been skipped.
        """
        while self._pending and (wait or self._pending[0].copied is None or len(self._pending) > self.LAG):
            check = self._pending.popleft()
            if check.copied is not None:
                check.copied.synchronize()
            allowed, *finite = check.flags.tolist()
            if allowed:
                continue
            self.skipped += 1
            names = [name for name, ok in zip(check.names, finite, strict=True) if not ok]
            if names:
                what = f"step skipped, not finite on rank {self.world.rank}: {', '.join(names)}"
                print(f"epoch {check.epoch} step {check.step}: {what}; {self.images(check.step)}", flush=True)
            if self.skipped > self.budget:
                raise SystemExit(
                    f"error: {self.skipped} steps were not finite, more than --max-nonfinite-steps {self.budget}; "
                    "lower --lr, set --clip-grad or use --amp bf16 or off"
                )


class _Check(NamedTuple):
    """What `FiniteGuard.report_pending` reads: [allowed, finite...] on the host once `copied` has happened."""

    flags: torch.Tensor
    copied: torch.cuda.Event | None
    names: Sequence[str]
    epoch: int
    step: int


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
    ):
        self.optimizer, self.loss_scaler, self.guard = optimizer, loss_scaler, guard
        self.accum_steps, self.clip_grad = accum_steps, clip_grad
        self.buffers = [*model.buffers()]  # such as BatchNorm's running statistics, which the forward pass changes
        self.saved_buffers = [torch.empty_like(buffer) for buffer in self.buffers]
        self.model_ema = model_ema
        if model_ema is not None:
            pairs = zip(model_ema.module.state_dict().values(), model.state_dict().values(), strict=True)
            self.pairs = {True: ([], []), False: ([], [])}
            for average, current in pairs:
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
        num_checked = sum(not name.endswith("_share") for name in names)  # the raw values come first
        values = torch.stack([torch.stack([*terms.values()]) for terms in self.terms]).mean(dim=0)
        names.insert(num_checked, "grad_norm")
        values = torch.cat([values[:num_checked], grad_norm[None], values[num_checked:]])
        checked, overflowed = values[: num_checked + 1], 0
        if self.loss_scaler.is_enabled():  # an overflow is no fault while the scale can still fall
            can_fall = self.loss_scaler.scale(torch.ones_like(grad_norm)) >= 1
            checked = torch.cat([values[:num_checked], grad_norm.where(~can_fall, 0)[None]])
        taken = self.guard.check(names[: num_checked + 1], checked, epoch, step)
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
        if self.model_ema is not None:
            averages, currents = self.pairs[True]
            if averages[0].device != currents[0].device:
                currents = [current.to(averages[0].device) for current in currents]
            torch._foreach_lerp_(averages, currents, 1 - self.model_ema.decay)
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
