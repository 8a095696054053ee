"""Figures that are maps: the similarity of layers, and the attention of heads."""

import math
import textwrap

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from reports.figures import MAX_COLUMNS, panels

HEADS_PER_LINE = 6


def layer_similarity(configurations: dict[str, list[dict]]) -> Figure:
    """Linear CKA between all layers, one map for each configuration, the mean over its runs."""
    columns = min(len(configurations), MAX_COLUMNS)
    rows = math.ceil(len(configurations) / columns)
    figure, axes = panels(rows, columns, 3.2 * columns + 1, 3.3 * rows)
    for axis in axes.flat[len(configurations) :]:
        axis.remove()
    for axis, (name, reports) in zip(axes.flat, configurations.items(), strict=False):
        maps = np.array([report["cka"] for report in reports], dtype=float)
        image = axis.imshow(maps.mean(axis=0), vmin=0, vmax=1, cmap="viridis", origin="lower")
        several = f" (mean of {len(reports)} runs)" if len(reports) > 1 else ""
        axis.set_title(textwrap.fill(name + several, 34), fontsize=9)
        axis.set(xlabel="layer (0: input of block 0)", ylabel="layer")
        axis.grid(False)
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=axes, shrink=0.8).set_label("linear CKA of mean patch tokens")
    return figure


def attention_heads(
    maps: np.ndarray, picture: np.ndarray | None, prefix_tokens: list[str], grid: tuple[int, int] | None, title: str
) -> Figure:
    """The attention maps of a block's heads for one image; below each, the first prefix token's row over the patches.

    maps [H, N, N], rows sum to 1; picture [S, S, 3] in 0..1, if there is one to show. `prefix_tokens` are the names of
    the tokens in front of the patches. `grid` is None when the tokens do not lie on the grid (a window of a Swin).
    """
    heads, prefix = len(maps), len(prefix_tokens)
    kinds = [maps]
    if prefix_tokens and grid:
        kinds.append(maps[:, 0, prefix:].reshape(heads, *grid))
    norms = [PowerNorm(0.5, vmin=0, vmax=float(kind.max())) for kind in kinds]
    lines, in_a_line, left = math.ceil(heads / HEADS_PER_LINE), min(heads, HEADS_PER_LINE), int(picture is not None)
    rows, columns = lines * len(kinds), in_a_line + left
    figure, axes = panels(rows, columns, 2 * columns + 1.2, 2.2 * rows + 0.4)
    for axis in axes.flat:
        axis.set_axis_off()
    if left:
        axes[0, 0].imshow(picture)
        axes[0, 0].set_title("image", fontsize=9)
    for row in range(rows):
        line, kind = divmod(row, len(kinds))
        shown = range(line * HEADS_PER_LINE, min(heads, (line + 1) * HEADS_PER_LINE))
        for axis, head in zip(axes[row, left:], shown, strict=False):
            axis.set_axis_on()
            axis.grid(False)
            image = axis.imshow(kinds[kind][head], norm=norms[kind], cmap="viridis")
            axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            axis.yaxis.set_major_locator(MaxNLocator(4, integer=True))
            axis.tick_params(labelsize=7)
            axis.set_title(f"head {head}" if kind == 0 else f"row of the {prefix_tokens[0]}", fontsize=9 - kind)
            axis.set_xlabel("patch column" if kind else "attended token (key)", fontsize=8)
        zero = f"\n(0: {prefix_tokens[0]})" if prefix_tokens else ""
        axes[row, left].set_ylabel("patch row" if kind else f"attending token (query){zero}", fontsize=8)
        figure.colorbar(image, ax=axes[row, -1], shrink=0.8).set_label("attention\n(colour: square root)", fontsize=8)
    figure.suptitle(textwrap.fill(title, int(12 * figure.get_figwidth())), fontsize=10)
    return figure
