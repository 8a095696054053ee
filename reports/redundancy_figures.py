"""Figures of what `measure_redundancy` returned, for one model or for several configurations: curves.

`configurations` is everywhere {name: the reports of its runs}: runs that differ only in their seed, all of one
architecture. A configuration has one curve, the mean over its runs. `styles` are `figures.curve_styles` of their names.
"""

import itertools
import math
import textwrap
from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from diversity.measures import Measure, measures_of
from reports.figures import MAX_COLUMNS, curve_styles, format_log_axis, legend_below, panels


def redundancy_depth(configurations: dict[str, list[dict]], styles: list[dict] | None = None) -> Figure:
    """The measures of embeddings over the layers, and below them those of attention and MLPs over the blocks."""
    places = {"layer (0: input of block 0)": ["embedding"], "block": ["attention", "mlp"]}
    groups = {label: measured(_first_report(configurations), levels) for label, levels in places.items()}
    columns = max(math.ceil(len(group) / math.ceil(len(group) / MAX_COLUMNS)) for group in groups.values())
    rows = sum(math.ceil(len(group) / columns) for group in groups.values())
    figure, axes = panels(rows, columns, 3 * columns, 2.7 * rows)
    figure.get_layout_engine().set(wspace=0.05)
    stages = _stages(configurations)
    free = iter(axes.flat)
    for label, group in groups.items():
        for measure, axis in zip(group, free, strict=False):
            values = _of_runs(configurations, lambda report, measure=measure: report[measure.level][measure.key])
            borders = [i + (measure.level == "embedding") for i in stages]
            _draw_depth(axis, configurations, styles, values, borders, measure)
            axis.set_title(_title(measure, width=28), fontsize=9)
            scale = " (log scale)" if measure.geometric else ""
            axis.set(xlabel=label, ylabel=measure.unit + scale)
        for _ in range(-len(group) % columns):
            next(free).remove()
    _legend_below(figure, axes[0, 0], configurations, "grey lines: stages" if stages else None)
    return figure


def weight_depth(configurations: dict[str, list[dict]], styles: list[dict] | None = None) -> Figure:
    """The measures of weights over the blocks, one row for each measure and one column for each matrix."""
    matrices = list(_first_report(configurations)["weight"])
    measures = {measure.key: measure for measure in measured(_first_report(configurations), ["weight"])}
    rows, columns = len(measures), len(matrices)
    figure, axes = panels(rows, columns, 2.3 * columns + 0.6, 2 * rows, sharex=True, sharey="row")
    stages = _stages(configurations)
    for line, (key, measure) in zip(axes, measures.items(), strict=True):
        for axis, matrix in zip(line, matrices, strict=True):
            values = _of_runs(configurations, lambda report, matrix=matrix, key=key: report["weight"][matrix][key])
            _draw_depth(axis, configurations, styles, values, stages, measure)
        scale = "\n(log scale,\ngeometric mean)" if measure.geometric else ""
        line[0].set_ylabel(_title(measure, width=20) + scale)
    _titles(axes, matrices, "block")
    _legend_below(figure, axes[0, 0], configurations, "grey lines: stages" if stages else None)
    return figure


def weight_spectra(configurations: dict[str, list[dict]], styles: list[dict] | None = None) -> Figure:
    """Singular values of every matrix over the largest; below, several configurations' over the first one's.

    A curve is the geometric mean over blocks and runs, its band reaches from the least to the greatest. Of a Swin, only
    the last stage is drawn: the others are of other widths.
    """
    first = _first_report(configurations)
    matrices = list(first["spectra"])
    compared = len(configurations) > 1
    rows = 2 if compared else 1
    figure, axes = panels(rows, len(matrices), 2.6 * len(matrices), 2.7 * rows + 0.9, sharey="row")
    for column, matrix in zip(axes.T, matrices, strict=True):
        values = _of_runs(configurations, lambda report, matrix=matrix: _spectra(report, matrix))
        values = [np.concatenate(of_configuration) for of_configuration in values]
        curves = _draw_curves(column[0], configurations, styles, values, start=1, geometric=True)
        column[0].set_yscale("log")
        for style, curve in zip(styles or curve_styles(), curves if compared else (), strict=False):
            column[1].plot(np.arange(1, len(curve) + 1), curve / curves[0], **style)
    axes[0, 0].set_ylabel("over the largest (log scale)")
    if compared:
        ratios = np.concatenate([line.get_ydata() for axis in axes[1] for line in axis.lines])
        scale = "log" if ratios.max() > 10 * ratios.min() else "linear"
        axes[1, 0].set_yscale(scale)
        axes[1, 0].set_ylabel(textwrap.fill(f"over those of {next(iter(configurations))}", 30) + f"\n({scale} scale)")
    _titles(axes, matrices, "singular value, number")
    blocks = "the blocks of the last stage" if len(first["stages"]) > 1 else "the blocks"
    title = f"Singular values; curve: geometric mean over {blocks} and runs; band: from the least to the greatest"
    figure.suptitle(title, fontsize=10)
    _legend_below(figure, axes[0, 0], configurations)
    return figure


