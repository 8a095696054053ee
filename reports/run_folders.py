"""Run folders read back: the configuration that a run belongs to, its results, and which of them may be averaged."""

import json
import math
import re
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import yaml

from training import arguments
from training.provenance import data_name, read_starts
from training.records import CHANGES, LOG, SUMMARY, read_records

ACCURACIES = {"test_acc1": "raw", "test_acc1_ema": "EMA"}
FINITE = ("train_loss", "test_loss", "test_loss_ema", *ACCURACIES)  # in the last epoch, unless the run failed
MAY_DIFFER = (
    *("seed", "output_dir", "resume", "start_epoch", "config", "data_path", "num_workers", "pin_mem", "device"),
    *("dist_url", "dist_eval", "world_size", "local_rank", "resplit", "model_ema_force_cpu", "log_interval"),
    *("tensorboard", "redundancy_every", "grad_norms_every", "save_every_steps", "save_every_minutes"),
    *("keep_checkpoints", "save_predictions", "check_data", "dry_run", "loader_timeout", "deterministic"),
    *("scale_lr_flag", "fused_opt", "decode_once"),  # the last two of earlier versions
)  # flags of where and how a run ran, not of what it trained
REPORT = "redundancy.json"  # of analyze.py; with the log of main.py the sources of redundancy, the better one first
PROVENANCE = {
    "data_set": "data set {}",
    "split": "split {}",
    "files": "files {}",
    "images": "the first {} images",
    "input_size": "{} pixels wide",
    "weights": "{} weights",
    "function": "function level on {}",
}
"""{what must be equal in all runs, where it is known: its words in a note}."""
MAY_LACK = ("files", "function")  # unknown in a report of an earlier version, or without these measures


@dataclass
class Measured:
    """Redundancy from one source.

    Attributes:
        measures: {measure: value}, at least one.
        epoch: the last one in which the measured weights were trained, from 0; None where that is not known.
        provenance: the values of `PROVENANCE`; None where one is not known.
    """

    measures: dict[str, float]
    epoch: int | None
    provenance: dict


@dataclass
class Run:
    """The contents of a run folder.

    Attributes:
        configuration: the name of the row it belongs to.
        folder: its path.
        flags: its args.yaml; empty where that cannot be read.
        records: one dict for each epoch, in order.
        redundancy: {REPORT or LOG: its measures}, without a source that has none.
        starts: the entries of its environment.json; none for a run of an earlier version.
        changes: the lines of its changes.jsonl.
        problem: why it is not averaged, "unfinished: ..." or "failed: ..."; None for a finished run.
    """

    configuration: str
    folder: Path
    flags: dict = field(default_factory=dict)
    records: list[dict] = field(default_factory=list)
    redundancy: dict[str, Measured] = field(default_factory=dict)
    starts: list[dict] = field(default_factory=list)
    changes: list[dict] = field(default_factory=list)
    problem: str | None = None

    @property
    def name(self) -> str:
        return f"{self.configuration}/seed{self.flags.get('seed', '?')}"

    @property
    def data_name(self) -> str | None:
        if self.starts:
            return self.starts[-1]["data"]["name"]
        return data_name(self.flags["data_set"], self.flags.get("data_path")) if "data_set" in self.flags else None

    def values(self, source: str | None) -> dict[str, float]:
        """Accuracies of the last epoch in percent, the measures of `source`, the median throughput in images/s."""
        speeds = [r["train_images_per_s"] for r in self.records if _is_finite(r.get("train_images_per_s"))]
        speed = {"images_per_s": statistics.median(speeds)} if speeds else {}
        measures = self.redundancy[source].measures if source in self.redundancy else {}
        return measures | speed | {name: self.records[-1].get(name) for name in ACCURACIES}


def find_runs(outs: list[str]) -> list[Run]:
    """Read all runs below some folders, each once, sorted by their path within each of `outs`.

    Raises:
        SystemExit: a folder has no run; the runs of a configuration differ in more than their seed, or have the same.
    """
    runs = {}
    for out in map(Path, outs):
        folders = sorted((path.parent for path in out.rglob("args.yaml")), key=_natural)
        if not folders:
            raise SystemExit(f"error: no run folder found under {out}: no folder there contains args.yaml")
        for folder in folders:
            if folder.resolve() not in runs:
                runs[folder.resolve()] = read_run(folder, configuration_name(folder, out))
    for name in {run.configuration for run in runs.values()}:
        _check_configuration([run for run in runs.values() if run.configuration == name and run.flags])
    return [*runs.values()]


def configuration_name(folder: Path, out: Path) -> str:
    """The path of a run below `out` without its seed; the last name in the absolute path where nothing else is left."""
    path = without_seed(folder)
    if path != out and path.is_relative_to(out):
        return str(path.relative_to(out))
    return without_seed(folder.resolve()).name


def without_seed(path: Path) -> Path:
    """The path that runs have in common if they differ only in their seed: out/plain for out/plain/seed0.

    out/plain-seed0 and out/plain_seed0 become out/plain, too.
    """
    if re.fullmatch(r"seed\d+", path.name):
        return path.parent
    return path.with_name(re.sub(r"[-_]seed\d+$", "", path.name)) if path.name else path


