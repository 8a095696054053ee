"""Steps that are not finite: judged on the device, not taken, and named."""

import collections
from collections.abc import Callable
from typing import NamedTuple

import torch
from timm.utils import ModelEmaV3
from torch import nn

from utils import World


class FiniteGuard:
    """Decides, alike on all ranks, whether a step may be taken; names the ones that may not.

    The decision is made on the device. The host learns of it later, in `settle`, and waits for it only when told to.

    Args:
        budget: skipped steps before training stops.
        world: this process.
        skipped: steps that have been skipped before.
    """

    def __init__(self, budget: int, world: World, skipped: int = 0):
        self.budget = budget
        self.world = world
        self.skipped = skipped
        self._unsettled: collections.deque[_Check] = collections.deque()

    def check(self, values: dict[str, torch.Tensor], where: str, images: Callable[[], str]) -> torch.Tensor:
        """A 0-dim boolean: whether all values are finite on all ranks.

        Args:
            values: 0-dim tensors: the loss, the gradient norm, the terms.
            where: the step, for the message.
            images: tells which images this rank's step was made of, for the message.
        """
        finite = torch.stack([*values.values()]).isfinite()
        allowed = self.world.sum((~finite.all()).float()) == 0
        flags = torch.cat([allowed[None], finite])
        copied = None
        if flags.is_cuda:
            flags = torch.empty_like(flags, device="cpu", pin_memory=True).copy_(flags, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self._unsettled.append(_Check(flags, copied, list(values), where, images))
        return allowed

    def settle(self, wait: bool = False):
        """Say which steps were skipped, as far as the device has come, or all of them.

        Raises:
            SystemExit: more than `budget` steps have been skipped.
        """
        while self._unsettled:
            check = self._unsettled[0]
            if check.copied is not None:
                if not (wait or check.copied.query()):
                    return
                check.copied.synchronize()
            self._unsettled.popleft()
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
    """What `FiniteGuard.settle` reads: [allowed, finite...] on the host once `copied` has happened."""

    flags: torch.Tensor
    copied: torch.cuda.Event | None
    names: list[str]
    where: str
    images: Callable[[], str]


def step_if(optimizer: torch.optim.Optimizer, allowed: torch.Tensor):
    """A step where `allowed`, a 0-dim boolean, holds. Only for an optimizer that is not fused does the host look."""
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.grad_scale, optimizer.found_inf = None, (~allowed).float()  # as torch.amp.GradScaler tells it
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
    elif allowed:
        optimizer.step()


def update_if(model_ema: ModelEmaV3, model: nn.Module, allowed: torch.Tensor):
    """A step of the average where `allowed`, a 0-dim boolean, holds; on a GPU without the host looking."""
    if not allowed.is_cuda or model_ema.device is not None:
        if allowed:
            model_ema.update(model)
    else:
        update_by(model_ema, model, (1 - model_ema.decay) * allowed)


@torch.no_grad()
def update_by(model_ema: ModelEmaV3, model: nn.Module, share: torch.Tensor):
    """Move the average by a share, a 0-dim tensor, of its way to the model; buffers of integers are copied."""
    pairs = [*zip(model_ema.module.state_dict().values(), model.state_dict().values(), strict=True)]
    averages, currents = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)
    ways = torch._foreach_sub(currents, averages)
    torch._foreach_mul_(ways, share)
    torch._foreach_add_(averages, ways)
    for average, current in pairs:
        if not average.is_floating_point():
            average.copy_(current)
