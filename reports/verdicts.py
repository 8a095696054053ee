"""The verdict on each row of a study in each outcome, under a rule that a report states."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from reports.rows import SIDE_BY_SIDE, headings
from reports.runs import ACCURACIES
from reports.statistics import holm, interval_text, p_text
from reports.tables import known_measures

DIFFERENT = ("better", "worse", "higher", "lower")
DECIDED = (*DIFFERENT, "not significant")
NOT_TESTED = ("test_acc1_ema",)
WORDS = (*DECIDED, "no test", "too few runs")


class Rule(NamedTuple):
    """When a row differs from the baseline.

    Attributes:
        baseline: the row that the others are compared with.
        alpha: p-value of Welch's t test below which a row differs.
        min_runs: finished runs of the row and of the baseline below which there is no verdict.
    """

    baseline: str
    alpha: float = 0.01
    min_runs: int = 5

    def __str__(self) -> str:
        return (
            f"a row differs from {self.baseline} in an outcome on this data if Welch's t test (unequal variances) has "
            f"p < {self.alpha} with at least {self.min_runs} finished runs of each; with fewer there is no verdict. "
            "Beside it is the p-value that Holm's method corrects for all rows tested in this outcome on this data. "
            "The outcomes are not corrected for their number: among many, some differ by chance. Averaged weights are "
            "not tested."
        )


class Verdict(NamedTuple):
    """How a row compares with the baseline in one outcome.

    Attributes:
        outcome: name of an accuracy or a measure.
        difference: of the means, with the end points of its interval; NaN where there is none.
        p: of Welch's t test; NaN where there is no test.
        holm: the same, corrected by Holm's method for the rows that are tested.
        runs: finished runs that have a value, of the row or of the baseline, whichever has fewer.
        word: of `WORDS`.
    """

    outcome: str
    row: str
    difference: float
    low: float
    high: float
    p: float
    holm: float
    runs: int
    word: str


def verdicts(statistics: pd.DataFrame, rule: Rule) -> list[Verdict]:
    """The verdicts of a `rows.statistics_table`, outcome by outcome; none without the baseline."""
    found = []
    for outcome in (name.removesuffix("_difference") for name in statistics if name.endswith("_difference")):
        counts = statistics[f"{outcome}_n"]
        runs = {row: int(min(n, counts[rule.baseline])) for row, n in counts.items() if row != rule.baseline}
        rows = [row for row, n in runs.items() if n > 0 and outcome not in NOT_TESTED]
        tested = [row for row in rows if runs[row] >= rule.min_runs]
        raw = [statistics.loc[row, f"{outcome}_p"] for row in tested]
        p_values = dict(zip(tested, zip(raw, holm(raw), strict=True), strict=True))
        for row in rows:
            difference, low, high = (statistics.loc[row, f"{outcome}_{name}"] for name in ("difference", "low", "high"))
            p, corrected = p_values.get(row, (math.nan, math.nan))
            word = _word(outcome, difference, p, rule.alpha) if row in tested else "too few runs"
            found.append(Verdict(outcome, row, difference, low, high, p, corrected, runs[row], word))
    return found


def _word(outcome: str, difference: float, p: float, alpha: float) -> str:
    if math.isnan(p):
        return "no test"  # no run differs from another one of its row
    if p >= alpha:
        return "not significant"
    better = "higher" if outcome in ACCURACIES else None
    if outcome in known_measures():
        better = known_measures()[outcome][0].better
    direction = "higher" if difference > 0 else "lower"
    return direction if better is None else "better" if direction == better else "worse"


def verdict_tables(found: Sequence[Verdict]) -> list[dict[str, list[str]]]:
    """Tables {heading: texts} with a line for each row, and a few outcomes beside each other in each."""
    outcomes, rows = ([*dict.fromkeys(names)] for names in zip(*(verdict[:2] for verdict in found), strict=True))
    texts = {(verdict.outcome, verdict.row): _text(verdict) for verdict in found}
    columns = {outcome_heading(outcome): [texts.get((outcome, row), "-") for row in rows] for outcome in outcomes}
    items = [*columns.items()]
    parts = (items[first : first + SIDE_BY_SIDE] for first in range(0, len(items), SIDE_BY_SIDE))
    return [{"configuration": rows} | dict(part) for part in parts]


def outcome_heading(outcome: str) -> str:
    """The heading of an accuracy or a measure in tables."""
    return headings([] if outcome in ACCURACIES else [outcome])[outcome]


def verdict_sentences(found: Sequence[Verdict], baseline: str, decimals: int) -> str:
    """The verdicts in one outcome: a sentence for each word, which names its rows."""
    sentences = []
    for word in WORDS:
        texts = [
            f"{verdict.row} ({interval_text(*verdict[2:5], decimals)}, {_remark(verdict)})"
            for verdict in found
            if verdict.word == word
        ]
        begin = f"{word} than {baseline}" if word in DIFFERENT else word
        sentences += [f"{begin.capitalize()}: {', '.join(texts)}."] if texts else []
    return " ".join(sentences)


def _text(verdict: Verdict) -> str:
    word = f"**{verdict.word}**" if verdict.word in DIFFERENT else verdict.word
    return f"{word} ({_remark(verdict)})"


def _remark(verdict: Verdict) -> str:
    """The p-values, or the number of runs where there is no test."""
    if math.isnan(verdict.p):
        return f"n = {verdict.runs}"
    raw, corrected = (p_text(p).removesuffix(", n. s.") for p in (verdict.p, verdict.holm))
    return f"{raw}, Holm {corrected.removeprefix('p ')}"