def circuits(configurations: dict[str, list[dict]], styles: list[dict] | None = None) -> Figure:
    """The measures of QK and OV circuits over the blocks, and below them the spectra of a head's circuit.

    A spectrum is the mean over heads and blocks (of the last stage of a Swin) and runs of singular values over the
    largest. Configurations whose attention has no circuits, such as differential attention, are left out.
    """
    have_circuits = [all(report["circuit"] for report in reports) for reports in configurations.values()]
    styles = [*itertools.compress(styles or curve_styles(), have_circuits)]
    configurations = dict(itertools.compress(configurations.items(), have_circuits))
    first = _first_report(configurations)
    measures = measured(first, ["circuit"])
    figure, axes = panels(len(measures) + 1, len(first["circuit"]), 9, 2.7 * (len(measures) + 1), sharey="row")
    stages = _stages(configurations)
    for column, name in zip(axes.T, first["circuit"], strict=True):
        column[0].set_title(f"{name.upper()} circuits")
        for axis, measure in zip(column, measures, strict=False):
            values = _of_runs(configurations, lambda report, n=name, key=measure.key: report["circuit"][n][key])
            _draw_depth(axis, configurations, styles, values, stages, measure)
            axis.set_xlabel("block")
        spectra = _of_runs(
            configurations,
            lambda report, n=name: np.mean(report["circuit_spectra"][n][report["stages"][-1] :], axis=0),
        )
        _draw_curves(column[-1], configurations, styles, spectra, start=1)
        column[-1].set(xlabel="singular value, number", ylim=(0, None))
    for axis, measure in zip(axes[:, 0], measures, strict=False):
        axis.set_ylabel(_title(measure, width=22))
    axes[-1, 0].set_ylabel("singular value\nover the largest")
    _legend_below(figure, axes[0, 0], configurations, "grey lines: stages" if stages else None)
    return figure


