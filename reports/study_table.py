"""The paper-style table of a study: means and differences over the finished runs of each configuration."""

import math
import sys
from pathlib import Path

import pandas as pd

from diversity.spelling import did_you_mean
from reports import comparisons
from reports.comparisons import check_rows, comparable_groups, compared, conflict
from reports.run_folders import ACCURACIES, MAY_LACK, PROVENANCE, REPORT, Run, find_runs
from reports.tables import known_measures, latex, markdown
from training.records import LOG

BEST = {"lower": min, "higher": max}
DEFAULT_MEASURES = (
    *("embedding_token_cosine_last", "embedding_token_abscosine_last", "embedding_effective_rank_last"),
    *("attention_head_cosine_first", "weight_condition_number_qkv", "weight_row_abscosine_qkv"),
)


def write_table(
    folders: list[str],
    form: str,
    measures: list[str] | None,
    baseline: str,
    output: Path | None,
    curves: Path | None,
):
    """Print or write the table of the runs in some folders, and draw their training curves; see table.py's flags.

    Raises:
        SystemExit: there is no such run or measure, or a file cannot be written.
    """
    runs = find_runs(folders)
    check_rows(runs)
    check_measures(measures or [], runs)
    runs.sort(key=lambda run: run.configuration != baseline)
    if runs[0].configuration != baseline:
        sys.stderr.write(f"there is no configuration {baseline} to compare with (--baseline)\n")
    groups = comparable_groups(runs)
    tables, texts, notes = [], [], []
    for group in groups:
        source, chosen, notes_on_measures = choose_measures(measures, group)
        tables.append(statistics_table(group, source, chosen, baseline))
        texts += text_tables(tables[-1], chosen, baseline)
        if group is not groups[0]:
            reasons = (conflict(other, group[0]) for other in groups[0])
            notes.append(f"another table, as {next(filter(None, reasons))}")
        owner = "all runs" if len(groups) == 1 else f"table of {group[0].configuration}"
        notes += [compared(group, owner), *notes_on_measures, *comparisons.notes(group)]
    notes = [*dict.fromkeys(notes), *(f"{run.name}, {run.problem}" for run in runs if run.problem)]
    if form == "csv":
        text = pd.concat(tables).to_csv(index_label="cell")
        sys.stderr.writelines(f"{note}\n" for note in notes)
    else:
        difference = f" (difference from the mean of {baseline})" if runs[0].configuration == baseline else ""
        notes.insert(0, f"mean ± standard deviation of a sample of n runs{difference}; the best in bold")
        text = {"markdown": markdown, "latex": latex}[form](texts, notes)
    if not output:
        print(text, end="")
    try:
        if output:
            output.write_text(text, encoding="utf-8")
        drawn = [group for group in groups if any(run.records for run in group)] or groups[:1]
        for number, group in enumerate(drawn if curves else (), 1):
            draw_curves(group, curves if number == 1 else curves.with_stem(f"{curves.stem}_{number}"))
    except OSError as error:
        raise SystemExit(f"error: {error.filename or output or curves} cannot be written: {error.strerror}") from None


def draw_curves(runs: list[Run], path: Path):
    """Draw the training curves of runs as PNG and PDF."""
    from reports import figures  # here, as matplotlib takes a second to import

    if not any(run.records for run in runs):
        raise SystemExit(f"error: --curves {path} has nothing to draw: no run has finished an epoch")
    folders = {run.configuration: run.folder for run in runs}
    of_runs = [(run.configuration, run.records, not run.problem) for run in runs]
    figure = figures.training_curves(of_runs, figures.study_styles([*folders.values()]))
    figures.save(figure, path.with_suffix(""))


def statistics_table(runs: list[Run], source: str | None, measures: list[str], baseline: str) -> pd.DataFrame:
    """Means over the finished runs of each configuration, and their differences from those of the baseline.

    `source` is the file that redundancy is read from.

    Returns:
        One row for each configuration, the baseline first. Columns: n (finished runs), unfinished and failed (runs);
        for each accuracy in percent, each measure, and images_per_s: <name>_mean, <name>_std (of a sample; none for one
        run) and <name>_n (runs that have it); if the baseline exists, <name>_difference of each accuracy in percentage
        points, and of each measure.
    """
    rows = sorted({run.configuration: None for run in runs}, key=lambda name: name != baseline)
    finished = [run for run in runs if not run.problem]
    columns = [*ACCURACIES, *measures, "images_per_s"]
    index = pd.Index([run.configuration for run in finished], name="configuration", dtype=str)
    values = pd.DataFrame([run.values(source) for run in finished], index, columns, dtype=float)
    values = values.groupby("configuration")
    table = pd.DataFrame({"n": values.size()}).reindex(rows, fill_value=0)
    for state in ("unfinished", "failed"):
        names = [run.configuration for run in runs if run.problem and run.problem.startswith(state)]
        table[state] = [names.count(name) for name in rows]
    for name in columns:
        mean = values[name].mean().reindex(rows)
        table[f"{name}_mean"] = mean
        table[f"{name}_std"] = values[name].std()
        table[f"{name}_n"] = values[name].count().reindex(rows, fill_value=0)
        if baseline in rows and name != "images_per_s":
            table[f"{name}_difference"] = mean - mean[baseline]
    return table


