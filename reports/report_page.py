"""The page of a study's report, from top to bottom: in short, what was asked, what was run, results, notes."""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from reports.rows import decimals_of
from reports.runs import Run
from reports.statistics import runs_needed
from reports.study_table import Tables, problems
from reports.tables import markdown_table
from reports.verdicts import DECIDED, DIFFERENT, Rule, Verdict, outcome_heading, verdict_sentences, verdict_tables

IN_SHORT = ("test_acc1", "function_patch_probe", "function_knn_last")
"""Outcomes of the summary; a study's own measures are among them too."""
CONDITIONS = ("device", "card", "processes", "precision", "python", "torch", "torchvision", "timm")
"""Keys of environment.json that the page names."""


@dataclass(frozen=True)
class Asked:
    """What a study was to run.

    Attributes:
        title: of the page.
        rows: {row: its flags as a reader writes them}, in the order of the page.
        seeds: of each row.
        baseline: the row that the others are compared with.
        lines: further sentences, such as the recipe, the flags of all rows, and the command of the study.
        alpha, min_runs: of the `Rule` of the verdicts.
    """

    title: str
    rows: dict[str, str]
    seeds: Sequence[int]
    baseline: str
    lines: Sequence[str] = field(default_factory=list)
    alpha: float = 0.01
    min_runs: int = 5

    @property
    def rule(self) -> Rule:
        return Rule(self.baseline, self.alpha, self.min_runs)


class Part(NamedTuple):
    """The runs of a study on one data set.

    Attributes:
        label: what the page calls the data.
        is_asked: whether the runs are of the study of the page, and not of another one beside it.
    """

    label: str
    runs: list[Run]
    is_asked: bool


class Section(NamedTuple):
    """The results of runs that can be compared.

    Attributes:
        label: its heading.
        is_asked: as of its `Part`.
        images: {file: caption}.
        left_out: sentences on figures that are not drawn.
        terms: of `term_table`.
    """

    label: str
    is_asked: bool
    tables: Tables
    verdicts: list[Verdict]
    images: dict[str, str]
    left_out: list[str]
    terms: dict[str, list[str]]


def page(asked: Asked, parts: Sequence[Part], sections: Sequence[Section], remarks: Sequence[str] = ()) -> str:
    """The Markdown of the page; `remarks` are further notes."""
    own, beside = ([s for s in sections if s.is_asked is is_asked] for is_asked in (True, False))
    blocks = [f"# {asked.title}", "## In short", _in_short(asked, parts, own)]
    blocks += ["## What was asked", *_asked(asked), "## What was run", *_run(asked, parts)]
    legend = [*dict.fromkeys(itertools.chain(*(section.tables.legend for section in sections)))]
    legend = [line for line in legend if not any(other.startswith(f"{line} ") for other in legend)]
    blocks += ["## Results", "How to read the tables:", _list(legend)]
    blocks += itertools.chain(*(_results(section) for section in own))
    if beside:
        blocks += ["## Other studies, beside this one", "Their runs are not averaged or compared with those above."]
        blocks += itertools.chain(*(_results(section) for section in beside))
    blocks.append("## Notes")
    for section in sections:
        blocks += [f"### Notes on {section.label}", _list(section.tables.notes)]
    failed = problems(run for part in parts for run in part.runs)
    blocks += ["### Runs that are not averaged", _list(failed)] if failed else []
    blocks += ["### Further remarks", _list(remarks)] if remarks else []
    return "\n\n".join(blocks) + "\n"


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _in_short(asked: Asked, parts: Sequence[Part], sections: Sequence[Section]) -> str:
    """How many runs are finished, and the verdicts in the outcomes that a study is about."""
    runs = [run for part in parts if part.is_asked for run in part.runs]
    pairs = {*itertools.product(asked.rows, asked.seeds)}
    finished = [(run.configuration, run.flags.get("seed")) in pairs for run in runs if not run.problem]
    total = len(pairs) * sum(part.is_asked for part in parts)
    lines = [f"{sum(finished)} of {total} runs are finished."]
    if others := len(finished) - sum(finished):
        lines.append(f"{others} finished runs of other rows or seeds are in the tables too.")
    outcomes = (*IN_SHORT, *dict.fromkeys(name for run in runs for name in run.own_measures))
    for section in sections:
        lines += [f"{section.label}, {line}" for line in _outcomes_in_short(asked, section, outcomes)]
    if not any(section.verdicts for section in sections):
        lines.append(f"Nothing can be compared: {asked.baseline} and another row need finished runs.")
    return _list(lines)


