"""The paper-style table of a study, built from its run folders alone.

    python tabulate.py runs/study --format latex --output table.tex --curves curves.png

A cell of the study, one row, is a set of runs that differ in their seed alone: runs/study/plain/seed0, seed1, ... Only
finished runs are averaged; the others are listed below the table.
"""

import argparse
import difflib
import json
import math
import re
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import yaml

import figures

LOW = (
    *("embedding_token_cosine", "embedding_token_abscosine", "embedding_first_cosine", "attention_head_cosine"),
    *("attention_previous_cosine", "weight_condition_number", "weight_row_abscosine"),
)
HIGH = ("embedding_effective_rank", "embedding_components_90", "weight_effective_rank", "weight_smallest_angle")
NEITHER = ("attention_row_std", "attention_row_entropy")
BETTER = dict.fromkeys(LOW, min) | dict.fromkeys(HIGH, max) | dict.fromkeys(NEITHER)
MEASURES = ("embedding_token_cosine", "attention_head_cosine", "weight_row_abscosine")
ACCURACIES = {"test_acc1": "raw", "test_acc1_ema": "EMA"}
FINITE = ("train_loss", "test_loss", "test_loss_ema", *ACCURACIES)  # in the last epoch, unless the run failed
MAY_DIFFER = (
    *("seed", "output_dir", "resume", "start_epoch", "config", "data_path", "num_workers", "pin_mem", "device"),
    *("dist_url", "dist_eval", "world_size", "local_rank", "resplit", "model_ema_force_cpu", "log_interval"),
    *("tensorboard", "redundancy_every"),
)  # flags of where and how a run ran, not of what it trained


def __getattr__(name: str):
    """torch looks for PyPI's `tabulate.tabulate` at the end of a process, and does without on an ImportError."""
    if name == "tabulate":
        raise ImportError("tabulate.py is this project's program, not the package of that name")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclass
class Run:
    """What a run folder tells.

    Attributes:
        cell: the row it belongs to.
        flags: its args.yaml; empty where that cannot be read.
        records: one dict for each epoch, in order.
        measures: {measure of redundancy: value}.
        problem: why it is not averaged, "unfinished: ..." or "failed: ..."; None for a finished run.
    """

    cell: str
    folder: Path
    flags: dict = field(default_factory=dict)
    records: list[dict] = field(default_factory=list)
    measures: dict[str, float] = field(default_factory=dict)
    problem: str | None = None

    def values(self) -> dict[str, float]:
        """Accuracies of the last epoch in percent, measures, and the median throughput in images/s."""
        speeds = [r["train_images_per_s"] for r in self.records if _is_finite(r.get("train_images_per_s"))]
        speed = {"images_per_s": statistics.median(speeds)} if speeds else {}
        return self.measures | speed | {name: self.records[-1].get(name) for name in ACCURACIES}


def find_runs(outs: list[str]) -> list[Run]:
    """Read all runs below some folders, each once.

    Args:
        outs: run folders, or folders that are searched for run folders (those with args.yaml).

    Returns:
        The runs, in the order of `outs` and sorted by their path within each.

    Raises:
        SystemExit: a folder holds no run; the runs of a cell differ in more than their seed, or share one.
    """
    runs = {}
    for out in map(Path, outs):
        folders = sorted((path.parent for path in out.rglob("args.yaml")), key=_natural)
        if not folders:
            raise SystemExit(f"error: no run folder found under {out}: nothing there holds args.yaml")
        for folder in folders:
            if folder.resolve() not in runs:
                runs[folder.resolve()] = read_run(folder, cell_name(folder, out))
    for cell in {run.cell for run in runs.values()}:
        _check_cell([run for run in runs.values() if run.cell == cell and run.flags])
    return [*runs.values()]


def cell_name(folder: Path, out: Path) -> str:
    """The path of a run below `out` without its seed: out/plain/seed0 and out/plain-seed0 are of the cell plain.

    Where that leaves nothing, as `out` is a run or holds the seeds of one cell, the last part of the whole path.
    """
    parts = [*folder.relative_to(out).parts]
    if not parts or (len(parts) == 1 and re.fullmatch(r"seed\d+", parts[0])):
        parts = [part for part in folder.resolve().parts if not re.fullmatch(r"seed\d+", part)][-1:]
    elif re.fullmatch(r"seed\d+", parts[-1]):
        parts.pop()
    return re.sub(r"[-_]seed\d+$", "", "/".join(parts))


def read_run(folder: Path, cell: str) -> Run:
    """Read a run folder; what cannot be read makes it a failed run."""
    run = Run(cell, folder)
    try:
        flags = yaml.safe_load((folder / "args.yaml").read_text())
        if not isinstance(flags, dict) or not {"seed", "epochs"} <= flags.keys():
            raise ValueError("args.yaml does not hold the flags of a run")
        run.flags = flags
        for record in figures.read_log(folder / "log.txt", sys.stderr) if (folder / "log.txt").exists() else ():
            # a resumed run may have gone back to an earlier epoch
            run.records = [earlier for earlier in run.records if earlier["epoch"] < record["epoch"]] + [record]
        measured = {name.removeprefix("redundancy_"): value for record in run.records
                    for name, value in record.items() if name.startswith("redundancy_")}  # fmt: skip
        measured |= _read_json(folder / "redundancy.json").get("summary", {})
        run.measures = {name: value for name, value in measured.items() if _is_finite(value)}
        run.problem = _problem(run, _read_json(folder / "summary.json"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        run.problem = f"failed: its files cannot be read ({' '.join(str(error).split())})"
    return run


def _read_json(path: Path) -> dict:
    """A JSON object; empty where there is no such file."""
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except json.JSONDecodeError:
        raise ValueError(f"{path.name} is not whole JSON") from None


def _problem(run: Run, summary: dict) -> str | None:
    done = run.records[-1]["epoch"] + 1 if run.records else 0
    if run.records and "train_loss" not in run.records[-1]:
        return f"failed: no step taken in epoch {done - 1}"
    for name, value in run.records[-1].items() if run.records else ():
        if name in FINITE and not _is_finite(value):
            return f"failed: {name} is {value} in epoch {done - 1}"
    if not summary:
        return f"unfinished: epoch {done} of {run.flags['epochs'] + run.flags.get('cooldown_epochs', 0)}"
    if summary["epochs"] != done:
        return f"failed: log.txt ends after {done} epochs, summary.json tells of {summary['epochs']}"
    return None


def _check_cell(runs: list[Run]):
    """One line for runs that cannot be averaged."""
    for run in runs[1:]:
        for name in runs[0].flags | run.flags:
            ours, theirs = runs[0].flags.get(name), run.flags.get(name)
            if name not in MAY_DIFFER and ours != theirs:
                values = f"{ours} in {runs[0].folder}, {theirs} in {run.folder}"
                raise SystemExit(f"error: the runs of {run.cell} differ in --{name.replace('_', '-')}: {values}")
    folders = {}
    for run in runs:
        other = folders.setdefault(run.flags["seed"], run.folder)
        if other != run.folder:
            raise SystemExit(f"error: {run.cell} has seed {run.flags['seed']} twice: {other} and {run.folder}")


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


def _is_finite(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _natural(path: Path) -> list:
    """A sort key by which run2 comes before run10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", str(path)))]


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message):
        self.exit(2, f"error: {message} (--help lists every flag)\n")


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
