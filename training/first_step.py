"""What each term is at the first step of a run, before any update: a table on the console and a part of log.txt."""

import math
from collections.abc import Mapping

import torch

from diversity import DiversityObjective
from training.guard import FRACTION
from training.meters import EpochTotals
from utils import World


class FirstStep:
    """Reports the values of the first step of a run: those of the weights that the run starts from.

    They are the values of the step's own forward pass, in train mode on augmented and mixed images: means over the
    images of all processes and accumulated batches, also where the step was skipped because a value was not finite or
    fp16 overflowed. Nothing else is computed, so the training is the same with it.

    Args:
        objective: of the run.
        is_pending: whether this process takes the first step of the run; a process that resumes one does not.
    """

    def __init__(self, objective: DiversityObjective, is_pending: bool):
        self.objective, self.is_pending = objective, is_pending

    def report(self, totals: EpochTotals, world: World) -> str:
        """Keep the values of the step that `totals` were given last, and return their table; every process calls it."""
        self.is_pending = False
        names, values = totals.latest
        means = world.sum(values.to(torch.float64, copy=True)) / world.size
        values = dict(zip(names, means.tolist(), strict=True))
        totals.first_step = {name: value for name, value in values.items() if math.isfinite(value)}  # JSON has no other
        return self.table(values)

    def table(self, values: Mapping[str, float]) -> str:
        """One line for each component of the loss and each term: coefficient, value, and fraction of the loss.

        Empty if the loss is the cross-entropy of the class token alone.
        """
        names, coefs = self.objective.component_names, self.objective.coefs
        if len(names) == 1:
            return ""
        lines = [
            f"at step 0, before any update: loss {values['loss']:.4g}",
            f"{'term':<28}{'coefficient':>12}{'value':>12}{'of the loss':>14}",
        ]
        for name in names:
            coef = f"{coefs[name]:g}" if name in coefs else ""
            lines.append(f"{name:<28}{coef:>12}{values[name]:>12.4g}{100 * values[name + FRACTION]:>12.2f} %")
        factor = values.get("diversity_factor", 1.0)
        if coefs and factor != 1:
            lines.append(f"the coefficients are multiplied by {factor:g} in this epoch")
        return "\n".join(lines)


def first_step_record(totals: EpochTotals) -> dict[str, dict[str, float]]:
    """The values of the first step, for the record of its epoch; empty in another epoch."""
    return {"step0": dict(totals.first_step)} if totals.first_step else {}