def variance(configurations: dict[str, list[dict]], styles: list[dict] | None = None) -> Figure:
    """Fraction of the variance of all tokens in the first principal components, in the first, middle and last layer."""
    depth = len(_first_report(configurations)["variance"]) - 1
    layers = list(dict.fromkeys((0, depth // 2, depth)))
    figure, axes = panels(1, len(layers), 4 * len(layers), 3.8, sharey=True)
    for axis, layer in zip(axes[0], layers, strict=True):
        values = _of_runs(configurations, lambda report, layer=layer: 100 * np.cumsum(report["variance"][layer]))
        _draw_curves(axis, configurations, styles, values, start=1)
        axis.axhline(90, color="grey", linewidth=0.8, linestyle=":")
        axis.annotate("90 %", (1.01, 90), xycoords=("axes fraction", "data"), va="center", fontsize=8, color="#555555")
        place = f"output of block {layer - 1}" if layer else "input of block 0"
        axis.set_title(f"layer {layer}, {place}", fontsize=9)
        axis.set(xlabel="principal components (log scale)", ylim=(0, 102), xscale="log")
        axis.xaxis.set_major_formatter("{x:g}")
    axes[0, 0].set_ylabel("variance explained, percent")
    _legend_below(figure, axes[0, 0], configurations)
    return figure


def measured(report: dict, levels: list[str]) -> list[Measure]:
    """The measures of some levels that a report has."""
    keys = {level: set(report.get(level, ())) for level in levels}
    for level in ("weight", "circuit"):
        keys[level] = {key for of_matrix in report.get(level, {}).values() for key in of_matrix}
    return [measure for level in levels for key, measure in measures_of(level).items() if key in keys[level]]


def _of_runs(configurations: dict[str, list[dict]], read: Callable[[dict], list]) -> list[list]:
    """For each configuration, what `read` returns for the reports of its runs."""
    return [[read(report) for report in reports] for reports in configurations.values()]


def _draw_curves(
    axis: Axes,
    configurations: dict[str, list[dict]],
    styles: list[dict] | None,
    rows: list,
    start: int = 0,
    geometric: bool = False,
    **options,
) -> list[np.ndarray]:
    """One curve for each configuration: the mean of its rows [n, points], with a light band from least to greatest.

    A None breaks a curve. `start` is x of the first point. Returns the curves, each [points].
    """
    curves = []
    for style, (name, reports), values in zip(styles or curve_styles(), configurations.items(), rows, strict=False):
        values = np.array(values, dtype=float)
        curve = np.exp(np.log(values).mean(axis=0)) if geometric else values.mean(axis=0)
        index = np.arange(start, start + len(curve))
        several = f" (mean and range of {len(reports)} runs)" if len(reports) > 1 else ""
        axis.plot(index, curve, **style, **options, label=name + several)
        if len(values) > 1:
            low, high = values.min(axis=0), values.max(axis=0)
            axis.fill_between(index, low, high, color=style["color"], alpha=0.15, linewidth=0)
        curves.append(curve)
    return curves


def _draw_depth(
    axis: Axes,
    configurations: dict[str, list[dict]],
    styles: list[dict] | None,
    rows: list,
    borders: list[int],
    measure: Measure,
):
    """Curves of a measure over layers or blocks, with a line before each of those that begin a stage."""
    curves = _draw_curves(axis, configurations, styles, rows, geometric=measure.geometric, marker="o", markersize=3)
    for first in borders:
        axis.axvline(first - 0.5, color="#777777", linewidth=0.9, zorder=0)
    axis.set(xlim=(-0.5, max(map(len, curves)) - 0.5), yscale="log" if measure.geometric else "linear")
    values = np.concatenate(curves)
    if np.isnan(values).all():
        axis.text(0.5, 0.5, "nothing to compare", transform=axis.transAxes, ha="center", color="#555555")
        axis.yaxis.set_ticks([])
    elif measure.geometric:
        format_log_axis(axis, values)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _spectra(report: dict, matrix: str) -> np.ndarray:
    """Singular values over the largest, of each block of the last stage."""
    values = np.array(report["spectra"][matrix][report["stages"][-1] :])
    return np.maximum(values / np.maximum(values[:, :1], 1e-30), 1e-6)


def _first_report(configurations: dict[str, list[dict]]) -> dict:
    return next(iter(configurations.values()))[0]


def _stages(configurations: dict[str, list[dict]]) -> list[int]:
    """Blocks with which a stage other than the first begins."""
    return _first_report(configurations)["stages"][1:]


def _titles(axes: np.ndarray, columns: list[str], xlabel: str):
    """Titles above the columns, the label of the x axis below them."""
    for top, bottom, title in zip(axes[0], axes[-1], columns, strict=True):
        top.set_title(title)
        bottom.set_xlabel(xlabel)


def _title(measure: Measure, width: int) -> str:
    """The heading of a measure with a capital letter, on lines of a width; its arrow follows the last word."""
    text = measure.label()
    return textwrap.fill(text[0].upper() + text[1:-2] + text[-2:].replace(" ", "\N{NO-BREAK SPACE}"), width)


def _legend_below(figure: Figure, axis: Axes, configurations: dict[str, list[dict]], title: str | None = None):
    """A legend below all panels, of the first curves of an axis."""
    handles = axis.lines[: len(configurations)]
    legend_below(figure, handles, [line.get_label() for line in handles], title)  # matplotlib would leave out _old
