"""Figures of what `measure_redundancy` found, for one model or for cells of several runs, and of attention maps.

`cells` is everywhere {name of a cell: the reports of its runs}: runs that differ in nothing but their seed, all of one
architecture. A cell has one curve, the mean over its runs.
"""

import math
import textwrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from reports.figures import looks, plt

EMBEDDING = {
    "token_cosine": ("Cosine of two tokens", "cosine"),
    "token_abscosine": ("Absolute cosine of two tokens", "|cosine|"),
    "first_cosine": ("Cosine to the first embedding", "cosine"),
    "effective_rank": ("Effective rank of the tokens", "rank"),
    "components_90": ("90 % of the variance", "principal components"),
}
ATTENTION = {
    "head_cosine": ("Cosine of two heads' maps", "cosine"),
    "previous_cosine": ("Cosine to maps of the block before", "cosine"),
    "row_std": ("Spread of an attention row", "standard deviation"),
    "row_entropy": ("Entropy of an attention row", "nats"),
}
WEIGHT = {
    "effective_rank": "effective rank",
    "condition_number": "condition number\n(log scale,\ngeometric mean)",
    "row_abscosine": "two rows, |cosine|",
    "smallest_angle": "smallest angle\nof two rows, degrees",
}
HEADS_IN_A_LINE = 6


def redundancy_depth(cells: dict[str, list[dict]]) -> Figure:
    """The measures of embeddings over the layers, and below those of attention over the blocks."""
    figure, axes = plt.subplots(2, 5, figsize=(15, 5.8), layout="constrained")
    figure.get_layout_engine().set(wspace=0.04)
    stages = _stages(cells)
    for row, (level, panels) in enumerate({"embedding": EMBEDDING, "attention": ATTENTION}.items()):
        for axis, (measure, (title, unit)) in zip(axes[row], panels.items(), strict=False):
            rows = [[report[level][measure] for report in reports] for reports in cells.values()]
            _draw_depth(axis, cells, rows, [block + (1 if level == "embedding" else 0) for block in stages])
            axis.set_title(title, fontsize=9)
            axis.set(xlabel="layer (0: input of block 0)" if level == "embedding" else "block", ylabel=unit)
    axes[-1, -1].axis("off")
    legend = {"loc": "center", "fontsize": 7.5, "title_fontsize": 7.5, "labelspacing": 0.3}
    axes[-1, -1].legend(*_entries(axes[0, 0], cells, width=38), title=_stages_note(stages), **legend)
    return figure


def weight_depth(cells: dict[str, list[dict]]) -> Figure:
    """The measures of weights over the blocks, one column a matrix."""
    matrices = list(_first_report(cells)["weight"])
    size = {"figsize": (2.3 * len(matrices) + 0.6, 8.4), "layout": "constrained", "squeeze": False}
    figure, axes = plt.subplots(len(WEIGHT), len(matrices), **size, sharex=True, sharey="row")
    stages = _stages(cells)
    for line, (measure, unit) in zip(axes, WEIGHT.items(), strict=True):
        logarithmic = measure == "condition_number"
        for axis, matrix in zip(line, matrices, strict=True):
            rows = [[report["weight"][matrix][measure] for report in reports] for reports in cells.values()]
            _draw_depth(axis, cells, rows, stages, geometric=logarithmic)
        line[0].set(ylabel=unit, yscale="log" if logarithmic else "linear")
    _titles(axes, matrices, "block")
    _legend_below(figure, axes[0, 0], cells, _stages_note(stages))
    return figure


