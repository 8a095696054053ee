"""What a study finds in its run folders: finished and interrupted runs, the time they took, and runs of other flags."""

import enum
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from reports.run_records import read_records_file, without_folder
from reports.runs import Run, changed_flags
from studies.plan import PlannedRun
from training.changes import Change
from training.parsing import ARGS, with_lists
from training.provenance import data_name, read_starts
from training.records import LOG, PREDICTIONS, SUMMARY, read_records
from utils import write_json

ANALYZED = "analyzed.json"
"""The words with which analyze.py has measured a run, and the seconds that it took; written when it has succeeded."""


class State(enum.Enum):
    """What is left of a run."""

    NEW = "starts"
    INTERRUPTED = "resumes"
    TRAINED = "is analysed"
    FINISHED = "finished, skipped"


def state_of(run: PlannedRun, analyze: list[str] | None) -> State:
    """What is left of a run whose finished training is analysed with the words `analyze`, or is not for None."""
    has_weights = any(weights_of(run.folder))
    lacks_predictions = run.args.save_predictions and not (run.folder / PREDICTIONS).exists()
    if not is_finished(run) or (lacks_predictions and has_weights):
        return State.INTERRUPTED if has_weights else State.NEW
    if analyze is None or not has_weights or _read(run.folder / ANALYZED).get("words") == analyze:
        return State.FINISHED
    return State.TRAINED


def is_finished(run: PlannedRun) -> bool:
    """Whether a run has been trained to its end."""
    return (run.folder / SUMMARY).exists()


def weights_of(folder: Path) -> list[Path]:
    """The checkpoints of a run, the best ones included."""
    return sorted(folder.glob("checkpoint*.pth"))


def check_flags(run: PlannedRun, num_processes: int) -> str | None:
    """Refuse a finished or interrupted run that was trained with other flags than those planned.

    Flags may differ as between the seeds of one row.

    Returns:
        A warning if its data has another name now; the same images may have been moved.

    Raises:
        SystemExit: they differ otherwise, or the folder's args.yaml cannot be read.
    """
    if not (is_finished(run) or weights_of(run.folder)):
        return None
    try:
        before = yaml.safe_load((run.folder / ARGS).read_text())
        starts = read_starts(run.folder)
        if not isinstance(before, dict):
            raise ValueError(f"{ARGS} does not contain the flags of a run")
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise SystemExit(f"error: {run.folder} has a run whose files cannot be read: {reason}") from None
    changes = _changes(before, run)
    batch = run.args.batch_size * run.args.accum_steps * num_processes
    if starts and starts[-1].get("global_batch", batch) != batch:
        changes.append(Change("images per optimizer step", starts[-1]["global_batch"], batch))
    if changes:
        raise SystemExit(
            f"error: {run.folder} was trained with other flags: {', '.join(map(str, changes))}; give the old values, "
            "or choose another OUT"
        )
    old, new = (data_name(flags["data_set"], flags.get("data_path")) for flags in (before, vars(run.args)))
    if old == new:
        return None
    return (
        f"warning: runs of {run.folder.parents[1]} were trained on data {old}, not {new}; other images need another OUT"
    )


def recorded_runs(runs: Sequence[PlannedRun], file: Path) -> dict[str, Run]:
    """{name of a run without a run folder: its record in a file}; none where there is no such file.

    So a study that is continued on another machine, with nothing but its records, skips what is finished.

    Raises:
        SystemExit: the file has a line that is no record, or a record has other flags than those planned.
    """
    records = read_records_file(file) if file.exists() else []
    recorded = {(run.study.name, run.configuration, run.flags["seed"]): run for run in records}
    found = {}
    for run in runs:
        record = recorded.get((data_name(run.args.data_set, run.args.data_path), run.row, run.seed))
        if record is None or (run.folder / ARGS).exists():
            continue
        if changes := _changes(record.flags, run):
            raise SystemExit(
                f"error: {run.name} of {file} was trained with other flags: {', '.join(map(str, changes))}; give the "
                "old values, or choose another file"
            )
        found[run.name] = record
    return found


def _changes(before: Mapping, run: PlannedRun) -> list[Change]:
    """The flags of a run that differ from those planned. A file may lie in another folder, on another machine."""
    after = with_lists(vars(run.args))
    return changed_flags(*({name: without_folder(value) for name, value in flags.items()} for flags in (before, after)))


def epochs_left(run: PlannedRun) -> float:
    """The fraction of a run's epochs that it has not trained, by its log.txt; 1 without a checkpoint."""
    path = run.folder / LOG
    if not (path.exists() and weights_of(run.folder)):
        return 1.0
    trained = max((record["epoch"] + 1 for record in read_records(path) if record), default=0)
    return max(0.0, 1 - trained / (run.args.epochs + run.args.cooldown_epochs))


def seconds_taken(folder: Path) -> float:
    """The time that a finished run took for its training and its analysis; 0 for another one."""
    summary = _read(folder / SUMMARY)
    return summary.get("training_seconds", 0) + _read(folder / ANALYZED).get("seconds", 0) if summary else 0.0


def write_analyzed(folder: Path, words: list[str], seconds: float):
    """Note that analyze.py has measured a run."""
    write_json({"words": words, "seconds": round(seconds, 1)}, folder / ANALYZED)


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
