"""The figures of an atlas: measures against the relative depth, one row of panels for each family."""

import itertools
import math
import textwrap
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from diversity.measures import Measure, measures_of
from reports.figures import COLOURS, format_log_axis, panels

MARKERS = ("o", "s", "^", "D")
LINE_INCHES = 0.17  # a line of a legend
LABEL_LETTERS = 40  # of a line of a legend


class Column(NamedTuple):
    """What one column of panels shows.

    Attributes:
        measure: the measure.
        read: report -> its values over layers or blocks, None where there is nothing to compare.
        suffix: of its heading.
        unit: of its axis.
    """

    measure: Measure
    read: Callable[[dict], list[float | None]]
    suffix: str
    unit: str


def _direct(level: str, key: str) -> Column:
    """A measure that has one value for each layer or block."""
    measure = measures_of(level)[key]
    return Column(measure, lambda report: report[measure.level].get(measure.key, []), "", measure.unit)


def _of_parts(level: str, key: str, parts: tuple[str, ...], of_possible: bool = False) -> Column:
    """A measure of matrices or circuits: its mean over some of them in each block.

    Args:
        of_possible: divide a rank by the largest one that the matrix can have, so that widths can be compared.
    """
    measure = measures_of(level)[key]

    def read(report: dict) -> list[float | None]:
        of_parts = []
        for part in parts:
            values = report[measure.level].get(part, {}).get(measure.key, [])
            sizes = [len(spectrum) for spectrum in report["spectra"][part]] if of_possible and values else []
            of_parts.append(
                [_over(value, size) for value, size in zip(values, sizes, strict=True)] if sizes else values
            )
        of_parts = [values for values in of_parts if values]
        return [_mean(of_block, measure.geometric) for of_block in zip(*of_parts, strict=True)]

    names = "\N{NO-BREAK SPACE}".join(parts)
    suffix = f", {names.upper() if level == 'circuit' else names}"
    return Column(measure, read, suffix, "fraction of the largest possible" if of_possible else measure.unit)


FIGURES = {
    "tokens": (
        _direct("embedding", "token_cosine"),
        _direct("embedding", "block_influence"),
        _direct("embedding", "participation_ratio"),
        _direct("embedding", "rankme"),
    ),
    "heads": (
        _direct("attention", "head_cosine"),
        _direct("attention", "head_output_cosine"),
        _direct("attention", "previous_cosine"),
        _of_parts("circuit", "abscosine", ("qk",)),
    ),
    "weights": (
        _of_parts("weight", "row_abscosine", ("q", "k", "v")),
        _of_parts("weight", "effective_rank", ("q", "k", "v"), of_possible=True),
        _of_parts("weight", "stable_rank", ("q", "k", "v"), of_possible=True),
        _of_parts("weight", "condition_number", ("q", "k", "v")),
    ),
}
"""{name of the file: its columns}."""


def draw_level(families: Iterable[tuple[str, dict[str, dict]]], columns: tuple[Column, ...]) -> Figure:
    """Measures of one level over the relative depth: a row for each family, its models solid, initial weights dashed.

    Args:
        families: as of `Atlas.families`. Initial weights have the colour of the first model that they belong to.
    """
    families = [*families]
    heights = [max(1.7, 0.35 + LINE_INCHES * sum(map(len, _labels(of).values()))) for _, of in families]
    figure, axes = panels(
        *(len(families), len(columns) + 1, 2.6 * len(columns) + 3, sum(heights) + 0.9), sharex=True,
        gridspec_kw={"height_ratios": heights, "width_ratios": [1] * len(columns) + [1.1]},
    )  # fmt: skip
    for line, (family, records) in zip(axes, families, strict=True):
        for axis, column in zip(line, columns, strict=False):
            _draw_panel(axis, records, column)
        line[0].set_ylabel(textwrap.fill(family, 16), fontsize=10, fontweight="bold", labelpad=8)
        _legend(line[-1], records)
    for axis, column in zip(axes[0], columns, strict=False):
        heading = column.measure.label()
        arrow = heading[len(column.measure.heading) :].replace(" ", "\N{NO-BREAK SPACE}")
        title = column.measure.heading[0].upper() + column.measure.heading[1:] + column.suffix + arrow
        scale = ", log scale" if column.measure.geometric else ""
        axis.set_title(f"{textwrap.fill(title, 30)}\n", fontsize=9, fontweight="bold")
        axis.text(0.5, 1.03, column.unit + scale, transform=axis.transAxes, ha="center", fontsize=8, color="#555555")
    for column in axes.T[:-1]:
        _share_scale(column)
        column[-1].set_xlabel("relative depth")
    return figure