def place_in_study(folder: Path) -> int:
    """The place of a run's configuration among those beside it, plain first, then in the order of their names."""
    own = without_seed(folder.resolve())
    found = [*own.parent.glob("*/args.yaml"), *own.parent.glob("*/seed*/args.yaml")]
    rows = {own, *(without_seed(path.parent) for path in found)}
    return sorted(rows, key=lambda path: (path.name != "plain", _natural(path))).index(own)


def read_log(path: Path, notices: TextIO | None = None) -> list[dict]:
    """The epochs of a log.txt, in order.

    An epoch that a resumed run repeated counts once, as it was logged last. Lines that are not complete JSON are
    skipped, with a notice, by default on stdout.
    """
    records = []
    for number, record in enumerate(read_records(path), 1):
        if record is None:
            print(f"{path}:{number}: not a complete JSON line, skipped", file=notices)
        else:
            records = [earlier for earlier in records if earlier["epoch"] < record["epoch"]] + [record]
    return records


def read_run(folder: Path, configuration: str) -> Run:
    """Read a run folder; a file that cannot be read makes it a failed run."""
    run = Run(configuration, folder)
    try:
        flags = yaml.safe_load((folder / "args.yaml").read_text())
        if not isinstance(flags, dict) or not {"seed", "epochs"} <= flags.keys():
            raise ValueError("args.yaml does not contain the flags of a run")
        run.flags = flags
        run.records = read_log(folder / LOG, sys.stderr) if (folder / LOG).exists() else []
        run.starts = read_starts(folder)
        changes = read_records(folder / CHANGES) if (folder / CHANGES).exists() else []
        if not all(isinstance(change, dict) and "epoch" in change for change in changes):
            raise ValueError(f"{CHANGES} is damaged")
        run.changes = changes
        sources = {REPORT: _reported(_read_json(folder / REPORT)), LOG: _logged(run)}
        run.redundancy = {source: measured for source, measured in sources.items() if measured.measures}
        run.problem = _problem(run, _read_json(folder / SUMMARY))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        run.problem = f"failed: its files cannot be read ({' '.join(str(error).split())})"
    return run


def _read_json(path: Path) -> dict:
    """A JSON object; empty where there is no such file."""
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except json.JSONDecodeError:
        raise ValueError(f"{path.name} is not complete JSON") from None


def _reported(report: dict) -> Measured:
    """What a redundancy.json has."""
    measured_on = report.get("measured_on", {})
    measures = {name: value for name, value in report.get("summary", {}).items() if _is_finite(value)}
    return Measured(measures, measured_on.get("epoch"), {name: measured_on.get(name) for name in PROVENANCE})


def _logged(run: Run) -> Measured:
    """What the last epoch of a log.txt has."""
    record, prefix = run.records[-1] if run.records else {}, "redundancy_"
    measures = {name.removeprefix(prefix): value for name, value in record.items()
                if name.startswith(prefix) and _is_finite(value)}  # fmt: skip
    images = measures.pop("images", None)
    provenance = {"data_set": run.data_name, "split": run.flags.get("val_split") or "validation"}
    provenance["files"] = run.starts[-1]["data"]["val_digest"] if run.starts else None
    provenance |= {"input_size": run.flags.get("input_size"), "images": images, "weights": "raw"} | {"function": None}
    return Measured(measures, record.get("epoch"), provenance)


def _problem(run: Run, summary: dict) -> str | None:
    """Why a run is not averaged."""
    num_epochs = run.records[-1]["epoch"] + 1 if run.records else 0
    if run.records and "train_loss" not in run.records[-1]:
        return f"failed: no step taken in epoch {num_epochs - 1}"
    for name, value in run.records[-1].items() if run.records else ():
        if name in FINITE and not _is_finite(value):
            return f"failed: {name} is {value} in epoch {num_epochs - 1}"
    if not summary:
        return f"unfinished: epoch {num_epochs} of {run.flags['epochs'] + run.flags.get('cooldown_epochs', 0)}"
    if summary["epochs"] != num_epochs:
        return f"failed: log.txt ends after {num_epochs} epochs, summary.json reports {summary['epochs']}"
    return None


def _check_configuration(runs: list[Run]):
    """Raise SystemExit for runs of a configuration that cannot be averaged.

    A flag that the version of a run did not have is at its default.
    """
    defaults = arguments.defaults()
    for run in runs[1:]:
        for name in runs[0].flags | run.flags:
            ours, theirs = (flags.get(name, defaults.get(name)) for flags in (runs[0].flags, run.flags))
            if name not in MAY_DIFFER and ours != theirs:
                values = f"{ours} in {runs[0].folder}, {theirs} in {run.folder}"
                flag = f"--{name.replace('_', '-')}"
                raise SystemExit(f"error: the runs of {run.configuration} differ in {flag}: {values}")
    folders = {}
    for run in runs:
        seed, name = run.flags["seed"], run.configuration
        other = folders.setdefault(seed, run.folder)
        if other != run.folder:
            raise SystemExit(f"error: {name} has seed {seed} twice: {other} and {run.folder}")


def _is_finite(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _natural(path: Path) -> list:
    """A sort key by which run2 comes before run10."""
    return [int(word) if i % 2 else word for i, word in enumerate(re.split(r"(\d+)", str(path)))]
