"""The figure of function-level measures: accuracies without a part of the model, probes by layer, the patch probe."""

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from reports.figures import curve_styles, legend_below, panels

CURVES = {
    ("heads", "least_important"): "Heads removed,\nleast important first",
    ("heads", "random"): "Heads removed,\nin random order",
    ("blocks", "skipped"): "A block skipped",
    ("tokens", "random"): "Patch tokens dropped,\nat random",
    ("tokens", "most_similar"): "Patch tokens dropped,\nmost similar first",
    ("tokens", "least_attended"): "Patch tokens dropped,\nleast attended first",
    ("knn", "layers"): "k-NN on training images ↑",
    ("probe", "layers"): "Linear probe on training images ↑",
}
"""{(measure, key of its value): title of its panel}."""
XLABELS = {
    "heads": "fraction of all heads; images of odd number",
    "blocks": "block",
    "tokens": "fraction of an image's patch tokens",
    "knn": "layer (1: output of block 0)",
    "probe": "layer (1: output of block 0)",
}
BARS = {
    "all": "probe,\nall",
    "head": "own\nhead, all",
    "image": "class of\nimage, all",
    "pasted": "probe,\npasted",
    "image_pasted": "class of\nimage,\npasted",
}
HATCHES = {"-": "", "--": "////", ":": "....", "-.": "xxxx"}
"""Of the bars of a row, by the style of its curves."""


def function_level(configurations: dict[str, list[dict]], styles: list[dict] | None = None) -> Figure:
    """Top-1 accuracies of each configuration, a panel for each curve of `CURVES` and one for the patch probe.

    Measures that were not chosen have no panel. A curve or bar is the mean over the runs; its band or line reaches from
    the least to the greatest. A measure that does not apply to a model is left out. `configurations` is {name: the
    reports of its runs}, each with "function".
    """
    styles = [style for style, _ in zip(styles or curve_styles(), configurations, strict=False)]
    functions = [[report["function"] for report in reports] for reports in configurations.values()]
    chosen = {measure for of_runs in functions for function in of_runs for measure in function}
    curves = [place for place in CURVES if place[0] in chosen]
    count = max(1, len(curves) + ("patch_probe" in chosen))
    rows, columns = math.ceil(count / 3), min(count, 3)
    figure, axes = panels(rows, columns, 11 / 3 * columns, 3 * rows)
    for axis in axes.flat[count:]:
        axis.remove()
    shared = {}
    for axis, (measure, key) in zip(axes.flat, curves, strict=False):
        drawn = [_draw(axis, style, of_runs, measure, key) for style, of_runs in zip(styles, functions, strict=True)]
        if not any(drawn):
            axis.text(0.5, 0.5, "does not apply", transform=axis.transAxes, ha="center", color="#555555")
        axis.set_title(CURVES[measure, key], fontsize=10)
        axis.set_xlabel(XLABELS[measure])
        # Those without a part of the model show what is left of the accuracy of the complete one.
        first = shared.setdefault(measure in ("knn", "probe"), axis)
        if first is not axis:
            axis.sharey(first)
        if measure in ("heads", "tokens"):
            axis.xaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        else:
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for line in axes:
        line[0].set_ylabel("top-1 accuracy, percent")
    if "patch_probe" in chosen or not curves:  # accuracy alone has no curve
        _draw_patches(axes.flat[count - 1], styles, functions)
    for axis in figure.axes:
        axis.set_ylim(bottom=0)
    handles = [Line2D([], [], **style) for style in styles]
    labels = [
        name + (f" (mean and range of {len(reports)} runs)" if len(reports) > 1 else "")
        for name, reports in configurations.items()
    ]
    legend_below(figure, handles, labels)
    return figure


def _draw(axis: Axes, style: dict, functions: list[dict], measure: str, key: str) -> bool:
    """Draw the mean and the range of a curve over runs, None as a gap; returns whether there was one to draw."""
    values = [function.get(measure) and function[measure][key] for function in functions]
    if None in values:
        return False
    values = np.array(values, dtype=float)
    x = functions[0][measure].get("fractions", range(values.shape[1]))
    axis.plot(x, values.mean(axis=0), **style, marker="o", markersize=3)
    if len(values) > 1:
        axis.fill_between(x, values.min(axis=0), values.max(axis=0), color=style["color"], alpha=0.15, linewidth=0)
    return True


def _draw_patches(axis: Axes, styles: list[dict], functions: list[list[dict]]):
    """Bars of the patch probe in the order of the legend, and lines of the two baselines of the data."""
    axis.set_title("Patch probe ↑", fontsize=10)
    axis.set_ylabel("accuracy over patches, percent")
    axis.set_xticks(range(len(BARS)), BARS.values(), fontsize=8)
    axis.grid(False, axis="x")
    width, baselines = 0.8 / len(functions), {}
    for number, (style, of_runs) in enumerate(zip(styles, functions, strict=True)):
        values = [function.get("patch_probe") for function in of_runs]
        if None in values:
            continue
        baselines = {"label of\nmost patches": values[0]["majority"], "chance": values[0]["chance"]}
        for place, key in enumerate(BARS):
            of_key = [value[key] for value in values]
            if None not in of_key:
                x, mean = place + (number - (len(functions) - 1) / 2) * width, np.mean(of_key)
                axis.bar(x, mean, 0.9 * width, color=style["color"], hatch=HATCHES[style["linestyle"]])
                axis.plot([x, x], [min(of_key), max(of_key)], color="black", linewidth=0.8)
    for text, value in baselines.items():
        axis.axhline(value, color="#555555", linewidth=0.9, linestyle=":")
        place = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 8, "color": "#555555"}
        axis.annotate(text, (1.01, value), **place)
    if not baselines:
        axis.text(0.5, 0.5, "does not apply", transform=axis.transAxes, ha="center", color="#555555")
