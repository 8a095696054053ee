"""Steps that are not finite: judged on the device, not taken, and named."""

import collections
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from timm.utils import ModelEmaV3
from torch import nn

from utils import World


class FiniteGuard:
    """Decides, alike on all ranks, whether a step may be taken; names the ones that may not.

    The decision is made on the device. On a GPU the host reads it `LAG` steps later: by then the device has made it, as
    its queue holds fewer steps than that, and all ranks read the same decisions at the same step.

    Args:
        budget: skipped steps before training stops.
        world: this process.
        skipped: steps that have been skipped before.
    """

    LAG = 20

    def __init__(self, budget: int, world: World, skipped: int = 0):
        self.budget = budget
        self.world = world
        self.skipped = skipped
        self._pending: collections.deque[_Check] = collections.deque()

    def check(self, names: Sequence[str], values: torch.Tensor, where: str, images: Callable[[], str]) -> torch.Tensor:
        """A 0-dim boolean: whether all values are finite on all ranks.

        Args:
            names: of the values: the loss, the terms, the gradient norm.
            values: [n].
            where: the step, for the message.
            images: tells which images this rank's step was made of, for the message.
        """
        finite = values.isfinite()
        allowed = self.world.sum((~finite.all()).float()) == 0
        flags = torch.cat([allowed[None], finite])
        copied = None
        if flags.is_cuda:
            flags = torch.empty_like(flags, device="cpu", pin_memory=True).copy_(flags, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self._pending.append(_Check(flags, copied, names, where, images))
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
                print(f"{check.where}: {what}; {check.images()}", flush=True)
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
    where: str
    images: Callable[[], str]


class GuardedUpdate:
    """The end of a training step: optimizer, buffers and average, where the step may be taken.

    Nothing waits for a GPU, but an optimizer that is not fused, and an average on the CPU.

    Args:
        model_ema: the average that follows the model, or None.
        optimizer: of the model.
    """

    def __init__(self, model: nn.Module, model_ema: ModelEmaV3 | None, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        self.buffers = [*model.buffers()]  # such as BatchNorm's running statistics, which the forward pass changes
        self.kept = [torch.empty_like(buffer) for buffer in self.buffers]
        self.model_ema = model_ema
        if model_ema is not None:
            pairs = zip(model_ema.module.state_dict().values(), model.state_dict().values(), strict=True)
            self.pairs = {True: ([], []), False: ([], [])}
            for average, current in pairs:
                averages, currents = self.pairs[average.is_floating_point()]
                averages.append(average)
                currents.append(current)

    @torch.no_grad()
    def remember_buffers(self):
        """Before the forward pass of a step."""
        if self.buffers:
            torch._foreach_copy_(self.kept, self.buffers)

    @torch.no_grad()
    def __call__(self, allowed: torch.Tensor):
        """Take the step if `allowed`, a 0-dim boolean, holds; otherwise leave weights and buffers as they were.

        The average moves at every step, as timm's and DeiT's does.
        """
        step_if(self.optimizer, allowed)
        for buffer, kept in zip(self.buffers, self.kept, strict=True):
            buffer.copy_(buffer.where(allowed, kept))
        if self.model_ema is not None:
            averages, currents = self.pairs[True]
            if averages[0].device != currents[0].device:
                currents = [current.to(averages[0].device) for current in currents]
            torch._foreach_lerp_(averages, currents, 1 - self.model_ema.decay)
            for average, current in zip(*self.pairs[False], strict=True):
                average.copy_(current)


def step_if(optimizer: torch.optim.Optimizer, allowed: torch.Tensor):
    """A step where `allowed`, a 0-dim boolean, holds. Only for an optimizer that is not fused does the host look."""
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.grad_scale, optimizer.found_inf = None, (~allowed).float()  # as torch.amp.GradScaler tells it
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
    elif allowed:
        optimizer.step()
