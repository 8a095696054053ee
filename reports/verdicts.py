"""The verdict on each row of a study in each outcome, under a rule that a report states."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from reports.rows import headings
from reports.runs import ACCURACIES
from reports.statistics import ALPHA, holm, interval_text, p_text
from reports.tables import known_measures

DIFFERENT = ("better", "worse", "higher", "lower")
DECIDED = (*DIFFERENT, "not significant")
WORDS = (*DECIDED, "no test", "too few runs")


class Verdict(NamedTuple):
    """How a row compares with the baseline in one outcome.

    Attributes:
        outcome: name of an accuracy or a measure.
        difference: of the means, with the end points of its interval; NaN where there is none.
        p: of Welch's t test, corrected by Holm's method; NaN where there is no test.
        runs: finished runs of the row that have a value, the fewer of the row and the baseline.
        word: of `WORDS`.
    """

    outcome: str
    row: str
    difference: float
    low: float
    high: float
    p: float
    runs: int
    word: str


def rule(baseline: str, min_runs: int) -> str:
    """The rule of `verdicts` in words."""
    return (
        f"a row differs from {baseline} in an outcome if the p-value of Welch's t test (unequal variances), corrected "
        f"by Holm's method for all rows tested in this outcome on this data, is below {ALPHA}. With fewer than "
        f"{min_runs} finished runs of the row or of {baseline} there is no verdict. The outcomes are not corrected for "
        "their number: among many, some differ by chance."
    )


def verdicts(statistics: pd.DataFrame, baseline: str, min_runs: int) -> list[Verdict]:
    """The verdicts of a `rows.statistics_table`, outcome by outcome; none without the baseline."""
    found = []
    for outcome in (name.removesuffix("_difference") for name in statistics if name.endswith("_difference")):
        counts = statistics[f"{outcome}_n"]
        rows = [row for row in statistics.index if row != baseline and min(counts[row], counts[baseline]) > 0]
        runs = {row: int(min(counts[row], counts[baseline])) for row in rows}
        tested = [row for row in rows if runs[row] >= min_runs]
        corrected = dict(zip(tested, holm([statistics.loc[row, f"{outcome}_p"] for row in tested]), strict=True))
        for row in rows:
            difference, low, high = (statistics.loc[row, f"{outcome}_{name}"] for name in ("difference", "low", "high"))
            p = corrected.get(row, math.nan)
            word = "too few runs" if row not in tested else _word(outcome, difference, p)
            found.append(Verdict(outcome, row, difference, low, high, p, runs[row], word))
    return found


def _word(outcome: str, difference: float, p: float) -> str:
    if math.isnan(p):
        return "no test"  # no run differs from another one of its row
    if p >= ALPHA:
        return "not significant"
    better = "higher" if outcome in ACCURACIES else None
    if outcome in known_measures():
        better = known_measures()[outcome][0].better
    direction = "higher" if difference > 0 else "lower"
    return direction if better is None else "better" if direction == better else "worse"


def verdict_table(found: Sequence[Verdict]) -> dict[str, list[str]]:
    """{heading: texts}: one line for each outcome, one column for each row."""
    outcomes = [*dict.fromkeys(verdict.outcome for verdict in found)]
    columns = {"outcome": [*map(outcome_heading, outcomes)]}
    for row in dict.fromkeys(verdict.row for verdict in found):
        of_row = {verdict.outcome: verdict for verdict in found if verdict.row == row}
        columns[row] = [_text(of_row[outcome]) if outcome in of_row else "-" for outcome in outcomes]
    return columns


def outcome_heading(outcome: str) -> str:
    """The heading of an accuracy or a measure in tables."""
    return headings([] if outcome in ACCURACIES else [outcome])[outcome]


def _text(verdict: Verdict) -> str:
    if verdict.word in ("too few runs", "no test"):
        return f"{verdict.word} (n = {verdict.runs})"
    word = verdict.word if verdict.word == "not significant" else f"**{verdict.word}**"
    return f"{word} ({p_text(verdict.p).removesuffix(', n. s.')})"


def verdict_sentences(found: Sequence[Verdict], baseline: str, decimals: int) -> str:
    """The verdicts in one outcome: a sentence for each word, which names its rows."""
    sentences = []
    for word in WORDS:
        texts = [
            f"{verdict.row} ({interval_text(*verdict[2:5], decimals)}, {_p_or_runs(verdict)})"
            for verdict in found
            if verdict.word == word
        ]
        begin = f"{word} than {baseline}" if word in DIFFERENT else word
        sentences += [f"{begin.capitalize()}: {', '.join(texts)}."] if texts else []
    return " ".join(sentences)


def _p_or_runs(verdict: Verdict) -> str:
    return f"n = {verdict.runs}" if math.isnan(verdict.p) else p_text(verdict.p).removesuffix(", n. s.")
