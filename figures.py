"""Every plot, in one style."""

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
)  # Okabe and Ito, colour-blind safe
STYLES = ("-", "--", ":", "-.")
plt.rcParams.update(
    {
        "figure.dpi": 120,
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "legend.frameon": False,
    }
)


def read_log(path: Path, notices: TextIO | None = None) -> list[dict]:
    """The epochs of a log.txt, in order; lines that are not whole JSON are skipped and said, by default on stdout."""
    records = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            print(f"{path}:{number}: not a whole JSON line, skipped", file=notices)
    return records


def curves(output_dir: Path, terms: list[str]) -> Path | None:
    """Draw `curves.png` from a run's log.txt: losses, accuracies, and each term's raw value.

    Args:
        output_dir: the run folder.
        terms: names of the terms to draw, at most one curve each.

    Returns:
        The figure's path; None when the log holds no epoch.
    """
    records = read_log(output_dir / "log.txt")
    if not records:
        return None
    columns = 3 if terms else 2
    figure, (loss, accuracy, *raw) = plt.subplots(1, columns, figsize=(4.4 * columns, 4.2), layout="constrained")
    _draw(loss, records, {"train_loss": "train, all terms", "test_loss": "test, raw", "test_loss_ema": "test, EMA"})
    loss.set(title="Loss", ylabel="nats per image")
    _draw(accuracy, records, {"test_acc1": "raw", "test_acc1_ema": "EMA"})
    accuracy.set(title="Top-1 accuracy on the test set", ylabel="percent")
    if terms:
        _draw(raw[0], records, {f"train_{name}": name for name in terms})
        below_zero = any(record.get(f"train_{name}", 1) <= 0 for record in records for name in terms)
        if below_zero:
            raw[0].set_yscale("symlog", linthresh=1e-2)
        else:
            raw[0].set_yscale("log")
        scale = "linear below 0.01, log beyond" if below_zero else "log scale"
        raw[0].set(title="Terms, before their coefficients", ylabel=f"raw value ({scale})")
    for axis in (loss, accuracy, *raw):
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, fontsize=8)
    path = output_dir / "curves.png"
    figure.savefig(path)
    plt.close(figure)
    return path


def _looks() -> Iterator[dict]:
    """Colour and line style of one curve after the other: all colours, then again in the next style."""
    return itertools.cycle([{"color": colour, "linestyle": style} for style in STYLES for colour in COLOURS])


def _draw(axis, records: list[dict], columns: dict[str, str]):
    """One curve a column, with a look of its own for each."""
    marker = "o" if len(records) < 20 else None
    for look, (column, label) in zip(_looks(), columns.items(), strict=False):
        points = [(record["epoch"], record[column]) for record in records if record.get(column) is not None]
        if points:
            axis.plot(*zip(*points, strict=True), **look, label=label, marker=marker, markersize=3)


def redundancy_depth(reports: dict[str, dict]) -> Figure:
    """Redundancy against depth: the measures of embeddings and attention, one curve a run.

    Args:
        reports: {name: what `measure_redundancy` returned}, all of one architecture.
    """
    panels = {
        ("embedding", "token_cosine"): ("Cosine of two tokens", "cosine"),
        ("embedding", "token_abscosine"): ("Absolute cosine of two tokens", "|cosine|"),
        ("embedding", "first_cosine"): ("Cosine to the first embedding", "cosine"),
        ("embedding", "effective_rank"): ("Effective rank of the tokens", "rank"),
        ("attention", "head_cosine"): ("Cosine of two heads' maps", "cosine"),
        ("attention", "previous_cosine"): ("Cosine to the block before, all pairs", "cosine"),
        ("attention", "row_std"): ("Spread of an attention row", "standard deviation"),
        ("attention", "row_entropy"): ("Entropy of an attention row", "nats"),
    }
    figure, axes = plt.subplots(2, 4, figsize=(13, 5.6), layout="constrained")
    for axis, ((level, measure), (title, unit)) in zip(axes.flat, panels.items(), strict=True):
        for look, (name, report) in zip(_looks(), reports.items(), strict=False):
            values = report[level][measure]
            values = [math.nan if value is None else value for value in values]
            axis.plot(range(len(values)), values, **look, marker="o", markersize=3, label=name)
        axis.set(title=title, ylabel=unit, xlabel="layer" if level == "embedding" else "block")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend_below(figure, axes.flat[0], len(reports))
    return figure


def weight_spectra(reports: dict[str, dict]) -> Figure:
    """Singular values of every matrix over the largest: geometric mean over the blocks, band from least to most.

    Args, as in `redundancy_depth`.
    """
    matrices = list(next(iter(reports.values()))["spectra"])
    figure, axes = plt.subplots(1, len(matrices), figsize=(2.6 * len(matrices), 3.4), layout="constrained", sharey=True)
    for axis, matrix in zip(axes, matrices, strict=True):
        for look, (name, report) in zip(_looks(), reports.items(), strict=False):
            groups = {}
            for values in report["spectra"][matrix]:
                groups.setdefault(len(values), []).append(
                    [max(value / max(values[0], 1e-30), 1e-6) for value in values]
                )
            blocks = np.array(groups[max(groups)])  # a Swin's stages differ in width; the widest is drawn
            index = np.arange(1, blocks.shape[1] + 1)
            axis.plot(index, np.exp(np.log(blocks).mean(axis=0)), **look, label=name)
            axis.fill_between(
                index, blocks.min(axis=0), blocks.max(axis=0), color=look["color"], alpha=0.15, linewidth=0
            )
        axis.set(title=matrix, xlabel="singular value, number", yscale="log")
    axes[0].set_ylabel("over the largest (log scale)")
    _legend_below(figure, axes[0], len(reports))
    return figure


