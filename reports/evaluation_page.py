"""The page of an evaluation: accuracies on its sets, and the classes that are confused most often."""

from collections.abc import Mapping

from pipeline.evaluation_sets import descriptions
from reports.tables import markdown_table
from training.set_results import NAMES

NUM_CLASSES = 20
"""Classes of a table, those of the lowest accuracy."""


def evaluation_page(content: Mapping) -> str:
    """The Markdown page of what evaluation.json contains."""
    epoch = "" if content.get("epoch") is None else f", trained until epoch {content['epoch']}"
    head = [f"# Evaluation of {content['weights']}", f"{content['model']}{epoch}. {content['preprocessing']}."]
    parts = [part for name, of_set in content["sets"].items() for part in _set_part(name, of_set)]
    return "\n\n".join([*head, _sets_table(content["sets"]), *parts]) + "\n"


def _kinds(of_set: Mapping) -> dict[str, Mapping]:
    return {name: of_set[kind] for kind, name in NAMES.items() if kind in of_set}


def _sets_table(sets: Mapping[str, Mapping]) -> str:
    rows = [
        (name, kind, f"{values['images']:,}", *(_number(values.get(key), 2) for key in ("acc1", "acc5", "ece", "mce")),
         _number(values.get("loss"), 3))
        for name, of_set in sets.items()
        for kind, values in _kinds(of_set).items()
    ]  # fmt: skip
    headings = ("set", "weights", "images", "top-1, %", "top-5, %", "ECE, %", "mCE, %", "loss")
    columns = dict(zip(headings, map(list, zip(*rows, strict=True)), strict=True))
    return markdown_table({head: texts for head, texts in columns.items() if {*texts} != {"-"}})


def _set_part(name: str, of_set: Mapping) -> list[str]:
    """Heading, notes and tables of a set."""
    lines = [f"## {name}", "\n".join(f"- {note}" for note in of_set.get("notes", []))]
    for kind, values in _kinds(of_set).items():
        classes = values.get("classes", {})
        if confused := values.get("confusions"):
            lines += [f"Classes that are confused most often, {kind} weights:", _confusion_table(confused)]
        if classes:
            lowest = sorted(classes.items(), key=lambda item: item[1]["acc1"])[:NUM_CLASSES]
            few = f"The {len(lowest)} of {len(classes)} classes with the lowest accuracy, {kind} weights:"
            lines += [few if len(lowest) < len(classes) else f"Accuracy of each class, {kind} weights:"]
            lines.append(_class_table(dict(lowest)))
    return [*filter(None, lines)]


def _confusion_table(pairs: list[Mapping]) -> str:
    return markdown_table({
        "class": [_words(pair["label"]) for pair in pairs],
        "predicted as": [_words(pair["predicted"]) for pair in pairs],
        "images": [f"{pair['count']:,}" for pair in pairs],
        "of the class, %": [_number(pair["fraction"], 1) for pair in pairs],
    })  # fmt: skip


def _class_table(classes: Mapping[str, Mapping]) -> str:
    return markdown_table({
        "class": [*map(_words, classes)],
        "images": [f"{values['images']:,}" for values in classes.values()],
        "top-1, %": [_number(values["acc1"], 2) for values in classes.values()],
    })  # fmt: skip


def _words(name: str) -> str:
    """The name of a class; of a synset of ImageNet-1k with its description."""
    return f"{name} ({descriptions()[name]})" if name in descriptions() else name


def _number(value: float | None, decimals: int) -> str:
    return "-" if value is None else f"{value:.{decimals}f}"