def _outcomes_in_short(asked: Asked, section: Section, outcomes: Sequence[str]) -> list[str]:
    """A line for each outcome, and what the deviation between runs allows to find."""
    lines, statistics = [], section.tables.statistics
    words = {verdict.word for verdict in section.verdicts if verdict.outcome in outcomes}
    for outcome in outcomes:
        if found := [verdict for verdict in section.verdicts if verdict.outcome == outcome]:
            sentences = verdict_sentences(found, asked.baseline, decimals_of(statistics, outcome))
            lines.append(f"{outcome_heading(outcome)}. {sentences}")
    if words & {*DECIDED} and not words & {*DIFFERENT}:
        lines.append("no row differs in these outcomes. The intervals say how large a gain or a loss is ruled out.")
    deviations = statistics["test_acc1_std"].dropna()
    if len(deviations) and deviations.max() > 0:
        deviation = math.sqrt((deviations**2).mean())
        lines.append(
            f"the runs of a row deviate by {deviation:.2f} points in top-1 raw. A difference of one point is found "
            f"with p < {asked.alpha} in 80 % of studies of {runs_needed(deviation, 1, asked.alpha)} runs of each row."
        )
    return lines


def _asked(asked: Asked) -> list[str]:
    """The rows with their flags, seeds and the rule."""
    names = [f"{row} (baseline)" if row == asked.baseline else row for row in asked.rows]
    flags = [f"`{flags}`" if flags else "-" for flags in asked.rows.values()]
    seeds = ", ".join(map(str, asked.seeds))
    lines = [*asked.lines, f"Seeds of each row: {seeds}.", f"Rule: {asked.rule}"]
    return [markdown_table({"row": names, "its flags": flags}), _list(lines)]


def _missing(asked: Asked, part: Part) -> list[tuple[str, int]]:
    """Rows and seeds that were asked for and have no run."""
    have = {(run.configuration, run.flags.get("seed")) for run in part.runs}
    return [pair for pair in itertools.product(asked.rows, asked.seeds) if pair not in have]


def _run(asked: Asked, parts: Sequence[Part]) -> list[str]:
    """A table of the states of each part's runs, and the conditions under which they ran."""
    blocks = []
    for part in parts:
        missing = _missing(asked, part) if part.is_asked else []
        rows = dict.fromkeys([*(asked.rows if part.is_asked else ()), *(run.configuration for run in part.runs)])
        columns = {f"row, {part.label}": [*rows]}
        for state in ("finished", "unfinished", "failed"):
            of_state = [run for run in part.runs if (run.problem or "finished").startswith(state)]
            columns[f"seeds {state}"] = [
                _seeds(run.flags.get("seed", "?") for run in of_state if run.configuration == row) for row in rows
            ]
        if part.is_asked:
            columns["seeds missing"] = [_seeds(seed for owner, seed in missing if owner == row) for row in rows]
        blocks += [markdown_table(columns), _list(_conditions(part.runs))]
    return blocks


def _seeds(seeds: Iterable[int | str]) -> str:
    return ", ".join(map(str, seeds)) or "-"


def _conditions(runs: Sequence[Run]) -> list[str]:
    """Commit, hours and further conditions of runs, with the number of runs where they differ."""
    values = {"commit": [run.commit or "not known" for run in runs]}
    for name in CONDITIONS:
        of_runs = [run.starts[-1].get(name) if run.starts else None for run in runs]
        values |= {name: ["not known" if value is None else str(value) for value in of_runs]} if any(of_runs) else {}
    lines = ["; ".join(f"{name} {_counted(of_runs)}" for name, of_runs in values.items())]
    lines[0] += "" if "device" in values else "; device and versions not known"
    hours = [hours for run in runs if not run.problem and (hours := run.hours()) is not None]
    if hours:
        lines.append(
            f"training took {_hours(sum(hours))} in {len(hours)} finished runs, {_hours(max(hours))} in the longest "
            "(images over images/s, without evaluation)"
        )
    else:
        lines.append("hours of training not known")
    return lines


def _counted(values: Sequence[str]) -> str:
    counts = {value: values.count(value) for value in values}
    return next(iter(counts)) if len(counts) == 1 else ", ".join(f"{value} ({n} runs)" for value, n in counts.items())


def _hours(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"


def _results(section: Section) -> list[str]:
    """Tables, verdicts and figures of comparable runs."""
    blocks = [f"### {section.label}", *map(markdown_table, section.tables.texts)]
    if any(verdict.word in DECIDED for verdict in section.verdicts):
        blocks += ["Verdicts by the rule above:"]
        blocks += map(markdown_table, verdict_tables(section.verdicts))
    elif section.verdicts:
        blocks += ["No verdict by the rule above: in every row and outcome too few runs, or none that differ."]
    if section.terms:
        blocks += ["Terms at the first step, before any update, and as means over the last epoch:"]
        blocks.append(markdown_table(section.terms))
    for file, caption in section.images.items():
        blocks += [f"![{file.partition('_')[0]}]({file})", f"*{caption}*"]
    return [*blocks, _list(section.left_out)] if section.left_out else blocks
