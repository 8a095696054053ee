"""What a run folder knows about the exported weights: accuracy, redundancy, and where they were trained.

A number is returned only if it was measured with these weights, of this epoch and kind, and with this input size.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from diversity.measures import summary_measures
from models import weights
from models.exporting.preprocessing import Preprocessing
from models.exporting.trained import CHECKPOINT, Trained


def accuracies(trained: Trained) -> dict[str, float]:
    """{"top-1": ..., "top-5": ..., "calibration error": percent, "images": count} on the run's validation set.

    Empty if it was not measured with these weights.
    """
    if not _is_as_trained(trained):
        return {}
    if trained.file.name == CHECKPOINT and trained.folder is not None:
        summary = _read(trained.folder / "summary.json")
        suffix = "_ema" if trained.kind == "EMA" else ""
        keys = {"top-1": "test_acc1", "top-5": "test_acc5", "calibration error": "test_ece", "images": "test_images"}
        if not isinstance(summary, Mapping) or summary.get("epochs") != (trained.epoch or 0) + 1:
            return {}
        return {name: summary[key + suffix] for name, key in keys.items() if key + suffix in summary}
    stored = weights.read(str(trained.file))
    is_best = trained.flags and isinstance(stored.get("acc1"), float) and "optimizer" not in stored
    return {"top-1": stored["acc1"]} if is_best else {}  # checkpoint_best.pth, which contains one kind of weights


def redundancy(trained: Trained) -> tuple[dict[str, tuple[str, float]], str]:
    """{key in the run's redundancy.json: heading and value}, and what was measured on; {} if it was not measured."""
    report = _read(trained.folder / "redundancy.json") if trained.folder and trained.file.name == CHECKPOINT else {}
    measured = report.get("measured_on", {}) if isinstance(report, Mapping) else {}
    own = {"weights": trained.kind, "epoch": trained.epoch, "input_size": trained.preprocessing.input_size}
    if not _is_as_trained(trained) or any(measured.get(key) != value for key, value in own.items()):
        return {}, ""
    rows = {
        key: (measure.label(part), report["summary"][key])
        for key, (measure, part) in summary_measures().items()
        if report["summary"].get(key) is not None
    }
    return rows, f"the first {measured['images']} images of {measured['data_set']} ({measured['split']})"


def start(trained: Trained) -> dict[str, object]:
    """The last entry of the run's environment.json: commit, versions, device; {} if there is none."""
    starts = _read(trained.folder / "environment.json") if trained.folder else []
    return starts[-1] if isinstance(starts, list) and starts and isinstance(starts[-1], dict) else {}


def changes(trained: Trained) -> list[dict]:
    """The flags that were changed during the run, of its changes.jsonl: each has at least a `name`."""
    if not trained.folder or not (trained.folder / "changes.jsonl").exists():
        return []
    lines = (trained.folder / "changes.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


def _is_as_trained(trained: Trained) -> bool:
    """Whether images are preprocessed as in the run, and no weight was resampled."""
    if not trained.flags or trained.notes:
        return False
    return Preprocessing.of_flags(trained.flags, trained.flags["input_size"]) == trained.preprocessing


def _read(path: Path):
    """The content of a JSON file; {} if there is none, or if it is damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return {}