def variance(reports: dict[str, dict]) -> Figure:
    """Share of the variance of all tokens in the first principal components, for the first, middle and last layer.

    Args, as in `redundancy_depth`.
    """
    depth = len(next(iter(reports.values()))["variance"]) - 1
    layers = dict.fromkeys((0, depth // 2, depth))
    figure, axes = plt.subplots(1, len(layers), figsize=(4 * len(layers), 3.6), layout="constrained", sharey=True)
    for axis, layer in zip(np.atleast_1d(axes), layers, strict=True):
        for look, (name, report) in zip(_looks(), reports.items(), strict=False):
            shares = 100 * np.cumsum(report["variance"][layer])
            axis.plot(np.arange(1, len(shares) + 1), shares, **look, label=name)
        axis.axhline(90, color="grey", linewidth=0.8, linestyle=":")
        axis.set(title=f"Layer {layer}" + (" (first embedding)" if layer == 0 else ""), xlabel="principal components")
        axis.set(ylim=(0, 102), xscale="log")
    np.atleast_1d(axes)[0].set_ylabel("variance explained, percent")
    _legend_below(figure, np.atleast_1d(axes)[0], len(reports))
    return figure


def attention_heads(maps, num_prefix_tokens: int, title: str) -> Figure:
    """The attention maps of a block's heads for one image; below, what the class token sees, on the grid of patches.

    Args:
        maps: [H, N, N], rows sum to 1.
        num_prefix_tokens: tokens in front of the patches; the second row is left out without one, or off a square grid.
        title: of the figure.
    """
    heads, tokens, _ = maps.shape
    side = math.isqrt(tokens - num_prefix_tokens)
    rows = 2 if num_prefix_tokens and side * side == tokens - num_prefix_tokens else 1
    figure, axes = plt.subplots(
        rows, heads, figsize=(1.9 * heads + 1, 2.2 * rows + 0.5), layout="constrained", squeeze=False
    )
    pictures = [maps] if rows == 1 else [maps, maps[:, 0, num_prefix_tokens:].reshape(heads, side, side)]
    labels = ("token that looks", "class token, on the grid")
    for row, (picture, label) in enumerate(zip(pictures, labels, strict=False)):
        for head in range(heads):
            axis = axes[row, head]
            image = axis.imshow(picture[head], norm=PowerNorm(0.5, vmin=0, vmax=float(picture.max())), cmap="viridis")
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
            if row == 0:
                axis.set_title(f"head {head}", fontsize=9)
                axis.set_xlabel("token looked at", fontsize=8)
        axes[row, 0].set_ylabel(label, fontsize=8)
        figure.colorbar(image, ax=axes[row], shrink=0.8, label="attention")
    figure.suptitle(title, fontsize=10)
    return figure


def _legend_below(figure, axis, entries: int):
    if entries > 1:
        figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=min(entries, 5))


def save(figure: Figure, path: Path):
    """Write path.png and path.pdf, and let go of the figure."""
    for suffix in (".png", ".pdf"):
        figure.savefig(path.with_name(path.name + suffix))
    plt.close(figure)


def training_curves(runs: list[tuple[str, list[dict], bool]]) -> Figure:
    """Test accuracy, raw and EMA, and training loss of several runs against the epoch, in one colour for each cell.

    Thin lines are runs, thick ones the mean over a cell's finished runs. A quantity that no run has is left out.

    Args:
        runs: for each run its cell, its log.txt's records in order, and whether it has finished.
    """
    panels = {
        "test_acc1": ("Test accuracy, raw weights", "top-1, percent"),
        "test_acc1_ema": ("Test accuracy, EMA", "top-1, percent"),
        "train_loss": ("Training loss, all terms", "nats per image"),
    }
    panels = {name: text for name, text in panels.items() if any(name in r for _, records, _ in runs for r in records)}
    longest = max(len(records) for _, records, _ in runs)
    marker = "o" if longest < 20 else None
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.2 * len(panels) + 2, 3.8), layout="constrained", squeeze=False
    )
    handles = []
    for cell, look in zip(dict.fromkeys(cell for cell, _, _ in runs), _looks(), strict=False):
        for axis, column in zip(axes[0], panels, strict=True):
            finished = []
            for records, has_finished in [(records, end) for name, records, end in runs if name == cell]:
                points = {r["epoch"]: r[column] for r in records if r.get(column) is not None}
                axis.plot(points.keys(), points.values(), **look, linewidth=0.7, alpha=0.6, marker=marker, markersize=2)
                finished += [points] if has_finished else []
            epochs = sorted(set.intersection(*map(set, finished))) if finished else []
            means = [sum(points[epoch] for points in finished) / len(finished) for epoch in epochs]
            axis.plot(epochs, means, **look, linewidth=2, marker=marker, markersize=3)
        label = cell if any(name == cell and end for name, _, end in runs) else f"{cell} (none finished)"
        handles.append(Line2D([], [], **look, linewidth=2, label=label))
    for axis, (title, unit) in zip(axes[0], panels.values(), strict=True):
        axis.set(title=title, xlabel="epoch", ylabel=unit)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if "test_acc1_ema" in panels:
        axes[0, 1].sharey(axes[0, 0])
    title, ncols = "thick: mean of finished\nseeds; thin: each seed", 1 + len(handles) // 20
    figure.legend(handles=handles, loc="outside right upper", title=title, ncols=ncols)
    return figure
