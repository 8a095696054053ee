"""The registry of function-level measures: what a model can still do, on labelled images, when a part is removed.

A measure is one decorated function. Its parameters name what it reads:

- `model`: in eval mode, without gradient; `backbone`: its `Backbone`; `num_classes`: of the labels.
- `test`, `train`: `LabelledImages`; a measure that reads `train` is left out where there are no training images.
- `seed`: of its random choices, which depend on the number of an image or pair, never on the size of a batch.

It returns accuracies in percent as numbers and lists, ready for JSON, and leaves the model as it was. It raises
`NotMeasured` where it does not apply to a model.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass

PREFIX = "function_"
"""Begins the names of these measures in a report's summary and in tables."""


class NotMeasured(ValueError):
    """A measure does not apply; the message says why, in a sentence that begins with the measure's name."""


@dataclass(frozen=True)
class FunctionMeasure:
    """One function-level measure.

    Attributes:
        name: its name in `FUNCTION_MEASURES`, and its key in a report.
        heading: what it is, for the headings of tables and the titles of plots.
        unit: of its values.
        better: "higher" where a higher value is a better representation; None where neither direction is.
        summary: {suffix: (place, function that reads one number from its value)}: the numbers of it that
            `function_<name><suffix>` in a report's summary and in tables are.
        needs_head: whether it classifies with the model's own head.
        reads: names of its function's parameters.
        doc: its docstring: the definition, and in the last paragraph its source and what differs from it.
        function: the decorated function.
    """

    name: str
    heading: str
    unit: str
    better: str | None
    summary: Mapping[str, tuple[str, Callable[[dict], float | None]]]
    needs_head: bool
    reads: tuple[str, ...]
    doc: str
    function: Callable[..., dict]

    def __call__(self, **inputs) -> dict:
        """Compute it from what it reads; further inputs are ignored."""
        return self.function(**{name: inputs[name] for name in self.reads})

    def label(self, place: str = "") -> str:
        """Its heading with what was removed or read, % if it is in percent, and an arrow where higher is better."""
        text = self.heading + (f", {place}" if place else "") + (", %" if self.unit == "percent" else "")
        return text + (" ↑" if self.better == "higher" else "")


FUNCTION_MEASURES: dict[str, FunctionMeasure] = {}


def function_measure(
    heading: str,
    better: str | None,
    summary: Mapping[str, tuple[str, Callable]],
    needs_head: bool = True,
    unit: str = "percent",
):
    """Enter the decorated function into `FUNCTION_MEASURES` under its own name; see `FunctionMeasure`."""
    assert better in ("higher", None), f"unknown direction {better!r}"

    def enter(function: Callable[..., dict]) -> FunctionMeasure:
        name, doc = function.__name__, inspect.getdoc(function)
        reads = tuple(inspect.signature(function).parameters)
        assert name not in FUNCTION_MEASURES, f"{name} is entered twice"
        entry = FunctionMeasure(name, heading, unit, better, summary, needs_head, reads, doc, function)
        FUNCTION_MEASURES[name] = entry
        return FUNCTION_MEASURES[name]

    return enter


def function_summaries() -> dict[str, tuple[FunctionMeasure, str]]:
    """{name in a report's summary: its measure, and what was removed or read}, as `measures.summary_measures`."""
    return {
        f"{PREFIX}{name}{suffix}": (entry, place)
        for name, entry in FUNCTION_MEASURES.items()
        for suffix, (place, _) in entry.summary.items()
    }


def summary_of(values: Mapping[str, dict | None]) -> dict[str, float]:
    """{name in a report's summary: number} of the values of all measures, without those that are None."""
    numbers = {
        f"{PREFIX}{name}{suffix}": read(values[name])
        for name, entry in FUNCTION_MEASURES.items()
        if values.get(name) is not None
        for suffix, (_, read) in entry.summary.items()
    }
    return {name: number for name, number in numbers.items() if number is not None}


def function_table() -> str:
    """The docs' Markdown table of function-level measures, one row for each entry of `FUNCTION_MEASURES`."""
    rows = ["| name | heading in tables | in the summary | definition | source |", "|---|---|---|---|---|"]
    for entry in FUNCTION_MEASURES.values():
        paragraphs = [" ".join(part.split()).replace("|", r"\|") for part in entry.doc.split("\n\n")]
        source = next(part.removeprefix("Source: ") for part in paragraphs if part.startswith("Source: "))
        names = ", ".join(f"`{PREFIX}{entry.name}{suffix}`" for suffix in entry.summary)
        definition = " ".join(part for part in paragraphs if not part.startswith("Source: "))
        rows.append(f"| `{entry.name}` | {entry.label()} | {names} | {definition} | {source} |")
    return "\n".join(rows)
