"""The report of a study: one folder with a page to read, tables and figures, made by one call from runs or records."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from reports.run_folders import find_runs
from reports.run_records import write_records


@dataclass(frozen=True)
class Asked:
    """What a study was to run.

    Attributes:
        title: of the page.
        rows: {row: its flags as a reader writes them}, in the order of the page.
        seeds: of each row.
        baseline: the row that the others are compared with.
        lines: further sentences, such as the recipe, the flags of all rows, and the command of the study.
        min_runs: finished runs of a row and of the baseline below which no verdict is given.
    """

    title: str
    rows: dict[str, str]
    seeds: Sequence[int]
    baseline: str
    lines: Sequence[str] = field(default_factory=list)
    min_runs: int = 5


def write_report(
    asked: Asked, outs: Sequence[str | Path], target: Path, also: Sequence[str | Path] = (), measure: bool = True
) -> Path:
    """Write the report of a study into a folder: report.md, table.md and the figures; return the path of report.md.

    Args:
        outs: folders with run folders ROW/seedK of the study, one for each data set, or .jsonl files of records.
        target: folder, which is made; OUT/report in study.py.
        also: .jsonl files of other studies, whose tables and curves are shown beside.
        measure: whether finished runs that have weights and no redundancy.json are measured first.
    """
    raise NotImplementedError


def collect(outs: Sequence[str | Path], target: Path) -> int:
    """Write the records of the finished runs of `outs` into a .jsonl file; returns its number of records.

    A record that the file has already of the same set, row and seed is replaced, others stay.
    """
    return write_records(find_runs(outs), target)
