"""What an evaluation writes and prints about each of its sets, from the results of single images."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from pipeline.evaluation_set_classes import OpenSet
from pipeline.evaluation_set_images import SEVERITIES
from pipeline.evaluation_sets import descriptions
from training.classification_metrics import (
    ALEXNET_ERRORS,
    ImageResults,
    class_accuracies,
    confusion_pairs,
    corruption_errors,
    expected_calibration_error,
    mean_corruption_error,
    real_accuracy,
    summary,
)
from training.predictions import results_of

NUM_PAIRS = 20
"""Pairs of classes in evaluation.json, those that are confused most often."""

NAMES = {"raw": "raw", "ema": "EMA"}
"""{kind of weights: its name in tables}"""


class SetResult(NamedTuple):
    """The results of a set.

    Attributes:
        of: the set.
        measured: {raw or ema: what `measure` returns of it}.
        arrays: what `Predictions.gather` returns.
    """

    of: OpenSet
    measured: dict[str, dict]
    arrays: dict[str, np.ndarray]


def record_of(result: SetResult) -> dict[str, object]:
    """The results of a set for evaluation.json."""
    of = result.of
    numbers = {"num_classes": of.num_classes, "compared_classes": len(of.classes), "notes": of.lines}
    return {"set": of.entry.name, "path": of.path} | numbers | result.measured


def measure(
    arrays: Mapping[str, np.ndarray],
    classes: Sequence[str],
    right: Sequence[Sequence[int]] | None = None,
    parts: Mapping[str, slice] | None = None,
) -> dict[str, dict]:
    """The measures of each kind of weights, raw and ema.

    Args:
        arrays: what `Predictions.gather` returns.
        classes: names of the labels and predictions.
        right: the labels of each image where it may have several, or none; it then replaces the one label.
        parts: {"corruption/severity": its images} of ImageNet-C.

    Returns:
        images; acc1, acc5 and ece in percent and loss in nats; classes, {name: images, acc1 and, of a synset of
        ImageNet-1k, a description}; confusions, the pairs of classes that are confused most often. With `right` only
        images, acc1 and ece, of the images that have a label. With `parts` also corruptions, {name: error in percent
        of each severity, and its ce}, and mce where no severity is missing.
    """
    records = {}
    for kind, results in results_of(arrays).items():
        if right is None:
            record = summary(arrays["label"], results)
            record |= {"classes": _classes(arrays["label"], results, classes)}
            record |= {"confusions": _confusions(arrays["label"], results, classes)}
        else:
            record = _of_several_labels(results, right)
        records[kind] = record | (_corruptions(arrays["label"], results, parts) if parts else {})
    return records


def _of_several_labels(results: ImageResults, right: Sequence[Sequence[int]]) -> dict[str, float]:
    accuracy, count = real_accuracy(results.predicted, right)
    labelled = np.array([len(labels) > 0 for labels in right])
    is_right = np.array([guess in labels for guess, labels in zip(results.predicted, right, strict=True)])
    error = expected_calibration_error(results.confidence[labelled], is_right[labelled])
    return {"images": count, "acc1": accuracy, "ece": error}


def _classes(label: np.ndarray, results: ImageResults, names: Sequence[str]) -> dict[str, dict]:
    images, _, accuracies = class_accuracies(label, results.predicted, len(names))
    return {
        names[number]: {"images": int(images[number]), "acc1": float(accuracies[number])} | _description(names[number])
        for number in np.flatnonzero(images)
    }


def _description(name: str) -> dict[str, str]:
    return {"description": descriptions()[name]} if name in descriptions() else {}


def _confusions(label: np.ndarray, results: ImageResults, names: Sequence[str]) -> list[dict]:
    pairs = confusion_pairs(label, results.predicted, NUM_PAIRS)
    return [pair._asdict() | {"label": names[pair.label], "predicted": names[pair.predicted]} for pair in pairs]


def _corruptions(label: np.ndarray, results: ImageResults, parts: Mapping[str, slice]) -> dict[str, object]:
    errors = {}
    for name, part in parts.items():
        corruption, _, severity = name.partition("/")
        wrong = np.asarray(results.predicted[part]) != label[part]
        errors.setdefault(corruption, {})[severity] = 100 * float(np.mean(wrong)) if len(wrong) else math.nan
    complete = {name: [*each.values()] for name, each in errors.items() if len(each) == len(SEVERITIES)}
    relative = corruption_errors(complete)
    record = {
        "corruptions": {
            name: {"errors": of_severities} | ({"ce": relative[name]} if name in relative else {})
            for name, of_severities in errors.items()
        }
    }
    return record | ({"mce": mean_corruption_error(complete)} if complete.keys() == ALEXNET_ERRORS.keys() else {})


def results_table(results: Sequence[SetResult]) -> str:
    """A table of the sets, one line for each kind of weights."""
    rows = [("set", "weights", "images", "classes", "top-1", "top-5", "ECE", "loss")]
    for of, measured, _ in results:
        some = of.num_classes != len(of.classes)
        classes = f"{of.num_classes} of {len(of.classes)}" if some else str(of.num_classes)
        for kind, values in measured.items():
            percents = [_number(values.get(key), "{:.2f} %") for key in ("acc1", "acc5", "ece")]
            loss = _number(values.get("loss"), "{:.4g}")
            rows.append((of.label, NAMES[kind], f"{values['images']:,}", classes, *percents, loss))
    return _aligned(rows)


def corruption_table(result: SetResult) -> str:
    """The top-1 error of each corruption and severity, and the corruption error, in percent; empty for other sets."""
    blocks = []
    for kind, values in result.measured.items():
        if "corruptions" not in values:
            continue
        rows = [(f"{result.of.label}: error, {NAMES[kind]}", *SEVERITIES, "CE")]
        for corruption, of in values["corruptions"].items():
            errors = [_number(of["errors"].get(severity), "{:.2f}") for severity in SEVERITIES]
            rows.append((corruption, *errors, _number(of.get("ce"), "{:.2f}")))
        mean = f"{values['mce']:.2f} %" if "mce" in values else "none, it is of 15 corruptions with 5 severities each"
        blocks += [_aligned(rows), f"mean corruption error, {NAMES[kind]}: {mean}"]
    return "\n".join(blocks)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None or math.isnan(value) else form.format(value)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
