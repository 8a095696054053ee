"""The paper-style table of a study, built from its run folders alone.

    python tabulate.py runs/study --format latex --output table.tex --curves curves.png

A cell of the study, one row, is a set of runs that differ in their seed alone: runs/study/plain/seed0, seed1, ... Only
finished runs are averaged; the others are listed below the table.
"""

import difflib
import math
import sys
from pathlib import Path

import pandas as pd

import figures
from parsing import Parser
from run_folders import ACCURACIES, Run, find_runs

LOW = (
    *("embedding_token_cosine", "embedding_token_abscosine", "embedding_first_cosine", "attention_head_cosine"),
    *("attention_previous_cosine", "weight_condition_number", "weight_row_abscosine"),
)
HIGH = ("embedding_effective_rank", "embedding_components_90", "weight_effective_rank", "weight_smallest_angle")
NEITHER = ("attention_row_std", "attention_row_entropy")
BETTER = dict.fromkeys(LOW, min) | dict.fromkeys(HIGH, max) | dict.fromkeys(NEITHER)
MEASURES = ("embedding_token_cosine", "attention_head_cosine", "weight_row_abscosine")


def __getattr__(name: str):
    """torch looks for PyPI's `tabulate.tabulate` at the end of a process, and does without on an ImportError."""
    if name == "tabulate":
        raise ImportError("tabulate.py is this project's program, not the package of that name")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def statistics_table(runs: list[Run], measures: list[str], baseline: str) -> pd.DataFrame:
    """Means over the finished runs of each cell.

    Args:
        runs: of all cells.
        measures: names of measures of redundancy.
        baseline: the cell whose accuracies are subtracted from the others'.

    Returns:
        One row for each cell, the baseline first. Columns: n (finished runs); for each accuracy in percent, each
        measure, and images_per_s: <name>_mean, <name>_std (of a sample; none for one run) and <name>_n (runs that have
        it); <accuracy>_difference in percentage points, where there is the baseline.
    """
    cells = sorted({run.cell: None for run in runs}, key=lambda cell: cell != baseline)
    finished = [run for run in runs if not run.problem]
    columns = [*ACCURACIES, *measures, "images_per_s"]
    index = pd.Index([run.cell for run in finished], name="cell", dtype=str)
    values = pd.DataFrame([run.values() for run in finished], index, columns, dtype=float).groupby("cell")
    table = pd.DataFrame({"n": values.size()}).reindex(cells, fill_value=0)
    for name in columns:
        table[f"{name}_mean"] = values[name].mean()
        table[f"{name}_std"] = values[name].std()
        table[f"{name}_n"] = values[name].count().reindex(cells, fill_value=0)
    for name in ACCURACIES if baseline in cells else ():
        table[f"{name}_difference"] = table[f"{name}_mean"] - table[f"{name}_mean"][baseline]
    return table


def text_columns(table: pd.DataFrame, measures: list[str], baseline: str) -> dict[str, list[str]]:
    """The columns of `statistics_table` as text: {heading: one text for each cell, **the best ones** so}."""
    columns = {"n": [str(n) for n in table["n"]]}
    for name, weights in ACCURACIES.items():
        columns[f"top-1 {weights}, %"] = _texts(table, name, 2, max)
    for name, weights in ACCURACIES.items():
        if f"{name}_difference" in table:
            values = table[f"{name}_difference"].round(2)
            texts = ["-" if math.isnan(value) else f"{value:+.2f}" if value else "0.00" for value in values]
            columns[f"{weights} vs {baseline}, points"] = _embolden(texts, values, max)
    columns |= {name: _texts(table, name, None, BETTER.get(name)) for name in measures}
    columns["images/s"] = _texts(table.assign(images_per_s_std=math.nan), "images_per_s", None, None)
    return columns


def _texts(table: pd.DataFrame, name: str, decimals: int | None, best) -> list[str]:
    """mean ± std, by default with three digits of the largest mean; a mean over fewer than n runs tells its own n."""
    means, texts = table[f"{name}_mean"], []
    if decimals is None:
        largest = means.abs().max()
        decimals = min(max(2 - math.floor(math.log10(largest)), 0), 6) if largest > 0 else 2
    for n, mean, std, count in zip(table["n"], means, table[f"{name}_std"], table[f"{name}_n"], strict=True):
        text = "-" if math.isnan(mean) else f"{mean:.{decimals}f}"
        text += "" if math.isnan(std) else f" ± {std:.{decimals}f}"
        texts.append(text + (f" (n = {count})" if 0 < count < n else ""))
    return _embolden(texts, means.round(decimals), best)