def weight_spectra(cells: dict[str, list[dict]]) -> Figure:
    """Singular values of every matrix over the largest; below, several cells' curves over that of the first cell.

    A curve is the geometric mean over blocks and runs, its band reaches from the least to the greatest. Of a Swin, only
    the last stage is drawn: the others are of other widths.
    """
    first = _first_report(cells)
    matrices = list(first["spectra"])
    compared = len(cells) > 1
    lines = 2 if compared else 1
    size = {"figsize": (2.6 * len(matrices), 2.7 * lines + 0.9), "layout": "constrained", "squeeze": False}
    figure, axes = plt.subplots(lines, len(matrices), **size, sharey="row")
    for column, matrix in zip(axes.T, matrices, strict=True):
        rows = [np.concatenate([_spectra(report, matrix) for report in reports]) for reports in cells.values()]
        curves = _draw_cells(column[0], cells, rows, start=1, geometric=True)
        column[0].set_yscale("log")
        for look, curve in zip(looks(), curves if compared else (), strict=False):
            column[1].plot(np.arange(1, len(curve) + 1), curve / curves[0], **look)
    axes[0, 0].set_ylabel("over the largest (log scale)")
    if compared:
        ratios = np.concatenate([line.get_ydata() for axis in axes[1] for line in axis.lines])
        scale = "log" if ratios.max() > 10 * ratios.min() else "linear"
        axes[1, 0].set_yscale(scale)
        axes[1, 0].set_ylabel(textwrap.fill(f"over those of {next(iter(cells))}", 30) + f"\n({scale} scale)")
    _titles(axes, matrices, "singular value, number")
    blocks = "the blocks of the last stage" if len(first["stages"]) > 1 else "the blocks"
    figure.suptitle(f"Singular values; curve: geometric mean over {blocks}; band: least to greatest", fontsize=10)
    _legend_below(figure, axes[0, 0], cells)
    return figure


