"""A run that was read back from its folder or its record: results, measures, and why it may not be averaged."""

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from diversity.measures.registry import ARROWS
from pipeline.holdout import val_name
from training import arguments
from training.changes import Change
from training.parsing import flag_of
from training.provenance import data_name
from training.records import LOG


@dataclass(frozen=True)
class Result:
    """A result of the last evaluation that a table has on request, like a measure of redundancy.

    Attributes:
        heading: of its column.
        better: "lower" or "higher".
    """

    heading: str
    better: str

    def label(self, _place: str = "") -> str:
        """Its heading with an arrow that points to better values."""
        return self.heading + ARROWS[self.better]


ACCURACIES = {"test_acc1": "raw", "test_acc1_ema": "EMA"}
RESULTS = {
    **{"test_acc5": Result("top-5 raw, %", "higher"), "test_acc5_ema": Result("top-5 EMA, %", "higher")},
    **{"test_loss": Result("test loss raw", "lower"), "test_loss_ema": Result("test loss EMA", "lower")},
    **{"test_ece": Result("calibration error raw, %", "lower")},
    **{"test_ece_ema": Result("calibration error EMA, %", "lower")},
}
"""{column of log.txt that a table has on request: its entry}"""
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
    """The contents of a run folder, or of a line of a file of records.

    Attributes:
        configuration: the name of the row it belongs to.
        folder: its path; of a record FILE/SET/ROW/seedK.
        flags: its args.yaml; empty where that cannot be read.
        records: one dict for each epoch, in order; of a record, only the last one is complete.
        report: its redundancy.json, of a record without what is large; empty without one.
        redundancy: {REPORT or LOG: its measures}, without a source that has none.
        own_measures: measures that the program of an earlier study defined, under names that begin with its file's.
        starts: the entries of its environment.json; none for a run of an earlier version.
        changes: the lines of its changes.jsonl.
        commit: of the program; None where it is not known.
        study: FILE/SET of a record: only runs of one study are compared; None for a run folder.
        place: of a record's row among those of its file, for its colour; None for a run folder.
        problem: why it is not averaged, "unfinished: ..." or "failed: ..."; None for a finished run.
    """

    configuration: str
    folder: Path
    flags: dict = field(default_factory=dict)
    records: list[dict] = field(default_factory=list)
    report: dict = field(default_factory=dict)
    redundancy: dict[str, Measured] = field(default_factory=dict)
    own_measures: dict[str, float] = field(default_factory=dict)
    starts: list[dict] = field(default_factory=list)
    changes: list[dict] = field(default_factory=list)
    commit: str | None = None
    study: Path | None = None
    place: int | None = None
    problem: str | None = None

    @property
    def name(self) -> str:
        name = f"{self.configuration}/seed{self.flags.get('seed', '?')}"
        return f"{self.study.name}/{name}" if self.study else name

    @property
    def data_name(self) -> str | None:
        if self.starts:
            return self.starts[-1]["data"]["name"]
        return data_name(self.flags["data_set"], self.flags.get("data_path")) if "data_set" in self.flags else None

    def values(self, source: str | None) -> dict[str, float]:
        """Accuracies and `RESULTS` of the last epoch, the measures of `source`, the median throughput in images/s."""
        speeds = [r["train_images_per_s"] for r in self.records if _is_finite(r.get("train_images_per_s"))]
        speed = {"images_per_s": statistics.median(speeds)} if speeds else {}
        measures = self.redundancy[source].measures if source in self.redundancy else {}
        measures = self.own_measures | measures
        return measures | speed | {name: self.records[-1].get(name) for name in (*ACCURACIES, *RESULTS)}

    def hours(self) -> float | None:
        """Hours of training: images over images/s, without evaluation; None where one of them is not known."""
        images = self.starts[-1]["data"].get("train_images") if self.starts else None
        speeds = [record.get("train_images_per_s") for record in self.records]
        if not images or not speeds or not all(_is_finite(speed) and speed > 0 for speed in speeds):
            return None
        return sum(images / speed for speed in speeds) / 3600

    def add_results(self, summary: dict):
        """Set `redundancy` and `problem` from the other attributes and the run's summary.json."""
        sources = {REPORT: _reported(self.report), LOG: _logged(self)}
        self.redundancy = {source: measured for source, measured in sources.items() if measured.measures}
        self.problem = _problem(self, summary)


def by_study(runs: Iterable[Run]) -> dict[Path | None, list[Run]]:
    """{study: its runs}, in their order; the runs of folders are one study."""
    studies = {}
    for run in runs:
        studies.setdefault(run.study, []).append(run)
    return studies


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
    split = val_name(run.flags.get("val_split"), run.flags.get("val_fraction", 0.0))
    provenance = {"data_set": run.data_name, "split": split}
    provenance["files"] = run.starts[-1]["data"].get("val_digest") if run.starts else None
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


def changed_flags(before: Mapping, after: Mapping) -> list[Change]:
    """What differs between the flags of two runs that prevents their average: all but `MAY_DIFFER`.

    A flag that the version of a run did not have is at its default.
    """
    defaults = arguments.defaults()
    pairs = {name: (before.get(name, defaults.get(name)), after.get(name, defaults.get(name)))
             for name in {**before, **after} if name not in MAY_DIFFER}  # fmt: skip
    return [Change(flag_of(name), *values) for name, values in pairs.items() if values[0] != values[1]]


def check_configuration(runs: list[Run]):
    """Refuse to average runs of a configuration that differ in more than their seed.

    Raises:
        SystemExit: they differ in a flag, or have the same seed.
    """
    for run in runs[1:]:
        for flag, ours, theirs in changed_flags(runs[0].flags, run.flags):
            values = f"{ours} in {runs[0].folder}, {theirs} in {run.folder}"
            raise SystemExit(f"error: the runs of {run.configuration} differ in {flag}: {values}")
    folders = {}
    for run in runs:
        seed, name = run.flags["seed"], run.configuration
        other = folders.setdefault(seed, run.folder)
        if other != run.folder:
            raise SystemExit(f"error: {name} has seed {seed} twice: {other} and {run.folder}")


def _is_finite(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
