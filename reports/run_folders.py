"""Run folders read back: which cell of a study a run belongs to, what it tells, and what of it may be averaged."""

import json
import math
import re
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from reports import figures

ACCURACIES = {"test_acc1": "raw", "test_acc1_ema": "EMA"}
FINITE = ("train_loss", "test_loss", "test_loss_ema", *ACCURACIES)  # in the last epoch, unless the run failed
MAY_DIFFER = (
    *("seed", "output_dir", "resume", "start_epoch", "config", "data_path", "num_workers", "pin_mem", "device"),
    *("dist_url", "dist_eval", "world_size", "local_rank", "resplit", "model_ema_force_cpu", "log_interval"),
    *("tensorboard", "redundancy_every", "save_every_steps", "save_every_minutes", "keep_checkpoints"),
    *("loader_timeout", "deterministic"),
)  # flags of where and how a run ran, not of what it trained
REPORT, LOG = "redundancy.json", "log.txt"  # sources of redundancy, the better one first: analyze.py, main.py
PROVENANCE = {
    "data_set": "data set {}",
    "split": "split {}",
    "images": "the first {} images",
    "input_size": "{} pixels wide",
    "weights": "{} weights",
}  # what must be equal in all runs, and how it is said


@dataclass
class Measured:
    """Redundancy as one source has it.

    Attributes:
        measures: {measure: value}, at least one.
        epoch: the last one of the weights measured, from 0; None where that is not known.
        on: the values of PROVENANCE; None where one is not known.
    """

    measures: dict[str, float]
    epoch: int | None
    on: dict


@dataclass
class Run:
    """What a run folder tells.

    Attributes:
        cell: the row it belongs to.
        flags: its args.yaml; empty where that cannot be read.
        records: one dict for each epoch, in order.
        redundancy: {REPORT or LOG: what it has}, without those that have nothing.
        problem: why it is not averaged, "unfinished: ..." or "failed: ..."; None for a finished run.
    """

    cell: str
    folder: Path
    flags: dict = field(default_factory=dict)
    records: list[dict] = field(default_factory=list)
    redundancy: dict[str, Measured] = field(default_factory=dict)
    problem: str | None = None

    @property
    def name(self) -> str:
        return f"{self.cell}/seed{self.flags.get('seed', '?')}"

    def values(self, source: str | None) -> dict[str, float]:
        """Accuracies of the last epoch in percent, the measures `source` has, the median throughput in images/s."""
        speeds = [r["train_images_per_s"] for r in self.records if _is_finite(r.get("train_images_per_s"))]
        speed = {"images_per_s": statistics.median(speeds)} if speeds else {}
        measures = self.redundancy[source].measures if source in self.redundancy else {}
        return measures | speed | {name: self.records[-1].get(name) for name in ACCURACIES}


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
    """The path of a run below `out` without its seed; the last part of the whole path where `out` is below that."""
    cell = without_seed(folder)
    if cell != out and cell.is_relative_to(out):
        return str(cell.relative_to(out))
    return without_seed(folder.resolve()).name


def without_seed(path: Path) -> Path:
    """What runs share that differ in their seed alone: out/plain/seed0 and out/plain-seed0 become out/plain."""
    if re.fullmatch(r"seed\d+", path.name):
        return path.parent
    return path.with_name(re.sub(r"[-_]seed\d+$", "", path.name)) if path.name else path


def read_run(folder: Path, cell: str) -> Run:
    """Read a run folder; what cannot be read makes it a failed run."""
    run = Run(cell, folder)
    try:
        flags = yaml.safe_load((folder / "args.yaml").read_text())
        if not isinstance(flags, dict) or not {"seed", "epochs"} <= flags.keys():
            raise ValueError("args.yaml does not hold the flags of a run")
        run.flags = flags
        for record in figures.read_log(folder / LOG, sys.stderr) if (folder / LOG).exists() else ():
            # a resumed run may have gone back to an earlier epoch
            run.records = [earlier for earlier in run.records if earlier["epoch"] < record["epoch"]] + [record]
        found = {REPORT: _reported(_read_json(folder / REPORT)), LOG: _logged(run)}
        run.redundancy = {source: measured for source, measured in found.items() if measured.measures}
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


def _reported(report: dict) -> Measured:
    measured_on = report.get("measured_on", {})
    measures = {name: value for name, value in report.get("summary", {}).items() if _is_finite(value)}
    return Measured(measures, measured_on.get("epoch"), {name: measured_on.get(name) for name in PROVENANCE})


def _logged(run: Run) -> Measured:
    record, prefix = run.records[-1] if run.records else {}, "redundancy_"
    measures = {name.removeprefix(prefix): value for name, value in record.items()
                if name.startswith(prefix) and _is_finite(value)}  # fmt: skip
    images = measures.pop("images", None)
    on = {"data_set": run.flags.get("data_set"), "split": run.flags.get("val_split") or "validation"}
    on |= {"input_size": run.flags.get("input_size"), "images": images, "weights": "raw"}
    return Measured(measures, record.get("epoch"), on)


def choose_redundancy(runs: list[Run]) -> tuple[str | None, str | None]:
    """The one source of the redundancy of all runs: what was measured differently is not compared.

    Returns:
        source: the first of REPORT and LOG that has all finished runs, measured alike after their last epoch, or None.
        note: what was measured, or why nothing is compared; None where nothing was measured.
    """
    finished = [run for run in runs if not run.problem]
    if not any(run.redundancy for run in finished):
        return None, None
    reasons = []
    for source in (REPORT, LOG):
        reason = _unfit(finished, source)
        if reason is None:
            on = finished[0].redundancy[source].on
            said = ", ".join(text.format(on[name]) for name, text in PROVENANCE.items() if on[name] is not None)
            passed_over = reasons and any(REPORT in run.redundancy for run in finished)
            instead = f", as {reasons[0]}" if passed_over else ""
            return source, f"redundancy: measured after the last epoch on {said} ({source}{instead})"
        reasons.append(reason)
    return None, f"redundancy: not tabled, as {' and '.join(reasons)}; run analyze.py on all runs alike"


def _unfit(runs: list[Run], source: str) -> str | None:
    """Why a source cannot serve all runs; None if it can."""
    for run in runs:
        if source not in run.redundancy:
            return f"{run.name} has none in {REPORT if source == REPORT else f'the last epoch of {LOG}'}"
        ours, theirs, last = runs[0].redundancy[source], run.redundancy[source], run.records[-1]["epoch"]
        if theirs.epoch != last:
            epoch = "an unknown epoch" if theirs.epoch is None else f"epoch {theirs.epoch}"
            return f"the {source} of {run.name} is of {epoch}, not of its last, {last}"
        for name, text in PROVENANCE.items():
            if ours.on[name] != theirs.on[name]:
                values = text.format(ours.on[name]), text.format(theirs.on[name])
                return f"in {source}, {runs[0].name} was measured on {values[0]}, {run.name} on {values[1]}"
    return None


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


def _is_finite(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _natural(path: Path) -> list:
    """A sort key by which run2 comes before run10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", str(path)))]
