"""The check that all values of a step are finite, and what is reported where they are not."""

import collections
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
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
