"""The paper-style table of a study, from its run folders or records."""

import sys
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from reports import comparisons, pairs, rows
from reports.chosen_measures import check_measures, choose_measures
from reports.comparisons import check_rows, comparable_groups, compared, conflict
from reports.run_folders import find_runs, place_of
from reports.runs import Run, by_study
from reports.tables import latex, markdown


class Tables(NamedTuple):
    """The tables of runs that can be compared.

    Attributes:
        statistics: as `rows.statistics_table`, or `pairs.pairwise_table` for pairs.
        texts: the tables as text.
        legend: what the texts mean.
        notes: on the runs.
    """

    statistics: pd.DataFrame
    texts: list[dict[str, list[str]]]
    legend: list[str]
    notes: list[str]


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
    check_measures(measures or [], runs)
    for study, of_study in by_study(runs).items():
        check_rows(of_study)
        if all(run.configuration != baseline for run in of_study):
            where = f" in {study}" if study else ""
            sys.stderr.write(f"there is no configuration {baseline} to compare with (--baseline){where}\n")
    groups = study_groups(runs, baseline)
    parts = [group_tables(group, groups, measures, baseline, pairwise) for group in groups]
    tables, texts, legends, notes = ([*of_parts] for of_parts in zip(*parts, strict=True))
    notes = [
        [f"{group[0].study.name}: {note}" for note in of_group] if group[0].study else of_group
        for group, of_group in zip(groups, notes, strict=True)
    ]
    if mcnemar:
        tables = [pairs.mcnemar_table(groups, baseline, pairwise)]
        texts.append([pairs.mcnemar_texts(tables[0])])
        legends.append(pairs.MCNEMAR_LEGEND)
        notes.append(pairs.without_pair(tables[0], [*chain(*groups)]))
    notes.append(problems(chain(*groups)))
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


def study_groups(runs: list[Run], baseline: str) -> list[list[Run]]:
    """The runs that can be compared, study by study; the first group of each begins with the baseline."""
    groups = []
    for of_study in by_study(runs).values():
        groups += comparable_groups(sorted(of_study, key=lambda run: run.configuration != baseline))
    return groups


def problems(runs: Iterable[Run]) -> list[str]:
    """A line for each run that is not averaged."""
    return [f"{run.name}, {run.problem}" for run in runs if run.problem]


def group_tables(
    runs: list[Run], groups: list[list[Run]], measures: Sequence[str] | None, baseline: str, pairwise: bool = False
) -> Tables:
    """The tables of one of `groups`, which are those of `study_groups`."""
    source, chosen, notes_on_measures = choose_measures(measures, runs)
    table = rows.statistics_table(runs, source, chosen, baseline)
    texts, legend = rows.text_tables(table, chosen, baseline), rows.legend(table, baseline)
    notes = rows.warnings(table, baseline, pairwise)
    if pairwise:
        of_rows, table = table, pairs.pairwise_table(runs, source, chosen)
        if len(table):
            texts += pairs.pairwise_texts(table, of_rows, chosen)
            legend += pairs.PAIRWISE_LEGEND
    study = runs[0].study
    beside = [group for group in groups if group[0].study == study]
    if runs is not beside[0]:
        reasons = (conflict(other, runs[0]) for other in beside[0])
        notes.append(f"another table, as {next(filter(None, reasons))}")
    is_only = len(beside) == 1 and (study or len(groups) == 1)
    owner = "all runs" if is_only else f"table of {runs[0].configuration}"
    notes += [compared(runs, owner), *notes_on_measures, *comparisons.notes(runs)]
    if study:
        texts = [_with_heading(columns, study.name) for columns in texts]
        table.insert(0, "set", study.name)
    return Tables(table, texts, legend, notes)


def _with_heading(columns: dict[str, list[str]], name: str) -> dict[str, list[str]]:
    """The columns of a table with the name of its data in the first heading."""
    first, *others = columns
    return {f"{first}, {name}": columns[first]} | {heading: columns[heading] for heading in others}


def draw_curves(runs: list[Run], path: Path, styles: Sequence[dict] | None = None):
    """Draw the training curves of runs as PNG and PDF, in styles of their configurations, by default the study's."""
    from reports import figures  # here, as matplotlib takes a second to import

    if not any(run.records for run in runs):
        raise SystemExit(f"error: --curves {path} has nothing to draw: no run has finished an epoch")
    places = {run.configuration: place_of(run) for run in runs}
    of_runs = [(run.configuration, run.records, not run.problem) for run in runs]
    figure = figures.training_curves(of_runs, styles or figures.study_styles(places.values()))
    figures.save(figure, path.with_suffix(""))
