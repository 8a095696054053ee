"""The paper-style table of a study, from its run folders."""

import sys
from itertools import chain
from pathlib import Path

import pandas as pd

from reports import comparisons, pairs, rows
from reports.chosen_measures import check_measures, choose_measures
from reports.comparisons import check_rows, comparable_groups, compared, conflict
from reports.run_folders import Run, find_runs
from reports.tables import latex, markdown


def write_table(
    folders: list[str],
    form: str,
    measures: list[str] | None,
    baseline: str,
    output: Path | None,
    curves: Path | None,
    pairwise: bool = False,
    mcnemar: bool = False,
):
    """Print or write the table of the runs in some folders, and draw their training curves; see table.py's flags.

    Raises:
        SystemExit: there is no such run or measure, no predictions for `mcnemar`, or a file cannot be written.
    """
    runs = find_runs(folders)
    check_rows(runs)
    check_measures(measures or [], runs)
    runs.sort(key=lambda run: run.configuration != baseline)
    if runs[0].configuration != baseline:
        sys.stderr.write(f"there is no configuration {baseline} to compare with (--baseline)\n")
    groups = comparable_groups(runs)
    parts = [_of_group(group, groups, measures, baseline, pairwise) for group in groups]
    tables, texts, legends, notes = ([*of_parts] for of_parts in zip(*parts, strict=True))
    if mcnemar:
        tables = [pairs.mcnemar_table(groups, baseline, pairwise)]
        texts.append([pairs.mcnemar_texts(tables[0])])
        legends.append(pairs.MCNEMAR_LEGEND)
        notes.append(pairs.without_pair(tables[0], runs))
    notes.append(f"{run.name}, {run.problem}" for run in runs if run.problem)
    if form == "csv":
        first_column = "runs" if mcnemar else "difference" if pairwise else "configuration"
        text = pd.concat(tables).to_csv(index_label=first_column)
        sys.stderr.writelines(f"{note}\n" for note in dict.fromkeys(chain(*notes)))
    else:
        text = {"markdown": markdown, "latex": latex}[form]([*chain(*texts)], [*dict.fromkeys(chain(*legends, *notes))])
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


def _of_group(
    runs: list[Run], groups: list[list[Run]], measures: list[str] | None, baseline: str, pairwise: bool
) -> tuple[pd.DataFrame, list[dict[str, list[str]]], list[str], list[str]]:
    """The table of one of `groups` for a CSV file; its tables as text; what the texts mean; notes."""
    source, chosen, notes_on_measures = choose_measures(measures, runs)
    table = rows.statistics_table(runs, source, chosen, baseline)
    texts, legend = rows.text_tables(table, chosen, baseline), rows.legend(table, baseline)
    notes = rows.warnings(table, baseline, pairwise)
    if pairwise:
        of_rows, table = table, pairs.pairwise_table(runs, source, chosen)
        if len(table):
            texts += pairs.pairwise_texts(table, of_rows, chosen)
            legend += pairs.PAIRWISE_LEGEND
    if runs is not groups[0]:
        reasons = (conflict(other, runs[0]) for other in groups[0])
        notes.append(f"another table, as {next(filter(None, reasons))}")
    owner = "all runs" if len(groups) == 1 else f"table of {runs[0].configuration}"
    return table, texts, legend, [*notes, compared(runs, owner), *notes_on_measures, *comparisons.notes(runs)]


def draw_curves(runs: list[Run], path: Path):
    """Draw the training curves of runs as PNG and PDF."""
    from reports import figures  # here, as matplotlib takes a second to import

    if not any(run.records for run in runs):
        raise SystemExit(f"error: --curves {path} has nothing to draw: no run has finished an epoch")
    folders = {run.configuration: run.folder for run in runs}
    of_runs = [(run.configuration, run.records, not run.problem) for run in runs]
    figure = figures.training_curves(of_runs, figures.study_styles([*folders.values()]))
    figures.save(figure, path.with_suffix(""))
