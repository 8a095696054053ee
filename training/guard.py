"""The end of a training step: gradients, the check that everything is finite, optimizer and average."""

import collections
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from timm.utils import ModelEmaV3
from torch import nn

from training.background import first_non_finite
from utils import World

ADVICE = "lower --lr or the coefficient of the term, set --clip-grad, or use --amp bf16 or off"
FRACTION = "_share"  # ends the name of a component's or term's fraction of the loss
SKIPPED = "skipped_steps.txt"


class FiniteGuard:
    """Decides, the same on all ranks, whether a step may be taken, and reports the steps that were skipped.

    The decision is made on the device. On a GPU the host reads it `LAG` steps later: by then the device has made it, as
    its queue holds fewer steps than that, and all ranks read the same decisions at the same step.

    Args:
        budget: skipped steps before training stops.
        world: this process.
        model: whose weights are the first suspects; None = they are not looked at.
        skipped: steps that have been skipped before.
        images: returns the images of this rank's step, for messages.
        report: called with a line of the console on the rank that reports it.
        folder: the run folder, whose `SKIPPED` gets the images; None = they are in the line.
    """

    LAG = 20

    def __init__(
        self,
        budget: int,
        world: World,
        model: nn.Module | None = None,
        skipped: int = 0,
        images: Callable[[int], str] = lambda step: "",
        report: Callable[[str], None] = print,
        folder: str | None = None,
    ):
        self.budget, self.world, self.model, self.skipped = budget, world, model, skipped
        self.images, self.report, self.folder = images, report, folder
        self.cause = ""  # of the last skipped step
        self._pending: collections.deque[_Check] = collections.deque()

    def check(self, names: Sequence[str], values: torch.Tensor, epoch: int, step: int) -> torch.Tensor:
        """A 0-dim boolean: whether all values are finite on all ranks.

        Args:
            names: of the values, see `not_finite`; those of fractions of the loss may have any value.
            values: [n].
            epoch, step: for the message.
        """
        num_checked = sum(not name.endswith(FRACTION) for name in names)  # these come first
        allowed = self.world.sum((~values[:num_checked].isfinite().all()).float()) == 0
        numbers = torch.cat([allowed[None], values])
        copied = None
        if numbers.is_cuda:
            numbers = torch.empty_like(numbers, device="cpu", pin_memory=True).copy_(numbers, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self._pending.append(_Check(numbers, copied, names, epoch, step))
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
            allowed, *values = check.numbers.tolist()
            if allowed:
                continue
            self.skipped += 1
            found = not_finite(dict(zip(check.names, values, strict=True)))
            self.cause = "the cause is on another rank"
            if found:
                if self.model is not None and (tensor := first_non_finite(self.model.state_dict())):
                    found = [f"weights ({tensor})", *found]
                self.cause = f"the first quantity that was not finite: {found[0]}"
                self._report(check, found)
            if self.skipped > self.budget:
                raise SystemExit(
                    f"error: {self.skipped} steps were not finite, more than --max-nonfinite-steps {self.budget}; "
                    f"{self.cause}; {ADVICE}"
                )

    def require_step(self, stats: dict, epoch: int, is_last: bool):
        """Refuse an epoch in which no step was taken; fp16 may overflow in all of its steps, but not in the last epoch.

        Args:
            stats: of the epoch, from `engine.train_one_epoch`.

        Raises:
            SystemExit: on all ranks.
        """
        if "loss" in stats or not (stats["skipped_steps"] or is_last):
            return
        cause = self.cause if stats["skipped_steps"] else "fp16 overflowed in all of them"
        raise SystemExit(f"error: no step of epoch {epoch} was taken; {cause}; {ADVICE}")

    def _report(self, check: "_Check", found: list[str]):
        line = f"epoch {check.epoch} step {check.step}: step skipped, not finite on rank {self.world.rank}: "
        images, then = self.images(check.step), f" (then {', '.join(found[1:])})" if found[1:] else ""
        where = images
        if self.folder:
            try:
                with open(Path(self.folder, SKIPPED), "a") as file:
                    file.write(f"{line}{', '.join(found)}; {images}\n")
                where = f"images: see {SKIPPED}"
            except OSError:  # the console gets them
                pass
        self.report(f"{line}{found[0]}{then}; {where}")


def not_finite(values: Mapping[str, float]) -> list[str]:
    """Which values of a step are not finite, in the order in which they are computed.

    A sum or a gradient that is not finite though all of its terms are is followed by the term that is most of it.

    Args:
        values: {name: value}: "loss", "classification", its components, the terms, "grad_norm"; and with `FRACTION`
            after their names the fractions of the loss.
    """
    sums = ("classification", "loss", "grad_norm")  # and the components and terms before them
    names = [name for name in values if name not in sums and not name.endswith(FRACTION)]
    found = [name for name in (*names, *sums) if not math.isfinite(values.get(name, 0.0))]
    fractions = {name: abs(values[name + FRACTION]) for name in names if name + FRACTION in values}
    if found and found[0] in sums and fractions:
        largest = max(fractions, key=lambda name: (math.isnan(fractions[name]), fractions[name]))  # inf / inf is NaN
        first = "gradient of the loss" if found[0] == "grad_norm" else found[0]
        found[0] = f"{first} {values['loss']:.3g}, which is mostly {largest}"
    elif found and found[0] in ("cls_ce", "mixing"):
        found[0] += ", computed from the logits"
    return found


class _Check(NamedTuple):
    """What `FiniteGuard.report_pending` reads: [allowed, values...] on the host once `copied` has happened."""

    numbers: torch.Tensor
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
