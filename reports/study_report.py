"""The report of a study: one folder with a page to read, tables and figures, made by one call from runs or records."""

import contextlib
import io
import re
import shutil
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path

from diversity import TapError
from reports import figures
from reports.chosen_measures import page_measures, reason_against
from reports.comparisons import check_rows
from reports.report_figures import FIGURES, draw_all
from reports.report_page import Asked, Part, Section, page
from reports.run_folders import find_runs
from reports.runs import REPORT, Run, by_study
from reports.study_table import draw_curves, group_tables, problems, study_groups
from reports.tables import markdown
from reports.term_values import term_table
from reports.verdicts import verdicts
from training.checkpoint import LAST
from utils import joined_world

PAGE, TABLE = "report.md", "table.md"


def write_report(
    asked: Asked, outs: Sequence[str | Path], target: Path, also: Sequence[str | Path] = (), measure: bool = True
) -> Path:
    """Write the report of a study into a folder: report.md, table.md and the figures; returns the path of report.md.

    Figures need what the runs have: those of redundancy and of the function level a redundancy.json, those of heads
    the figures that analyze.py leaves beside it. The page says what is left out.

    Args:
        outs: folders with run folders ROW/seedK of the study, one for each data set, or .jsonl files of records.
        target: folder, which is made; OUT/report in study.py.
        also: .jsonl files of other studies, whose tables and curves are shown beside.
        measure: whether analyze.py measures finished runs first that have weights and no redundancy.json.

    Raises:
        SystemExit: there is no run, the runs of a row differ in more than their seed, or a file cannot be written.
    """
    not_measured = measure_runs(chain(*map(find_runs, [[out] for out in outs]))) if measure else []
    parts = [*_parts(asked, outs, is_asked=True), *_parts(asked, also, is_asked=False)]
    rows = dict.fromkeys([asked.baseline, *asked.rows, *(run.configuration for part in parts for run in part.runs)])
    styles = dict(zip(rows, figures.curve_styles(), strict=False))
    try:
        target.mkdir(parents=True, exist_ok=True)
        sections = [*chain(*(_sections(asked, part, styles, target) for part in parts))]
        (target / PAGE).write_text(page(asked, parts, sections, not_measured), encoding="utf-8")
        texts = [*chain(*(section.tables.texts for section in sections))]
        notes = [*chain(*(section.tables.legend for section in sections))]
        notes += [f"{section.label}: {note}" for section in sections for note in section.tables.notes]
        notes += chain(*(problems(part.runs) for part in parts))
        (target / TABLE).write_text(markdown(texts, [*dict.fromkeys(notes)]), encoding="utf-8")
    except OSError as error:
        raise SystemExit(f"error: {error.filename or target} cannot be written: {error.strerror}") from None
    return target / PAGE


def measure_runs(runs: Sequence[Run]) -> list[str]:
    """Measure the finished runs that have weights and no redundancy.json, as `analyze.py RUN` does.

    Returns:
        One line for each run that cannot be measured.
    """
    todo = [run for run in runs if not run.problem and not run.report and (run.folder / LAST).exists()]
    if not todo:
        return []
    from reports.redundancy import analyze  # here, as it imports models and data sets

    lines = []
    with joined_world("auto", "env://") as world:
        for run in todo:
            print(f"measuring {run.folder}", flush=True)
            try:
                with contextlib.redirect_stdout(io.StringIO()):  # its tables, which are in redundancy.md too
                    analyze([str(run.folder)], None, 256, None, False, "last", 0, False, [], [], world)
            except (SystemExit, TapError) as error:
                lines.append(f"{run.name} was not measured: {str(error).removeprefix('error: ')}")
    return lines


def _parts(asked: Asked, outs: Sequence[str | Path], is_asked: bool) -> list[Part]:
    """The runs of each data set, the rows in the order of the study."""
    parts = []
    for out in map(Path, outs):
        for study, runs in by_study(find_runs([out])).items():
            check_rows(runs)
            label = study.name if study else next((run.data_name for run in runs if run.data_name), out.name)
            label += "" if is_asked else f", {out.stem}"
            label += f" ({out})" if label in [part.label for part in parts] else ""
            order = [asked.baseline, *asked.rows]
            runs.sort(key=lambda run: order.index(run.configuration) if run.configuration in order else len(order))
            parts.append(Part(label, runs, is_asked))
    return parts


def _sections(asked: Asked, part: Part, styles: dict[str, dict], target: Path) -> list[Section]:
    """The results of a part, for each group of its runs that can be compared; its figures are drawn."""
    groups, sections = study_groups(part.runs, asked.baseline), []
    for number, runs in enumerate(groups, 1):
        label = part.label if number == 1 else f"{part.label}, group {number}"
        tables = group_tables(runs, groups, page_measures(runs), asked.baseline)
        of_group = verdicts(tables.statistics, asked.rule)
        images, left_out = _draw(runs, _file_name(label), styles, target)
        sections.append(Section(label, part.is_asked, tables, of_group, images, left_out, term_table(runs)))
    return sections


def _draw(runs: list[Run], slug: str, styles: dict[str, dict], target: Path) -> tuple[dict[str, str], list[str]]:
    """Draw the figures of comparable runs; returns {file: caption} and sentences on what is left out."""
    images, left_out = {}, []
    if any(run.records for run in runs):
        of_rows = [styles[row] for row in dict.fromkeys(run.configuration for run in runs)]
        draw_curves(runs, target / f"curves_{slug}.png", of_rows)
        images[f"curves_{slug}.png"] = "Training curves: thick lines are means of finished runs, thin lines are runs."
    measured = [run for run in runs if not run.problem and REPORT in run.redundancy]
    reason = reason_against(REPORT, measured) if measured else f"no finished run has a {REPORT}"
    if reason:
        advice = "python analyze.py RUN ... --function-level measures runs that have weights"
        return images, [f"Figures of redundancy and of the function level are not drawn: {reason} ({advice})."]
    reports = {}
    for run in measured:
        reports.setdefault(run.configuration, []).append(run.report)
    drawn = draw_all(reports, [styles[row] for row in reports])
    for name, figure in drawn.items():
        figures.save(figure, target / f"{name}_{slug}")
        images[f"{name}_{slug}.png"] = FIGURES[name].caption
    if absent := [name for name in FIGURES if name not in drawn]:
        left_out.append(f"Not drawn, as a run or its record lacks the numbers: {', '.join(absent)}.")
        if "function" in absent:
            left_out.append("analyze.py --function-level measures what the figure of the function level draws.")
    rows = dict.fromkeys(run.configuration for run in runs if not run.problem)
    if without := [row for row in rows if row not in reports]:
        left_out.append(f"Without {', '.join(without)}, of which no run has a {REPORT}.")
    return images | _heads(measured, slug, target), left_out


def _heads(runs: list[Run], slug: str, target: Path) -> dict[str, str]:
    """Copy the figure of heads that analyze.py left in the folder of each row's first run; {file: caption}."""
    images = {}
    for row, run in {run.configuration: run for run in reversed(runs)}.items():
        for path in islice(sorted(run.folder.glob("heads_*.png")), 1):
            file = f"heads_{slug}_{_file_name(row)}.png"
            shutil.copyfile(path, target / file)
            images[file] = f"Attention maps of the heads of one block of {run.name}."
    return dict(reversed(images.items()))


def _file_name(text: str) -> str:
    """A text as part of the name of a file and of a link."""
    return re.sub(r"[^\w.-]+", "_", text).strip("_")
