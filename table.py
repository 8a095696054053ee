"""The paper-style table of a study, built from its run folders alone.

    python table.py runs/study --format latex --output table.tex --curves curves.png

A cell of the study, one row, is a set of runs that differ in their seed alone: runs/study/plain/seed0, seed1, ... Only
finished runs are averaged; the others are listed below the table. Redundancy is compared where all runs were measured
alike: by analyze.py, else by main.py in the last epoch.
"""

import difflib
import math
import sys
from pathlib import Path

import pandas as pd

from reports import figures
from reports.run_folders import ACCURACIES, Run, choose_redundancy, find_runs
from reports.tables import HEADINGS, latex, markdown
from training.parsing import Parser

BETTER = {"↓": min, "↑": max}
DEFAULT = (
    *("embedding_token_cosine_last", "embedding_token_abscosine_last", "embedding_effective_rank_last"),
    *("attention_head_cosine_first", "weight_condition_number_qkv", "weight_row_abscosine_qkv"),
)


def statistics_table(runs: list[Run], source: str | None, measures: list[str], baseline: str) -> pd.DataFrame:
    """Means over the finished runs of each cell.

    Args:
        runs: of all cells.
        source: where their redundancy is taken from.
        measures: names of measures of redundancy.
        baseline: the cell whose means are subtracted from the others'.

    Returns:
        One row for each cell, the baseline first. Columns: n (finished runs), unfinished and failed (runs); for each
        accuracy in percent, each measure, and images_per_s: <name>_mean, <name>_std (of a sample; none for one run) and
        <name>_n (runs that have it); where there is the baseline, <name>_difference of each accuracy in percentage
        points, and of each measure.
    """
    cells = sorted({run.cell: None for run in runs}, key=lambda cell: cell != baseline)
    finished = [run for run in runs if not run.problem]
    columns = [*ACCURACIES, *measures, "images_per_s"]
    index = pd.Index([run.cell for run in finished], name="cell", dtype=str)
    values = pd.DataFrame([run.values(source) for run in finished], index, columns, dtype=float).groupby("cell")
    table = pd.DataFrame({"n": values.size()}).reindex(cells, fill_value=0)
    for state in ("unfinished", "failed"):
        troubled = [run.cell for run in runs if run.problem and run.problem.startswith(state)]
        table[state] = [troubled.count(cell) for cell in cells]
    for name in columns:
        mean = values[name].mean().reindex(cells)
        table[f"{name}_mean"] = mean
        table[f"{name}_std"] = values[name].std()
        table[f"{name}_n"] = values[name].count().reindex(cells, fill_value=0)
        if baseline in cells and name != "images_per_s":
            table[f"{name}_difference"] = mean - mean[baseline]
    return table


def text_tables(table: pd.DataFrame, measures: list[str], baseline: str) -> list[dict[str, list[str]]]:
    """`statistics_table` as text: accuracies, then redundancy if there are `measures`.

    Returns:
        tables: {heading: one text for each cell of the study, **the best values** so}.
    """
    states = zip(table.index, table["n"], table["unfinished"], strict=True)
    names = [name if n else f"{name} ({'unfinished' if unfinished else 'failed'})" for name, n, unfinished in states]
    rows = {"cell": names, "n": [str(n) for n in table["n"]]}
    accuracies = {f"top-1 {text}, % ↑": _texts(table, name, 2, max, baseline) for name, text in ACCURACIES.items()}
    speed = _texts(table.drop(columns="images_per_s_std"), "images_per_s", None, None, baseline)
    redundancy = {}
    for name in measures:
        heading = HEADINGS.get(name, name)
        redundancy[heading] = _texts(table, name, None, BETTER.get(heading[-1]), baseline)
    return [rows | accuracies | {"images/s": speed}, *([rows | redundancy] if redundancy else [])]


