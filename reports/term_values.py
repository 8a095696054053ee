"""What the terms of a loss were at the first step of runs and in their last epoch, as a table of a report."""

import math
from collections.abc import Sequence
from statistics import fmean

from reports.runs import Run
from training.guard import FRACTION

CLASS_TOKEN = "cls_ce"
"""The component of the loss that every run has."""


def term_table(runs: Sequence[Run]) -> dict[str, list[str]]:
    """A line for each row and term: means over the row's finished runs, which are those that have both values.

    Returns:
        {heading: texts}; empty where no run has terms and the values of its first step.
    """
    finished = [run for run in runs if not run.problem and run.records and run.records[0].get("step0")]
    columns = {name: [] for name in ("terms of", "term", "coefficient", "runs", "step 0", "of the loss, step 0",
                                     "last epoch", "of the loss, last epoch")}  # fmt: skip
    for row in dict.fromkeys(run.configuration for run in finished):
        of_row = [run for run in finished if run.configuration == row]
        for term in dict.fromkeys(name for run in of_row for name in _terms(run)):
            pairs = [pair for run in of_row if None not in (pair := _values(run, term))]
            if not pairs:
                continue
            first, first_fraction, last, last_fraction = (fmean(values) for values in zip(*pairs, strict=True))
            coef = of_row[0].flags.get(f"{term}_coef")
            cells = row, term, "" if coef is None else f"{coef:g}", str(len(pairs))
            cells += f"{first:.4g}", f"{100 * first_fraction:.2f} %", f"{last:.4g}", f"{100 * last_fraction:.2f} %"
            for column, cell in zip(columns.values(), cells, strict=True):
                column.append(cell)
    return columns if columns["term"] else {}


def _terms(run: Run) -> list[str]:
    names = [name.removesuffix(FRACTION) for name in run.records[0]["step0"] if name.endswith(FRACTION)]
    return [name for name in names if name != CLASS_TOKEN]


def _values(run: Run, term: str) -> tuple[float | None, ...]:
    """The value and the fraction of the loss at the first step, and the means of the last epoch."""
    step0, last = run.records[0]["step0"], run.records[-1]
    values = [step0.get(term), step0.get(term + FRACTION)]
    values += [last.get(f"train_{term}"), last.get(f"train_{term}{FRACTION}")]
    return tuple(value if isinstance(value, float | int) and math.isfinite(value) else None for value in values)
