"""Run folders read back: which cell of a study a run belongs to, what it tells, and whether it may be averaged."""

import json
import math
import re
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

import yaml

import figures

ACCURACIES = {"test_acc1": "raw", "test_acc1_ema": "EMA"}
FINITE = ("train_loss", "test_loss", "test_loss_ema", *ACCURACIES)  # in the last epoch, unless the run failed
MAY_DIFFER = (
    *("seed", "output_dir", "resume", "start_epoch", "config", "data_path", "num_workers", "pin_mem", "device"),
    *("dist_url", "dist_eval", "world_size", "local_rank", "resplit", "model_ema_force_cpu", "log_interval"),
    *("tensorboard", "redundancy_every"),
)  # flags of where and how a run ran, not of what it trained


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


def _is_finite(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _natural(path: Path) -> list:
    """A sort key by which run2 comes before run10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", str(path)))]
