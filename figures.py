"""Every plot, in one style."""

import itertools
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
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


def read_log(path: Path) -> list[dict]:
    """The epochs of a log.txt, in order; lines that are not whole JSON are skipped and said."""
    records = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            print(f"{path}:{number}: not a whole JSON line, skipped")
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


def _draw(axis, records: list[dict], columns: dict[str, str]):
    """One curve a column, with a look of its own for each."""
    marker = "o" if len(records) < 20 else None
    looks = [(colour, style) for style in STYLES for colour in COLOURS]
    for (colour, style), (column, label) in zip(itertools.cycle(looks), columns.items(), strict=False):
        points = [(record["epoch"], record[column]) for record in records if record.get(column) is not None]
        if points:
            axis.plot(
                *zip(*points, strict=True), color=colour, linestyle=style, label=label, marker=marker, markersize=3
            )
