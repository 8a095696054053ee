"""Means of named numbers over the steps of an epoch."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from utils import World


class Meters:
    """Running sums of named numbers, kept on their device so that adding never waits for the host."""

    def __init__(self):
        self.names: list[str] = []
        self.sums: torch.Tensor | None = None  # one vector, so that adding is a kernel or two for any number of names
        self.count: int | torch.Tensor = 0  # how many values were added
        self.of_names: int | torch.Tensor = 0  # how many of them under the present names

    def add(self, names: Sequence[str], values: torch.Tensor, counts: torch.Tensor | None = None):
        """Add values [n] to the sums of n names, where `counts`, a 0-dim boolean, is true.

        Other names than before, as in an epoch that is resumed with other terms, start new sums: no mean mixes them.
        """
        added, counted = (values.float(), 1) if counts is None else (values.float().where(counts, 0.0), counts)
        if self.names != [*names]:
            self.names, self.sums, self.of_names = [*names], None, 0
        self.sums = added if self.sums is None else self.sums + added
        self.count = self.count + counted
        self.of_names = self.of_names + counted

    def averages(self, world: World) -> dict[str, float]:
        """Means over all steps and processes; every process must call it."""
        if not self.of_names:
            return {}
        means = self._of_all(world).double().mean(dim=0) / int(self.of_names)
        return dict(zip(self.names, means.tolist(), strict=True))

    def state_dict(self, world: World) -> dict:
        """The sums of each process, so that each continues with its own, and the counts; every process must call it."""
        sums = {} if self.sums is None else dict(zip(self.names, self._of_all(world).t().tolist(), strict=True))
        return {"sums": sums, "count": int(self.count), "of_names": int(self.of_names)}

    def load_state_dict(self, state: dict, world: World):
        """Continue with the sums of this process, or with the mean over the processes if there were more or fewer."""
        self.names = [*state["sums"]]
        if state["sums"]:
            of_all = torch.tensor([*state["sums"].values()]).reshape(len(self.names), -1)
            own = of_all[:, world.rank] if of_all.shape[1] == world.size else of_all.mean(dim=1)
            self.sums = own.to(world.device)
        self.count, self.of_names = state["count"], state.get("of_names", state["count"])

    def _of_all(self, world: World) -> torch.Tensor:
        """The sums of all processes, [size, n], on the CPU."""
        sums = self.sums.new_zeros(world.size, len(self.sums))
        sums[world.rank] = self.sums
        return world.sum(sums).cpu()


@dataclass
class EpochTotals:
    """The sums of an epoch so far.

    Attributes:
        epoch: means over its steps.
        window: means since the last console line.
        images: images that all processes trained on.
        seconds: time spent training.
        waited: the part of these seconds spent waiting for the loader.
        overflows: steps that fp16's loss scale skipped, counted on the device.
        gradient_norms: of the epoch's first batch, on the main process; empty where they are not measured.
        first_step: the values of the run's first step; empty in other epochs than its.
        latest: names and values of the last step, of this process; not saved.
    """

    epoch: Meters = field(default_factory=Meters)
    window: Meters = field(default_factory=Meters)
    images: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    overflows: int | torch.Tensor = 0
    gradient_norms: dict[str, float] = field(default_factory=dict)
    first_step: dict[str, float] = field(default_factory=dict)
    latest: tuple[Sequence[str], torch.Tensor] | None = None

    def add(self, names: Sequence[str], values: torch.Tensor, taken: torch.Tensor, overflowed: torch.Tensor | int):
        """Count a step; its values [n] enter the means where it was taken, a 0-dim boolean."""
        self.epoch.add(names, values, taken)
        self.window.add(names, values, taken)
        self.overflows = self.overflows + overflowed
        self.latest = names, values

    def skipped(self, steps: int) -> int:
        """How many of the epoch's steps so far were not finite; waits for the device."""
        return steps - int(self.epoch.count) - int(self.overflows)

    def state_dict(self, world: World) -> dict:
        """Lists and numbers only, each process must call it; the same on all but the gradient norms, the main one's."""
        numbers = {"images": self.images, "seconds": self.seconds, "waited": self.waited}
        numbers |= {"overflows": int(self.overflows), "gradient_norms": dict(self.gradient_norms)}
        numbers["first_step"] = dict(self.first_step)
        return numbers | {"epoch": self.epoch.state_dict(world), "window": self.window.state_dict(world)}

    def load_state_dict(self, state: dict, world: World):
        for name, value in state.items():
            if isinstance(getattr(self, name), Meters):
                getattr(self, name).load_state_dict(value, world)
            else:
                setattr(self, name, value)
