"""The function-level part of analyze.py: labelled images of both splits, the measures, and their tables."""

from collections.abc import Iterable
from statistics import fmean
from typing import NamedTuple

from torch import nn
from torch.utils.data import DataLoader, Subset

from datasets import DataOptions, loader_settings
from diversity.function_level import FUNCTION_MEASURES, measure_function
from pipeline.classes import find_classes, first_names, labels_by_name
from pipeline.images import ReadableImages
from pipeline.labelled import known_labels, spread_sample
from pipeline.opening import build_source
from pipeline.sources import find_source
from pipeline.transforms import build_transform
from pipeline.workers import StoppableLoader
from reports.subjects import Subject
from reports.tables import markdown_table
from training.provenance import digest
from utils import World, errors_of

TEST_IMAGES, PROBE_IMAGES = 2000, 5000
SEED = 0  # of the choice of images and of what the measures draw, the same for all runs


class FunctionOptions(NamedTuple):
    """How many validation and training images the function-level measures read, 0 = all, and which of the measures."""

    test_images: int = TEST_IMAGES
    probe_images: int = PROBE_IMAGES
    measures: tuple[str, ...] = tuple(FUNCTION_MEASURES)


def function_options(
    is_on: bool, test_images: int | None, probe_images: int | None, measures: Iterable[str] | None = None
) -> FunctionOptions | None:
    """The options of the flags --function-level, --function-images, --probe-images and --function-measures.

    Returns:
        None without the first flag.

    Raises:
        SystemExit: one of the others without --function-level.
    """
    given = {"--function-images": test_images, "--probe-images": probe_images, "--function-measures": measures}
    named = [flag for flag, value in given.items() if value is not None]
    if named and not is_on:
        raise SystemExit(f"error: {named[0]} needs --function-level")
    defaults = FunctionOptions()
    test_images = defaults.test_images if test_images is None else test_images
    probe_images = defaults.probe_images if probe_images is None else probe_images
    chosen = [name for name in FUNCTION_MEASURES if measures is None or name in measures]
    return FunctionOptions(test_images, probe_images, tuple(chosen)) if is_on else None


class LabelledData(NamedTuple):
    """The images of the function-level measures.

    Attributes:
        test: a loader of validation images.
        train: a loader of training images without augmentation; None where there are none.
        num_classes: of their labels.
        words: what they are, and which measures if not all; runs are compared where it is the same.
        measures: names of those to measure.
    """

    test: DataLoader
    train: DataLoader | None
    num_classes: int
    words: str
    measures: tuple[str, ...] = tuple(FUNCTION_MEASURES)


def labelled_data(subject: Subject, world: World, options: FunctionOptions) -> LabelledData:
    """The first images of a fixed random order of each split, spread over the classes.

    Raises:
        SystemExit: the validation images have no labels, or can be read only as a stream.
    """
    source = find_source(subject.data.data_set)
    if source.is_stream or not source.has_labels:
        lacks = "reads images by their number, and it is a stream" if source.is_stream else "needs labels"
        raise SystemExit(f"error: --data-set {subject.data.data_set} does not serve --function-level, which {lacks}")
    test, num_classes, names, files = _loader(subject, world, options.test_images, subject.classes, is_training=False)
    measures = options.measures
    only = "" if len(measures) == len(FUNCTION_MEASURES) else f", only {', '.join(measures)}"
    words = f"{len(test.dataset)} validation images (files {files})"
    try:
        train, _, _, files = _loader(subject, world, options.probe_images, names, is_training=True)
    except SystemExit as error:
        print(f"{subject.run}: k-NN and linear probes are not measured: {str(error).removeprefix('error: ')}")
        return LabelledData(test, None, num_classes, words + only, measures)
    words += f" and {len(train.dataset)} training images (files {files})"
    return LabelledData(test, train, num_classes, words + only, measures)


def _loader(
    subject: Subject, world: World, count: int, classes: list[str], is_training: bool
) -> tuple[DataLoader, int, list[str], str]:
    """A loader of images of a split, preprocessed as in validation; the number of classes and their names in the order
    of the labels, `classes` unless they are empty; the digest of the files.

    Raises:
        SystemExit: there are no such images, or they have other classes.
    """
    options: DataOptions = subject.data
    source = build_source(options, is_training)
    num_classes, names = find_classes(options, None, source)
    labels, classes = [], classes or names
    if is_training and not subject.classes and (other := {*names} - {*classes}):
        raise SystemExit(f"error: training images have classes that validation images lack: {first_names(other)}")
    if names and classes != names:
        labels = labels_by_name(names, classes, is_training=False)
    num_classes = options.num_classes or len(classes) or num_classes
    transform = build_transform(options, is_training=False)
    images = ReadableImages(source, transform, options.max_bad_images if is_training else 0, labels=labels)
    chosen = Subset(images, spread_sample(known_labels(source), len(source), count, SEED))
    settings = loader_settings(options, world, is_training=False)
    loader = StoppableLoader(chosen, batch_size=options.batch_size, **settings)
    return loader, num_classes, classes, digest(source, options.data_set, options.data_path)