def _share_scale(column: np.ndarray):
    """The same y axis for all panels of a measure, so that families can be compared."""
    drawn = [axis for axis in column if axis.lines]
    limits = [axis.get_ylim() for axis in drawn]
    for axis in column if drawn else ():
        axis.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
        if axis.get_yscale() == "log":
            format_log_axis(axis, np.array(axis.get_ylim()))


def _draw_panel(axis: Axes, records: dict[str, dict], column: Column):
    """One measure of the models of a family."""
    is_of_layers = column.measure.level == "embedding"
    for (name, record), style in zip(records.items(), _styles(records).values(), strict=True):
        values = np.array(column.read(record["report"]), dtype=float)
        depth = len(record["report"]["variance"]) - 1
        if len(values):
            if "marker" not in style:  # dashes of initial weights
                style = {"marker": "o", "markersize": 5.5, "fillstyle": "none", "markevery": _alone(values)} | style
            axis.plot(relative_depth(len(values), depth, is_of_layers), values, **style, label=name)
    axis.set(xlim=(-0.03, 1.03), yscale="log" if column.measure.geometric else "linear")
    if not any(np.isfinite(line.get_ydata()).any() for line in axis.lines):
        axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", color="#555555")


def _alone(values: np.ndarray) -> list[int]:
    """Indices of values without a neighbour, which a line alone would not show."""
    known = np.pad(np.isfinite(values), 1)
    return np.flatnonzero(known[1:-1] & ~known[:-2] & ~known[2:]).tolist()


def relative_depth(count: int, depth: int, is_of_layers: bool) -> np.ndarray:
    """Of each layer its number over that of the blocks, from 0 to 1; of each block that of the layer it returns."""
    return (np.arange(count) + (0 if is_of_layers else 1)) / depth


def _styles(records: dict[str, dict]) -> dict[str, dict]:
    """{name: line style}: a colour for each trained model, and dashes in it for the initial weights."""
    looks = itertools.cycle([(colour, marker) for marker in MARKERS for colour in COLOURS])
    styles = {}
    for name, record in records.items():
        if record["random"] != name:
            colour, marker = next(looks)
            styles[name] = {"color": colour, "marker": marker, "markersize": 3, "linewidth": 1.4}
            if record["random"]:
                styles.setdefault(
                    record["random"], {"color": colour, "linestyle": "--", "linewidth": 1.1, "alpha": 0.8, "zorder": 1}
                )
    return {name: styles[name] for name in records}


def _labels(records: dict[str, dict]) -> dict[str, list[str]]:
    """{name: lines of its label}. Initial weights name their models where they are not those of a single one."""
    labels = {}
    for name, record in records.items():
        text = name
        if record["random"] == name:
            owners = [owner for owner, of in records.items() if of["random"] == name and owner != name]
            text = "its initial weights" if len(owners) == 1 else f"initial weights of {', '.join(owners)}"
            text = "their initial weights" if len(owners) == len(records) - 1 > 1 else text
        labels[name] = _wrapped(text)
    return labels


def _wrapped(text: str) -> list[str]:
    """The lines of a label; a long timm name is broken in front of its tag."""
    model, dot, tag = text.partition(".")
    if len(text) <= LABEL_LETTERS or " " in text or not dot:
        return textwrap.wrap(text, LABEL_LETTERS)
    return [model, f"  .{tag}"]


def _legend(axis: Axes, records: dict[str, dict]):
    axis.axis("off")
    handles = [Line2D([], [], **style) for style in _styles(records).values()]
    labels = ["\n".join(lines) for lines in _labels(records).values()]
    axis.legend(handles, labels, loc="center left", fontsize=8, borderaxespad=0, handlelength=2.4)


def _over(value: float | None, size: int) -> float | None:
    return None if value is None else value / size


def _mean(values: Iterable[float | None], geometric: bool) -> float | None:
    """The mean of what can be compared."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return math.exp(sum(map(math.log, known)) / len(known)) if geometric else sum(known) / len(known)
