"""The figures of redundancy and of the function level: which ones some reports have the numbers for."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from matplotlib.figure import Figure

from reports import function_figures, map_figures, redundancy_figures


class Kind(NamedTuple):
    """One figure of several configurations.

    Attributes:
        draw: the function of {configuration: reports of its runs} and their styles.
        needs: keys of a redundancy.json that have what it draws.
        caption: what it shows, a sentence or more.
    """

    draw: Callable[[dict[str, list[dict]], list[dict] | None], Figure]
    needs: tuple[str, ...]
    caption: str


FIGURES = {
    "depth": Kind(
        redundancy_figures.redundancy_depth,
        ("embedding", "attention", "mlp"),
        "Redundancy of patch tokens by layer, and of attention maps and MLPs by block. Arrows point to less of it.",
    ),
    "function": Kind(
        function_figures.function_level,
        ("function",),
        "What the models still do without a part of themselves: accuracy without heads, a block or patch tokens; k-NN "
        "and linear probes by layer; the patch probe, its bars in the order of the legend. A row that keeps its "
        "accuracy where another loses it is robust, or has parts to spare: compare the curve of the chosen parts with "
        "the random one.",
    ),
    "weights": Kind(redundancy_figures.weight_depth, ("weight",), "Redundancy of the weight matrices by block."),
    "spectra": Kind(
        redundancy_figures.weight_spectra,
        ("spectra",),
        "Singular values of the weight matrices over the largest one, and below them over those of the first row.",
    ),
    "variance": Kind(
        redundancy_figures.variance,
        ("variance",),
        "Variance of all patch tokens in their first principal components. A curve that rises late has tokens in many "
        "directions.",
    ),
    "circuits": Kind(
        redundancy_figures.circuits, ("circuit",), "Redundancy of the QK and OV circuits of heads by block."
    ),
    "cka": Kind(
        lambda configurations, styles: map_figures.layer_similarity(configurations),
        ("cka",),
        "Similarity of the layers (linear CKA of mean patch tokens).",
    ),
}
"""{name of the file: the figure}, in the order of a page."""


def can_draw(name: str, configurations: dict[str, list[dict]]) -> bool:
    """Whether all reports have what a figure draws; for circuits, those of one configuration are enough."""
    have = [all(report.get(key) for report in of_runs for key in FIGURES[name].needs) for of_runs in
            configurations.values()]  # fmt: skip
    return any(have) if name == "circuits" else all(have)


def draw_all(configurations: dict[str, list[dict]], styles: Sequence[dict] | None = None) -> dict[str, Figure]:
    """{name: figure} of all figures that the reports have the numbers for."""
    return {name: kind.draw(configurations, styles) for name, kind in FIGURES.items() if can_draw(name, configurations)}