def variance(cells: dict[str, list[dict]]) -> Figure:
    """Share of the variance of all tokens in the first principal components, for the first, middle and last layer."""
    depth = len(_first_report(cells)["variance"]) - 1
    layers = list(dict.fromkeys((0, depth // 2, depth)))
    size = {"figsize": (4 * len(layers), 3.8), "layout": "constrained"}
    figure, axes = plt.subplots(1, len(layers), **size, sharey=True, squeeze=False)
    for axis, layer in zip(axes[0], layers, strict=True):
        rows = [[100 * np.cumsum(report["variance"][layer]) for report in reports] for reports in cells.values()]
        _draw_cells(axis, cells, rows, start=1)
        axis.axhline(90, color="grey", linewidth=0.8, linestyle=":")
        axis.annotate("90 %", (1.01, 90), xycoords=("axes fraction", "data"), va="center", fontsize=8, color="#555555")
        place = f"output of block {layer - 1}" if layer else "input of block 0"
        axis.set_title(f"layer {layer}, {place}", fontsize=9)
        axis.set(xlabel="principal components (log scale)", ylim=(0, 102), xscale="log")
        axis.xaxis.set_major_formatter("{x:g}")
    axes[0, 0].set_ylabel("variance explained, percent")
    _legend_below(figure, axes[0, 0], cells)
    return figure


def attention_heads(
    maps: np.ndarray,
    picture: np.ndarray | None,
    prefix_tokens: list[str],
    grid: tuple[int, int] | None,
    title: str,
) -> Figure:
    """The attention maps of a block's heads for one image; below each, what the first prefix token sees of the patches.

    Args:
        maps: [H, N, N], rows sum to 1.
        picture: the image [S, S, 3] in 0..1, where there is one to show.
        prefix_tokens: names of the tokens in front of the patches, in order.
        grid: rows and columns of the patches; None when the tokens do not lie on the grid (a window of a Swin).
        title: of the figure.
    """
    heads, prefix = len(maps), len(prefix_tokens)
    kinds = [maps]
    if prefix_tokens and grid:
        kinds.append(maps[:, 0, prefix:].reshape(heads, *grid))
    norms = [PowerNorm(0.5, vmin=0, vmax=float(kind.max())) for kind in kinds]
    lines, in_a_line, left = math.ceil(heads / HEADS_IN_A_LINE), min(heads, HEADS_IN_A_LINE), int(picture is not None)
    rows, columns = lines * len(kinds), in_a_line + left
    size = {"figsize": (2 * columns + 1.2, 2.2 * rows + 0.4), "layout": "constrained"}
    figure, axes = plt.subplots(rows, columns, **size, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    if left:
        axes[0, 0].imshow(picture)
        axes[0, 0].set_title("image", fontsize=9)
    for row in range(rows):
        line, kind = divmod(row, len(kinds))
        shown = range(line * HEADS_IN_A_LINE, min(heads, (line + 1) * HEADS_IN_A_LINE))
        for axis, head in zip(axes[row, left:], shown, strict=False):
            axis.set_axis_on()
            axis.grid(False)
            image = axis.imshow(kinds[kind][head], norm=norms[kind], cmap="viridis")
            axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            axis.yaxis.set_major_locator(MaxNLocator(4, integer=True))
            axis.tick_params(labelsize=7)
            axis.set_title(f"head {head}" if kind == 0 else f"seen by {prefix_tokens[0]}", fontsize=9 - kind)
            axis.set_xlabel("patch column" if kind else "token looked at", fontsize=8)
        zero = f"\n(0: {prefix_tokens[0]})" if prefix_tokens else ""
        axes[row, left].set_ylabel("patch row" if kind else f"token that looks{zero}", fontsize=8)
        figure.colorbar(image, ax=axes[row, -1], shrink=0.8).set_label("attention\n(colour: square root)", fontsize=8)
    figure.suptitle(textwrap.fill(title, int(12 * figure.get_figwidth())), fontsize=10)
    return figure


def _draw_cells(
    axis: Axes, cells: dict[str, list[dict]], rows: list, start: int = 0, geometric: bool = False, **style
) -> list[np.ndarray]:
    """One curve a cell: the mean of its rows, with a light band from the least to the greatest.

    Args:
        axis: to draw on.
        cells: of the figure.
        rows: each cell's values [n, points], of every run or of every block of every run; a None breaks the curve.
        start: x of the first point.
        geometric: draw geometric means.
        style: further looks of the curves.

    Returns:
        Each cell's curve [points].
    """
    curves = []
    for look, (name, reports), values in zip(looks(), cells.items(), rows, strict=False):
        values = np.array(values, dtype=float)
        curve = np.exp(np.log(values).mean(axis=0)) if geometric else values.mean(axis=0)
        index = np.arange(start, start + len(curve))
        several = f" (mean and range of {len(reports)} runs)" if len(reports) > 1 else ""
        axis.plot(index, curve, **look, **style, label=name + several)
        if len(values) > 1:
            low, high = values.min(axis=0), values.max(axis=0)
            axis.fill_between(index, low, high, color=look["color"], alpha=0.15, linewidth=0)
        curves.append(curve)
    return curves


def _draw_depth(axis: Axes, cells: dict[str, list[dict]], rows: list, borders: list[int], geometric: bool = False):
    """Curves over layers or blocks, with a line before each of those that begin a stage."""
    curves = _draw_cells(axis, cells, rows, geometric=geometric, marker="o", markersize=3)
    for first in borders:
        axis.axvline(first - 0.5, color="#777777", linewidth=0.9, zorder=0)
    if all(np.isnan(curve).all() for curve in curves):
        axis.text(0.5, 0.5, "nothing to compare", transform=axis.transAxes, ha="center", color="#555555")
    axis.set_xlim(-0.5, max(map(len, curves)) - 0.5)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _spectra(report: dict, matrix: str) -> np.ndarray:
    """Singular values over the largest, of each block of the last stage."""
    values = np.array(report["spectra"][matrix][report["stages"][-1] :])
    return np.maximum(values / np.maximum(values[:, :1], 1e-30), 1e-6)


def _first_report(cells: dict[str, list[dict]]) -> dict:
    return next(iter(cells.values()))[0]


def _stages(cells: dict[str, list[dict]]) -> list[int]:
    """Blocks with which a stage other than the first begins."""
    return _first_report(cells)["stages"][1:]


def _stages_note(stages: list[int]) -> str | None:
    return "grey lines: stages" if stages else None


def _titles(axes: np.ndarray, columns: list[str], xlabel: str):
    """Titles above the columns, the label of the x axis below them."""
    for top, bottom, title in zip(axes[0], axes[-1], columns, strict=True):
        top.set_title(title)
        bottom.set_xlabel(xlabel)


def _entries(axis: Axes, cells: dict[str, list[dict]], width: int) -> tuple[list, list[str]]:
    """Handles and labels for a legend, labels broken into lines; matplotlib's own would lack a name such as _old."""
    handles = axis.lines[: len(cells)]
    return handles, [textwrap.fill(line.get_label(), width) for line in handles]


def _legend_below(figure: Figure, axis: Axes, cells: dict[str, list[dict]], title: str | None = None):
    """A legend for all panels, in as many columns as the figure is wide enough for."""
    handles, labels = _entries(axis, cells, width=60)
    inches = 0.6 + 0.075 * max(len(line) for label in labels for line in label.splitlines())
    ncols = max(1, min(len(labels), int(figure.get_figwidth() / inches)))
    figure.legend(handles, labels, loc="outside lower center", ncols=ncols, title=title)
