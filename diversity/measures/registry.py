"""The registry of measures of redundancy: one decorated function for each, computed for every layer or weight matrix.

The parameters of a function name what it reads: attributes of one of the classes in inputs.py, as one of a chunk of
images (`ChunkTokens`, `ChunkMaps`, `ChunkHeads`), of all images (`AllTokens`, `AllUnits`) or of weights (`Matrix`,
`Circuit`). It returns one value for each image, or one for all; None where there is nothing to compare.
"""

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch

from . import inputs

ARROWS = {"lower": " ↓", "higher": " ↑", None: ""}
SUMMARY_PLACES = {
    "embedding": {"": "all layers", "_last": "last layer"},
    "attention": {"": "all blocks", "_first": "first block"},
    "mlp": {"": "all blocks"},
    "weight": {"": "all matrices", "_qkv": "q k v"},
    "circuit": {"_qk": "QK", "_ov": "OV"},
}
"""{level: {suffix of a name in a report's summary: the layers or matrices it is the mean of}}."""


@dataclass(frozen=True)
class Measure:
    """One measure of redundancy.

    Attributes:
        name: its name in `MEASURES`.
        level: "embedding", "attention", "mlp", "weight" or "circuit".
        heading: what it is, for the headings of tables and the titles of plots.
        unit: label of its axis in a plot.
        better: "lower" or "higher", whichever is less redundant; None where neither is.
        geometric: whether its means are geometric and its axis is logarithmic.
        optional: whether it is computed only on request, as it takes long.
        reads: names of what it reads, attributes of `source`.
        source: the class of its inputs.
        doc: its docstring: the formula; in the second paragraph the range; then the source where it is not the paper.
        function: the decorated function.
    """

    name: str
    level: str
    heading: str
    unit: str
    better: str | None
    geometric: bool
    optional: bool
    reads: tuple[str, ...]
    source: type
    doc: str
    function: Callable[..., torch.Tensor | None]

    def __call__(self, inputs: object) -> torch.Tensor | None:
        """Compute it from what it reads of an instance of `source`."""
        return self.function(**{name: getattr(inputs, name) for name in self.reads})

    @property
    def key(self) -> str:
        """Its name among the measures of its level, as reports have it: without the level in front."""
        return self.name.removeprefix(f"{self.level}_")

    def label(self, place: str = "") -> str:
        """Its heading with the layers it is of, and an arrow that points to less redundancy."""
        return self.heading + (f", {place}" if place else "") + ARROWS[self.better]


MEASURES: dict[str, Measure] = {}


def measure(level: str, heading: str, unit: str, better: str | None, geometric: bool = False, optional: bool = False):
    """Enter the decorated function into `MEASURES` under its own name; for the arguments see `Measure`."""
    assert level in inputs.SOURCES and better in ARROWS, f"unknown level {level!r} or direction {better!r}"

    def enter(function: Callable[..., torch.Tensor | None]) -> Measure:
        reads, doc = tuple(inspect.signature(function).parameters), inspect.getdoc(function)
        name, sources = function.__name__, [source for source in inputs.SOURCES[level] if inputs.has(source, reads)]
        assert name not in MEASURES, f"{name} is entered twice"
        assert sources, f"{name} reads {', '.join(reads)}, which no inputs of level {level} have together"
        entry = Measure(name, level, heading, unit, better, geometric, optional, reads, sources[0], doc, function)
        MEASURES[name] = entry
        return entry

    return enter


def measures_of(level: str) -> dict[str, Measure]:
    """{key: the measures of a level}, in the order of `MEASURES`."""
    return {entry.key: entry for entry in MEASURES.values() if entry.level == level}


def chosen(level: str, extra: Collection[str]) -> dict[str, Measure]:
    """{key: the measures of a level}, without the optional ones that `extra` does not name."""
    measures = measures_of(level).items()
    return {key: measure for key, measure in measures if not measure.optional or measure.name in extra}


def summary_measures() -> dict[str, tuple[Measure, str]]:
    """{name in a report's summary: its measure, and the layers or matrices it is the mean of}."""
    return {
        f"{level}_{key}{suffix}": (entry, place)
        for level, places in SUMMARY_PLACES.items()
        for key, entry in measures_of(level).items()
        for suffix, place in places.items()
    }


def measures_table() -> str:
    """The docs' Markdown table of measures, one row for each entry of `MEASURES`."""
    rows = ["| level | name | heading in tables | unit | value | range | source |", "|---|---|---|---|---|---|---|"]
    for entry in MEASURES.values():
        value, value_range, *origin = (" ".join(part.split()).replace("|", r"\|") for part in entry.doc.split("\n\n"))
        value += " Only on request." if entry.optional else ""
        source = origin[0].removeprefix("Source: ") if origin else ""
        cells = (entry.level, f"`{entry.key}`", entry.label(), entry.unit, value, value_range, source)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)
