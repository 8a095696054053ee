"""The style of every plot, and training curves. The figures of redundancy are in redundancy_figures.py."""

import itertools
import math
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator

from reports.run_folders import read_log
from training.records import LOG
from utils import atomic_write

# Okabe and Ito, colour-blind safe
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":", "-.")
MAX_COLUMNS = 5  # of panels beside each other
plt.rcParams.update(
    {
        "figure.dpi": 120,
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "legend.frameon": False,
        "axes.formatter.useoffset": False,
    }
)


def curve_styles() -> Iterator[dict]:
    """Colour and line style of one curve after the other: all colours, then again in the next style."""
    return itertools.cycle([{"color": colour, "linestyle": style} for style in STYLES for colour in COLOURS])


def study_styles(places: Iterable[int | None]) -> list[dict]:
    """Colour and line style of each configuration, the same in all figures of a study.

    Args:
        places: of each configuration in its study; None for one that is not of a study, which gets a style that is
            left, as does one whose style is used already.
    """
    first = [*itertools.islice(curve_styles(), len(STYLES) * len(COLOURS))]
    styles = []
    for place in places:
        is_free = place is not None and place < len(first) and first[place] not in styles
        styles.append(first[place] if is_free else None)
    free = (style for style in curve_styles() if style not in styles)
    return [next(free) if style is None else style for style in styles]


def panels(rows: int, columns: int, width: float, height: float, **options) -> tuple[Figure, np.ndarray]:
    """A figure of a size in inches, and its axes [rows, columns]."""
    return plt.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False, **options)


def legend_below(figure: Figure, handles: list[Line2D], labels: list[str], title: str | None = None):
    """A legend below all panels, for which the figure becomes higher, in as many columns as fit into its width."""
    labels = [textwrap.fill(label, 60) for label in labels]
    inches = 0.6 + 0.075 * max(len(line) for label in labels for line in label.splitlines())
    ncols = max(1, min(len(labels), int(figure.get_figwidth() / inches)))
    lines = math.ceil(len(labels) / ncols) * max(label.count("\n") + 1 for label in labels)
    figure.set_figheight(figure.get_figheight() + 0.2 + 0.18 * lines + (0.2 if title else 0))
    figure.legend(handles, labels, loc="outside lower center", ncols=ncols, title=title)


def format_log_axis(axis: Axes, values: np.ndarray):
    """Plain numbers on a logarithmic y axis whose values are not far apart, where powers of ten would be too few."""
    if np.nanmax(values) < 100 * np.nanmin(values):
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))


def save(figure: Figure, path: Path):
    """Write path.png and path.pdf, and close the figure."""
    figure.savefig(path.with_name(f"{path.name}.png"))
    figure.set_layout_engine(None)  # it stays as computed for the first file; "none" would draw a third time
    figure.savefig(path.with_name(f"{path.name}.pdf"))
    plt.close(figure)


def curves(output_dir: Path, terms: list[str]) -> Path | None:
    """Draw `curves.png` from the log.txt of a run folder: losses, accuracies, and the raw values of `terms`.

    Returns the figure's path; None when the log has no epoch.
    """
    records = read_log(output_dir / LOG)
    if not records:
        return None
    columns = 3 if terms else 2
    height = 4.2 + 0.17 * max(0, len(terms) // 2 - 4)  # room for the legend of many terms
    figure, ((loss, accuracy, *raw),) = panels(1, columns, 4.4 * columns, height)
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
    try:
        with atomic_write(path) as file:
            figure.savefig(file, format="png")
    finally:
        plt.close(figure)
    return path


def _draw(axis, records: list[dict], columns: dict[str, str]):
    """One curve for each column."""
    marker = "o" if len(records) < 20 else None
    for style, (column, label) in zip(curve_styles(), columns.items(), strict=False):
        points = [(record["epoch"], record[column]) for record in records if record.get(column) is not None]
        if points:
            axis.plot(*zip(*points, strict=True), **style, label=label, marker=marker, markersize=3)


def training_curves(runs: list[tuple[str, list[dict], bool]], styles: list[dict] | None = None) -> Figure:
    """Test accuracies, raw and EMA, and classification losses of several runs against the epoch.

    The losses are cross-entropies, of the test set and of the class tokens in training: sums of different objectives
    are not compared. Thin lines are runs, thick ones the mean over a configuration's finished runs. A
    quantity is left out that no run has, or that only records have of their last epoch alone.

    Args:
        runs: of each run its configuration, its log.txt's records in order, and whether it has finished.
        styles: of the configurations, in their order; by default all colours in turn.
    """
    shown = {
        "test_acc1": ("Test accuracy, raw weights", "top-1, percent"),
        "test_acc1_ema": ("Test accuracy, EMA", "top-1, percent"),
        "test_loss": ("Test loss, raw weights", "nats per image"),
        "train_cls_ce": ("Training loss, classification", "nats per image"),
    }
    epochs = [epoch for _, records, _ in runs for epoch in records[:-1] or records]
    shown = {name: text for name, text in shown.items() if any(epoch.get(name) is not None for epoch in epochs)}
    marker = "o" if max(len(records) for _, records, _ in runs) < 20 else None
    columns, rows = min(len(shown), 2), math.ceil(len(shown) / 2)
    figure, axes = panels(rows, columns, 4.2 * columns + 2, 3.4 * rows + 0.2)
    for axis in axes.flat[len(shown) :]:
        axis.remove()
    names, handles = dict.fromkeys(name for name, _, _ in runs), []
    for name, style in zip(names, styles or curve_styles(), strict=False):
        of_name = [(records, has_finished) for other, records, has_finished in runs if other == name]
        for axis, column in zip(axes.flat, shown, strict=False):
            finished = []
            for records, has_finished in of_name:
                points = {r["epoch"]: r[column] for r in records if r.get(column) is not None}
                thin = {"linewidth": 0.7, "alpha": 0.6, "marker": marker, "markersize": 2}
                axis.plot(points.keys(), points.values(), **style, **thin)
                finished += [points] if has_finished else []
            epochs = sorted(set.intersection(*map(set, finished))) if finished else []
            means = [sum(points[epoch] for points in finished) / len(finished) for epoch in epochs]
            axis.plot(epochs, means, **style, linewidth=2, marker=marker, markersize=3)
        label = name if any(has_finished for _, has_finished in of_name) else f"{name} (none finished)"
        handles.append(Line2D([], [], **style, linewidth=2, label=label))
    for axis, (title, unit) in zip(axes.flat, shown.values(), strict=False):
        axis.set(title=title, xlabel="epoch", ylabel=unit)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if "test_acc1_ema" in shown:
        axes[0, 1].sharey(axes[0, 0])
    title, ncols = "thick: mean of finished\nseeds; thin: each seed", 1 + len(handles) // 20
    figure.legend(handles=handles, loc="outside right upper", title=title, ncols=ncols)
    return figure