def text_tables(table: pd.DataFrame, measures: list[str], baseline: str) -> list[dict[str, list[str]]]:
    """`statistics_table` as text, the best values in **bold**: accuracies, then redundancy if there are `measures`.

    Each table is {heading: one text for each configuration}.
    """
    states = zip(table.index, table["n"], table["unfinished"], strict=True)
    names = [name if n else f"{name} ({'unfinished' if unfinished else 'failed'})" for name, n, unfinished in states]
    first_columns = {"configuration": names, "n": [str(n) for n in table["n"]]}
    accuracies = {f"top-1 {text}, % ↑": _texts(table, name, 2, max, baseline) for name, text in ACCURACIES.items()}
    speed = _texts(table.drop(columns="images_per_s_std"), "images_per_s", None, None, baseline)
    redundancy, known = {}, known_measures()
    for name in measures:
        measure, place = known.get(name, (None, ""))
        best = BEST.get(measure.better) if measure else None
        redundancy[measure.label(place) if measure else name] = _texts(table, name, None, best, baseline)
    tables = [first_columns | accuracies | {"images/s": speed}]
    return [*tables, first_columns | redundancy] if redundancy else tables


def _texts(table: pd.DataFrame, name: str, decimals: int | None, best, baseline: str) -> list[str]:
    """mean ± std (difference, n = ...), by default with three digits of the largest mean; n where runs lack a value.

    All means equal to the best are bold; none is where all are equal, or only one exists.
    """
    columns = table.reindex(columns=[f"{name}_{column}" for column in ("mean", "std", "difference", "n")])
    if decimals is None:
        largest = columns[f"{name}_mean"].abs().max()
        decimals = min(max(2 - math.floor(math.log10(largest)), 0), 6) if largest > 0 else 2
    columns = columns.round(decimals) + 0.0  # no -0.0
    means = columns[f"{name}_mean"].dropna()
    best_mean = best(means) if best and means.nunique() > 1 else None
    texts = []
    for (configuration, mean, std, difference, count), n in zip(columns.itertuples(), table["n"], strict=True):
        text = "-" if math.isnan(mean) else f"{mean:.{decimals}f}"
        text += "" if math.isnan(std) else f" ± {std:.{decimals}f}"
        text = f"**{text}**" if mean == best_mean else text
        remarks = []
        if configuration != baseline and not math.isnan(difference):
            remarks.append(f"{difference:{'+' if difference else ''}.{decimals}f}")
        if 0 < count < n:
            remarks.append(f"n = {count:.0f}")
        texts.append(f"{text} ({', '.join(remarks)})" if remarks else text)
    return texts


def choose_measures(names: list[str] | None, runs: list[Run]) -> tuple[str | None, list[str], list[str]]:
    """The file that redundancy is read from, those of the measures that the finished runs have, and notes on them.

    No names are `DEFAULT_MEASURES`, without a note if there is no redundancy at all.
    """
    chosen = [*dict.fromkeys(DEFAULT_MEASURES if names is None else names)]
    source, note = choose_redundancy(runs)
    if not chosen or (names is None and note is None):
        return None, [], []
    if source is None:
        return None, [], [note or "redundancy: not in the table, as no finished run has any measures"]
    measured = {name for run in runs if not run.problem for name in run.redundancy[source].measures}
    missing = [name for name in chosen if name not in measured]
    note += f"; it lacks {', '.join(missing)}" if missing else ""
    return source, [name for name in chosen if name in measured], [note]


def check_measures(names: list[str], runs: list[Run]):
    """Find names of measures that do not exist.

    Raises:
        SystemExit: a name is neither a measure of this project nor in any run.
    """
    in_runs = {name for run in runs for measured in run.redundancy.values() for name in measured.measures}
    known = sorted({*known_measures(), *in_runs})
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known, ".")
            raise SystemExit(f"error: unknown measure {name}{hint} There are {', '.join(known)}")


def choose_redundancy(runs: list[Run]) -> tuple[str | None, str | None]:
    """The one source from which the redundancy of all runs is read, so that only equal measurements are compared.

    Returns:
        source: the first of REPORT and LOG in which all finished runs were measured in the same way after their last
            epoch, or None.
        note: what was measured, or why nothing is compared; None where nothing was measured.
    """
    finished = [run for run in runs if not run.problem]
    if not any(run.redundancy for run in finished):
        return None, None
    reasons = []
    for source in (REPORT, LOG):
        reason = _reason_against(source, finished)
        if reason is None:
            values = finished[0].redundancy[source].provenance
            known = [name for name in PROVENANCE if values[name] is not None and name != "files"]
            words = [PROVENANCE[name].format(values[name]) for name in known]
            skipped = reasons and any(REPORT in run.redundancy for run in finished)
            instead = f", as {reasons[0]}" if skipped else ""
            return source, f"redundancy: measured after the last epoch on {', '.join(words)} ({source}{instead})"
        reasons.append(reason)
    return None, f"redundancy: not in the table, as {' and '.join(reasons)}; run analyze.py on all runs in the same way"


def _reason_against(source: str, runs: list[Run]) -> str | None:
    """Why a source does not serve for all runs; None if it does."""
    for number, run in enumerate(runs):
        if source not in run.redundancy:
            return f"{run.name} has none in {REPORT if source == REPORT else f'the last epoch of {LOG}'}"
        theirs, last = run.redundancy[source], run.records[-1]["epoch"]
        if theirs.epoch != last:
            epoch = "an unknown epoch" if theirs.epoch is None else f"epoch {theirs.epoch}"
            return f"the {source} of {run.name} is of {epoch}, not of its last, {last}"
        for name, text in PROVENANCE.items():
            know = [one for one in runs[: number + 1] if one.redundancy[source].provenance[name] is not None]
            first = know[0] if know and name in MAY_LACK else runs[0]
            values = first.redundancy[source].provenance[name], theirs.provenance[name]
            if values[0] != values[1] and not (name in MAY_LACK and None in values):
                values = [*map(text.format, values)]
                return f"in {source}, {first.name} was measured on {values[0]}, {run.name} on {values[1]}"
    return None