def add_function(report: dict, subject: Subject, model: nn.Module, data: LabelledData):
    """Measure a model, and add the result to its report: "function", and its numbers to "summary"; print a line.

    Raises:
        SystemExit: labels that do not fit the model.
    """
    with errors_of(f"{subject.run}, --function-level:"):
        function = measure_function(
            model, data.test, data.train, num_classes=data.num_classes, seed=SEED, measures=data.measures
        )
    report["function"] = function
    report["summary"] |= function["summary"]
    for reason in function["not_measured"].values():
        print(f"{subject.run}: {reason}")
    print(f"{subject.run}, function level: {console_line(function)}")


def console_line(function: dict) -> str:
    """The most telling numbers of the function-level measures, in percent; the table has all of them."""
    short = {
        "function_accuracy": "accuracy",
        "function_heads_50": "without the least important half of the heads",
        "function_tokens_50_random": "without a random half of the patch tokens",
        "function_knn_last": "k-NN",
        "function_probe_last": "linear probe",
        "function_patch_probe": "patch probe",
    }
    numbers = function["summary"]
    texts = [f"{text} {numbers[name]:.1f} %" for name, text in short.items() if name in numbers]
    if patches := function.get("patch_probe"):
        texts[-1] += (
            f" (label of most patches {patches['majority']:.1f} %, most frequent label {patches['chance']:.1f} %)"
        )
    return ", ".join(texts)


def function_tables(configurations: dict[str, list[dict]]) -> list[str]:
    """Markdown of the curves of each configuration, means over its runs; nothing for reports without them."""
    blocks = []
    for name, reports in configurations.items():
        if not all("function" in report for report in reports):
            return []
        functions = [report["function"] for report in reports]
        runs = f", mean of {len(reports)} runs" if len(reports) > 1 else ""
        words = reports[0]["measured_on"]["function"]
        words += "; accuracies without heads are those of the validation images of odd number"
        blocks.append(f"{name}{runs}, function level: top-1 accuracies in percent, {words}")
        of_measures = [_by_fraction(functions), _by_layer(functions), _patches(functions)]
        blocks += [markdown_table(columns) for columns in of_measures if any(columns.values())]
    return blocks


def _by_fraction(functions: list[dict]) -> dict[str, list[str]]:
    """Accuracies against the fraction of heads or patch tokens that were removed."""
    heads, tokens = _mean_of(functions, "heads"), _mean_of(functions, "tokens")
    fractions = (heads or tokens or {"fractions": []})["fractions"]
    columns = {"removed": [f"{100 * fraction:.0f} %" for fraction in fractions]}
    curves = {"heads, least important first": ("heads", "least_important"), "heads, random": ("heads", "random")}
    curves |= {f"tokens, {key.replace('_', ' ')} first": ("tokens", key) for key in ("most_similar", "least_attended")}
    curves["tokens, random"] = ("tokens", "random")
    for heading, (measure, key) in curves.items():
        value = heads if measure == "heads" else tokens
        columns[heading] = _texts(value and value[key], len(columns["removed"]))
    return columns


def _by_layer(functions: list[dict]) -> dict[str, list[str]]:
    """Accuracies by layer, and with the block in front of it skipped."""
    values = {name: _mean_of(functions, name) for name in ("blocks", "knn", "probe")}
    skipped = values["blocks"] and [None, *values["blocks"]["skipped"]]
    columns = {"block before it skipped": skipped}
    for name in ("knn", "probe"):
        columns[FUNCTION_MEASURES[name].label()] = values[name] and values[name]["layers"]
    depth = max(len(column or ()) for column in columns.values())
    texts = {heading: _texts(column, depth) for heading, column in columns.items()}
    return {"layer": [str(layer) for layer in range(depth)]} | texts


def _patches(functions: list[dict]) -> dict[str, list[str]]:
    """Accuracies of the patch probe and its baselines; nothing where a run lacks it."""
    patches = _mean_of(functions, "patch_probe")
    if patches is None:
        return {}
    rows = {
        "probe, all patches": "all",
        "probe, pasted patches": "pasted",
        "the model's own head, all patches": "head",
        "the model's class of the complete image, all patches": "image",
        "the model's class of the complete image, pasted patches": "image_pasted",
        "label of most patches of the image": "majority",
        "most frequent label": "chance",
    }
    return {"patch probe": [*rows], "accuracy": _texts([patches[key] for key in rows.values()], len(rows))}


def _mean_of(functions: list[dict], name: str) -> dict | None:
    """The mean of a measure's value over runs, entry by entry; None where a run lacks it."""
    values = [function.get(name) for function in functions]
    return None if None in values else _mean(values)


def _mean(values: list):
    """The mean of equal nested dicts and lists of numbers; None where one is None."""
    if None in values:
        return None
    if isinstance(values[0], dict):
        return {key: _mean([value[key] for value in values]) for key in values[0]}
    if isinstance(values[0], list):
        return [_mean([*of_runs]) for of_runs in zip(*values, strict=True)]
    return fmean(values)


def _texts(values: Iterable[float | None] | None, length: int) -> list[str]:
    texts = ["-" if value is None else f"{value:.2f}" for value in values or ()]
    return texts + ["-"] * (length - len(texts))
