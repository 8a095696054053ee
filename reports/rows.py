"""The rows of a study's table, one for each configuration: means, and tested differences from the baseline."""

import math
import statistics

import pandas as pd

from reports.comparisons import row_values
from reports.runs import ACCURACIES, Run
from reports.statistics import CONFIDENCE, FEW_RUNS, NOT_SIGNIFICANT, Difference, interval_text, p_text, welch
from reports.tables import known_measures

BEST = {"lower": min, "higher": max}
SPEED = "images_per_s"
SIDE_BY_SIDE = 3  # measures in a table; with intervals, more of them do not fit on a page


def statistics_table(runs: list[Run], source: str | None, measures: list[str], baseline: str) -> pd.DataFrame:
    """Means over the finished runs of each configuration, and their differences from those of the baseline.

    `source` is the file that redundancy is read from.

    Returns:
        One row for each configuration, the baseline first. Columns: n (finished runs), unfinished and failed (runs);
        for each accuracy in percent, each measure, and images_per_s: <name>_mean, <name>_std (of a sample; none for one
        run) and <name>_n (runs that have it); if the baseline exists, <name>_difference of each accuracy in percentage
        points, and of each measure, with <name>_low, <name>_high and <name>_p of `statistics.welch`.
    """
    rows = sorted({run.configuration: None for run in runs}, key=lambda name: name != baseline)
    finished = [run.configuration for run in runs if not run.problem]
    table = pd.DataFrame({"n": [finished.count(name) for name in rows]}, rows)
    for state in ("unfinished", "failed"):
        names = [run.configuration for run in runs if run.problem and run.problem.startswith(state)]
        table[state] = [names.count(name) for name in rows]
    for name, of_rows in row_values(runs, source, [*ACCURACIES, *measures, SPEED]).items():
        values = [of_rows[row] for row in rows]
        table[f"{name}_mean"] = [statistics.fmean(of_row) if of_row else math.nan for of_row in values]
        table[f"{name}_std"] = [statistics.stdev(of_row) if len(of_row) > 1 else math.nan for of_row in values]
        table[f"{name}_n"] = [*map(len, values)]
        if baseline in rows and name != SPEED:
            differences = [welch(of_row, of_rows[baseline]) for of_row in values]
            differences[0] = Difference(differences[0].difference)  # the baseline's own is no comparison
            for column, numbers in zip(Difference._fields, zip(*differences, strict=True), strict=True):
                table[f"{name}_{column}"] = numbers
    return table


def legend(table: pd.DataFrame, baseline: str) -> list[str]:
    """What the texts of `text_tables` mean."""
    lines = ["mean ± standard deviation of a sample of n runs; the best mean in bold"]
    differences = table.drop(index=baseline, errors="ignore").filter(regex="_difference$").notna().sum().sum()
    tests = table.filter(regex="_p$").notna().sum().sum()
    if tests:
        lines += [
            f"in parentheses the difference from the mean of {baseline} [its {CONFIDENCE} confidence interval] and its "
            "p-value, by Welch's t for unequal variances, not corrected for their number",
            NOT_SIGNIFICANT,
        ]
    elif differences:
        lines.append(f"in parentheses the difference from the mean of {baseline}")
    if tests < differences:
        lines.append("no interval and no p-value: fewer than two runs on a side, or no deviation between runs")
    return lines


def warnings(table: pd.DataFrame, baseline: str, pairwise: bool) -> list[str]:
    """A line if rows that are compared, with the baseline or `pairwise`, have few runs."""
    numbers = table["n"][table["n"] > 0]
    few = [f"{name} (n = {n})" for name, n in numbers.items() if n < FEW_RUNS]
    if not few or len(numbers) < 2 or not (pairwise or baseline in numbers.index):
        return []
    return [f"warning: fewer than {FEW_RUNS} runs, too few to conclude anything from a difference: {', '.join(few)}"]


def headings(measures: list[str]) -> dict[str, str]:
    """{accuracy or measure: heading of its column}"""
    known = known_measures()
    of_measures = {name: known[name][0].label(known[name][1]) if name in known else name for name in measures}
    return {name: f"top-1 {text}, % ↑" for name, text in ACCURACIES.items()} | of_measures


def decimals_of(table: pd.DataFrame, name: str) -> int:
    """Two for an accuracy, otherwise so that the largest mean has three digits."""
    if name in ACCURACIES:
        return 2
    largest = table[f"{name}_mean"].abs().max()
    return min(max(2 - math.floor(math.log10(largest)), 0), 6) if largest > 0 else 2


def text_tables(table: pd.DataFrame, measures: list[str], baseline: str) -> list[dict[str, list[str]]]:
    """`statistics_table` as text, the best values in **bold**: accuracies, then redundancy if there are `measures`.

    Each table is {heading: one text for each configuration}.
    """
    states = zip(table.index, table["n"], table["unfinished"], strict=True)
    names = [name if n else f"{name} ({'unfinished' if unfinished else 'failed'})" for name, n, unfinished in states]
    first_columns = {"configuration": names, "n": [str(n) for n in table["n"]]}
    known = known_measures()
    best = {name: BEST.get(known[name][0].better) if name in known else None for name in measures}
    best |= dict.fromkeys(ACCURACIES, max)
    columns = {heading: _texts(table, name, best[name], baseline) for name, heading in headings(measures).items()}
    speed = _texts(table.drop(columns=f"{SPEED}_std"), SPEED, None, baseline)
    accuracies, *of_measures = side_by_side(columns)
    return [first_columns | accuracies | {"images/s": speed}, *(first_columns | part for part in of_measures)]


def side_by_side(columns: dict[str, list[str]]) -> list[dict[str, list[str]]]:
    """The columns of `headings` as parts that fit on a page: accuracies, then a few measures in each."""
    items = [*columns.items()]
    first = len(ACCURACIES)
    parts = [items[:first], *(items[i : i + SIDE_BY_SIDE] for i in range(first, len(items), SIDE_BY_SIDE))]
    return [*map(dict, parts)]


def _texts(table: pd.DataFrame, name: str, best, baseline: str) -> list[str]:
    """mean ± std (difference [interval], p-value, n = ...); n where runs lack a value.

    All means equal to the best are bold; none is where all are equal, or only one exists.
    """
    decimals = decimals_of(table, name)
    columns = table.reindex(columns=[f"{name}_{column}" for column in ("mean", "std", "n", *Difference._fields)])
    means = columns[f"{name}_mean"].dropna().round(decimals)
    best_mean = best(means) if best and means.nunique() > 1 else None
    texts = []
    for (configuration, mean, std, count, *difference, p), n in zip(columns.itertuples(), table["n"], strict=True):
        mean = round(mean, decimals) + 0.0  # no -0.0
        text = "-" if math.isnan(mean) else f"{mean:.{decimals}f}"
        text += "" if math.isnan(std) else f" ± {std:.{decimals}f}"
        text = f"**{text}**" if mean == best_mean else text
        remarks = [] if configuration == baseline else [interval_text(*difference, decimals), p_text(p)]
        remarks += [f"n = {count:.0f}"] if 0 < count < n else []
        remarks = ", ".join(filter(None, remarks))
        texts.append(f"{text} ({remarks})" if remarks else text)
    return texts