def _embolden(texts: list[str], values: pd.Series, best) -> list[str]:
    """Ties are all best; none is where all are equal, or only one is there."""
    if best is None or values.nunique() < 2:
        return texts
    return [f"**{t}**" if v == best(values.dropna()) else t for t, v in zip(texts, values, strict=True)]


def markdown(columns: dict[str, list[str]], notes: list[str]) -> str:
    """A Markdown table of texts, and a list of notes."""
    texts = [[text.replace("|", r"\|") for text in (head, *cells)] for head, cells in columns.items()]
    texts = [[column[0], "-" * max(map(len, column)), *column[1:]] for column in texts]
    texts = [[text.ljust(len(column[1])) for text in column] for column in texts]
    lines = [f"| {' | '.join(row)} |" for row in zip(*texts, strict=True)]
    return "\n".join([*lines, *([""] if notes else []), *(f"- {note}" for note in notes)]) + "\n"


def latex(columns: dict[str, list[str]], notes: list[str]) -> str:
    """A booktabs table of texts, names in the first column, and the notes in small print."""
    head, *rows = zip(*([head, *cells] for head, cells in columns.items()), strict=True)
    lines = [
        r"% needs \usepackage{booktabs}",
        rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
        r"\toprule",
        rf"{' & '.join(map(_latex, head))} \\",
        r"\midrule",
        *(rf"{' & '.join([_latex(name), *map(_latex_number, cells)])} \\" for name, *cells in rows),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join([*lines, *(rf"\par{{\footnotesize {_latex(note)}\par}}" for note in notes)]) + "\n"


def _latex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
    return text.translate(str.maketrans(special | {char: f"\\{char}" for char in "&%$#_{}"}))


def _latex_number(text: str) -> str:
    number = "--" if text == "-" else _latex(text.strip("*")).replace("-", "$-$")
    return rf"\textbf{{{number}}}" if text.startswith("**") else number


def known_measures(names: list[str], runs: list[Run]) -> list[str]:
    """`names`, each once.

    Raises:
        SystemExit: one is neither a measure of this project nor in any run.
    """
    known = [*dict.fromkeys([*BETTER, *(name for run in runs for name in run.measures)])]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known)
            hint = f"; did you mean {' or '.join(near)}?" if near else "."
            raise SystemExit(f"error: unknown measure {name}{hint} There are {', '.join(sorted(known))}")
    return [*dict.fromkeys(names)]


def main(argv: list[str] | None = None):
    """Tabulate what a command line names."""
    parser = Parser(prog="tabulate.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("out", nargs="+", metavar="OUT", help="run folder, or folder that is searched for run folders")
    add("--format", choices=("markdown", "latex", "csv"), default="markdown", help="default: markdown")
    add("--measures", nargs="*", metavar="NAME", default=MEASURES, help=f"of redundancy; default: {' '.join(MEASURES)}")
    add("--baseline", default="plain", metavar="CELL", help="to compare accuracies with; default: plain")
    add("--curves", type=Path, metavar="FILE.png", help="draw training curves, and as PDF beside it; default: none")
    add("--output", type=Path, metavar="FILE", help="write the table there; default: print it")
    args = parser.parse_args(argv)
    if args.curves and args.curves.suffix != ".png":
        parser.error(f"--curves needs a file that ends in .png; got {args.curves}")

    runs = find_runs(args.out)
    measures = known_measures(args.measures, runs)
    table = statistics_table(runs, measures, args.baseline)
    if args.baseline not in table.index:
        sys.stderr.write(f"there is no cell {args.baseline} to compare accuracies with (--baseline)\n")
    troubled = [run for run in runs if run.problem]
    notes = [f"{run.cell}, seed {run.flags.get('seed', '?')}, {run.problem}" for run in troubled]
    if args.format == "csv":
        text = table.to_csv(index_label="cell")
        sys.stderr.writelines(f"{note}\n" for note in notes)
    else:
        states = {run.cell: run.problem.split(":")[0] for run in sorted(troubled, key=lambda run: run.problem)}
        names = [f"{cell} ({states[cell]})" if n == 0 else cell for cell, n in table["n"].items()]
        columns = {"cell": names} | text_columns(table, measures, args.baseline)
        text = {"markdown": markdown, "latex": latex}[args.format](columns, notes)
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
