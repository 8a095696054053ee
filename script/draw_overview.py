"""Draw Figs/overview.png: where the terms read a vision transformer, and what each of the paper's terms changes.

    python -m script.draw_overview

The numbers in the figure are invented, not measured.
"""

import itertools
from pathlib import Path

import numpy as np
from matplotlib.colors import to_rgba
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from reports import figures  # sets the style
from reports.figures import COLOURS, plt

FOLDER = Path(__file__).parents[1] / "Figs"

EMBEDDING, ATTENTION, WEIGHT = COLOURS[0], "#B34700", "#00734F"  # darker than the curves': they colour text, too


def box(axis, x, width, text, colour="white", edge="#444444"):
    """A labelled box on the line of the model; returns its centre."""
    axis.add_patch(FancyBboxPatch((x, 0.38), width, 0.34, boxstyle="round,pad=0.01", facecolor=colour, edgecolor=edge))
    axis.text(x + width / 2, 0.55, text, ha="center", va="center", fontsize=9)
    return x + width / 2


def tap(axis, x, colour, text, y=0.05, top=0.38):
    """An arrow from the model down to the name of a tap."""
    axis.add_patch(FancyArrowPatch((x, top), (x, y + 0.12), arrowstyle="-|>", mutation_scale=10, color=colour))
    axis.text(x, y, text, ha="center", va="center", fontsize=9, color=colour, family="monospace")


def draw_model(axis):
    """The transformer as a row of boxes, with the taps below it."""
    axis.set(xlim=(-0.1, 12.1), ylim=(-0.08, 0.85))
    axis.axis("off")
    parts = [
        (0.0, 1.3, "image,\nmixed"),
        (1.75, 1.7, "patch + position\nembedding"),
        (3.9, 2.0, "block 0\nattention, MLP"),
        (6.35, 1.0, "..."),
        (7.8, 1.4, "block L-1"),
        (9.65, 0.9, "norm"),
        (11.0, 0.95, "head"),
    ]
    centres = [box(axis, *part) for part in parts]
    for (left, width, _), (right, _, _) in itertools.pairwise(parts):
        ends = (left + width, 0.55), (right, 0.55)
        axis.add_patch(FancyArrowPatch(*ends, arrowstyle="-|>", mutation_scale=10, color="#444444"))
    tap(axis, 3.68, EMBEDDING, "first", top=0.55)
    tap(axis, centres[2], ATTENTION, "attention")
    tap(axis, centres[3], WEIGHT, "weights (q, k, v of all blocks)")
    tap(axis, 9.42, EMBEDDING, "last", top=0.55)
    tap(axis, centres[6], EMBEDDING, "patch logits")


def draw_tokens(axis, angles):
    """Unit tokens as arrows from one point."""
    for angle in angles:
        axis.annotate("", (np.cos(angle), np.sin(angle)), (0, 0), arrowprops={"arrowstyle": "-|>", "color": EMBEDDING})
    axis.add_patch(plt.Circle((0, 0), 1, fill=False, color="#bbbbbb", linewidth=0.8))
    axis.set(xlim=(-1.15, 1.15), ylim=(-1.15, 1.15), aspect="equal")
    axis.axis("off")


def draw_maps(axis, heads):
    """The attention maps of heads, numbers of patterns, side by side."""
    index = np.arange(8)
    patterns = [
        np.exp(-np.abs(index[:, None] - index)),
        np.tile(np.eye(8)[2] + 0.05, (8, 1)),
        np.exp(-np.abs(index[:, None] - 7 + index)),
    ]
    maps = np.pad([patterns[head] for head in heads], ((0, 0), (0, 0), (0, 1)), constant_values=np.nan)
    axis.imshow(np.concatenate(maps, axis=1)[:, :-1], cmap="Oranges")
    axis.axis("off")


def draw_spectrum(axis, values):
    """Singular values as bars."""
    axis.bar(range(len(values)), values, color=WEIGHT)
    axis.set(xticks=[], yticks=[], ylim=(0, 1.05), facecolor="none")
    axis.set_box_aspect(0.48)
    axis.set_xlabel("singular values of one matrix", fontsize=8)
    axis.grid(False)


def draw_both(panel, draw, redundant, diverse, what=""):
    """A redundant example, and a diverse one below it."""
    for axis, example, title in zip(panel.subplots(2, 1), (redundant, diverse), ("redundant", "diverse"), strict=True):
        draw(axis, example)
        axis.set_title(title + what, fontsize=9)


LEVELS = {
    "Level 1: patch embeddings": (EMBEDDING, ""),
    "Level 2: attention maps": (ATTENTION, "attn_cos_within:\nless similar heads in block 0"),
    "Level 3: weights": (WEIGHT, "weight_mha_cond_orth:\na narrow spectrum of W W^T"),
}
TOKENS = (
    "emb_cos_within: less similar tokens in the last layer\n"
    "emb_contrast_cross: each token similar to its own\nfirst embedding, not to the other tokens"
)
MIXING = "mixing, a supporting loss: every token\nclassified by the label of its pixels"


def draw_mixed_image(axis):
    """An image with a pasted box, and the label of each patch."""
    image = np.zeros((4, 4))
    image[1:3, 2:4] = 1
    axis.imshow(image, cmap="Blues", vmin=-0.4, vmax=2.6)
    for row in range(4):
        for column in range(4):
            axis.text(column, row, "cat" if image[row, column] else "dog", ha="center", va="center", fontsize=8)
    axis.set(xticks=np.arange(-0.5, 4), yticks=np.arange(-0.5, 4), xticklabels=[], yticklabels=[])
    axis.tick_params(length=0)
    axis.grid(color="white", linewidth=2, alpha=1)
    axis.set_title("a label for each patch", fontsize=9)


def overview():
    """The complete figure: the model, and below it a panel for each of the three levels."""
    figure = plt.figure(figsize=(13, 7.4), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.06)
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 2.6))
    draw_model(top.subplots())
    panels = bottom.subfigures(1, 3, width_ratios=(2.1, 1.1, 1.1), wspace=0.03)
    for panel, (level, (colour, text)) in zip(panels, LEVELS.items(), strict=True):
        panel.set_facecolor(to_rgba(colour, 0.04))
        panel.suptitle(level, color=colour, fontsize=12, fontweight="bold")
        panel.supxlabel(text, fontsize=8.5)
    tokens, labels = panels[0].subfigures(1, 2, width_ratios=(1.05, 1))
    close, apart = 0.25 * np.random.RandomState(1).standard_normal(7), 2 * np.pi * np.arange(7) / 7
    draw_both(tokens, draw_tokens, 0.9 + close, 0.3 + apart)
    tokens.supxlabel(TOKENS, fontsize=8.5)
    draw_mixed_image(labels.subplots())
    labels.supxlabel(MIXING, fontsize=8.5)
    draw_both(panels[1], draw_maps, (0, 0, 0), (0, 1, 2), ": three heads")
    draw_both(panels[2], draw_spectrum, np.exp(-0.55 * np.arange(10)), 0.9 - 0.03 * np.arange(10))
    return figure


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    figures.save(overview(), FOLDER / "overview")