def _texts(table: pd.DataFrame, name: str, decimals: int | None, best, baseline: str) -> list[str]:
    """mean ± std (difference, n = ...), by default with three digits of the largest mean; n where runs lack a value.

    The best means are bold, all that tie; none is where all are equal, or only one is there.
    """
    parts = table.reindex(columns=[f"{name}_{part}" for part in ("mean", "std", "difference", "n")])
    if decimals is None:
        largest = parts[f"{name}_mean"].abs().max()
        decimals = min(max(2 - math.floor(math.log10(largest)), 0), 6) if largest > 0 else 2
    parts = parts.round(decimals) + 0.0  # no -0.0
    means = parts[f"{name}_mean"].dropna()
    chosen = best(means) if best and means.nunique() > 1 else None
    texts = []
    for (cell, mean, std, difference, count), n in zip(parts.itertuples(), table["n"], strict=True):
        text = "-" if math.isnan(mean) else f"{mean:.{decimals}f}"
        text += "" if math.isnan(std) else f" ± {std:.{decimals}f}"
        text = f"**{text}**" if mean == chosen else text
        remarks = []
        if cell != baseline and not math.isnan(difference):
            remarks.append(f"{difference:{'+' if difference else ''}.{decimals}f}")
        if 0 < count < n:
            remarks.append(f"n = {count:.0f}")
        texts.append(f"{text} ({', '.join(remarks)})" if remarks else text)
    return texts


def choose_measures(asked: list[str] | None, runs: list[Run]) -> tuple[str | None, list[str], list[str]]:
    """Which redundancy is tabled.

    Args:
        asked: names of measures; None = DEFAULT, and not a word if there is no redundancy at all.
        runs: of all cells.

    Returns:
        source: where it is taken from.
        measures: those of the names that are there, each once.
        notes: on what was measured, or why there is nothing.

    Raises:
        SystemExit: a name is neither a measure of this project nor in any run.
    """
    own = {name for run in runs for measured in run.redundancy.values() for name in measured.measures}
    known = sorted({*HEADINGS, *own})
    names = [*dict.fromkeys(DEFAULT if asked is None else asked)]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known)
            hint = f"; did you mean {' or '.join(near)}?" if near else "."
            raise SystemExit(f"error: unknown measure {name}{hint} There are {', '.join(known)}")
    source, note = choose_redundancy(runs)
    if not names or (asked is None and note is None):
        return None, [], []
    if source is None:
        return None, [], [note or "redundancy: not tabled, as no finished run has any measures"]
    there = {name for run in runs if not run.problem for name in run.redundancy[source].measures}
    lacking = [name for name in names if name not in there]
    note += f"; it lacks {', '.join(lacking)}" if lacking else ""
    return source, [name for name in names if name in there], [note]


def main(argv: list[str] | None = None):
    """Tabulate what a command line names."""
    parser = Parser(prog="table.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("out", nargs="+", metavar="OUT", help="run folder, or folder that is searched for run folders")
    add("--format", choices=("markdown", "latex", "csv"), default="markdown", help="default: markdown")
    add("--measures", nargs="*", metavar="NAME", help=f"of redundancy; default: {' '.join(DEFAULT)}")
    add("--baseline", default="plain", metavar="CELL", help="to compare with; default: plain")
    add("--curves", type=Path, metavar="FILE.png", help="draw training curves, and as PDF beside it; default: none")
    add("--output", type=Path, metavar="FILE", help="write the table there; default: print it")
    args = parser.parse_args(argv)
    if args.curves and args.curves.suffix != ".png":
        parser.error(f"--curves needs a file that ends in .png; got {args.curves}")

    runs = find_runs(args.out)
    source, measures, notes = choose_measures(args.measures, runs)
    notes += [f"{run.name}, {run.problem}" for run in runs if run.problem]
    table = statistics_table(runs, source, measures, args.baseline)
    if args.baseline not in table.index:
        sys.stderr.write(f"there is no cell {args.baseline} to compare with (--baseline)\n")
    if args.format == "csv":
        text = table.to_csv(index_label="cell")
        sys.stderr.writelines(f"{note}\n" for note in notes)
    else:
        compared = f" (difference from the mean of {args.baseline})" if args.baseline in table.index else ""
        notes.insert(0, f"mean ± standard deviation of a sample of n runs{compared}; the best in bold")
        tables = text_tables(table, measures, args.baseline)
        text = {"markdown": markdown, "latex": latex}[args.format](tables, notes)
    try:
        if args.output:
            args.output.write_text(text, encoding="utf-8")
        else:
            print(text, end="")
        if args.curves:
            if not any(run.records for run in runs):
                raise SystemExit(f"error: --curves {args.curves} has nothing to draw: no run has ended an epoch")
            drawn = sorted(runs, key=lambda run: [*table.index].index(run.cell))
            figure = figures.training_curves([(run.cell, run.records, not run.problem) for run in drawn])
            figures.save(figure, args.curves.with_suffix(""))
    except OSError as error:
        raise SystemExit(f"error: {error.filename} cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    main()
