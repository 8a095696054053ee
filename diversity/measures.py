"""The registry of measures of redundancy: one decorated function for each, computed for every layer or weight matrix.

The parameters of a function name what it reads, in float64:

- embedding: `tokens` [B, P, D], the patch tokens of a layer; `first` [B, P, D], those of the first layer of its stage;
  `variance` [D], the fractions of the variance of all images' tokens along their principal axes, in falling order.
- attention: `maps` [B, H, N, N], after the softmax, prefix tokens included; `previous`, the maps of the block before,
  or None where those are of other windows.
- weight: `matrix` [Dout, Din]; `singular_values`, in falling order.

It returns one value for each image, or one for all; None where there is nothing to compare.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from .regularizers import LEVELS
from .similarity import cosines, mean_cosine, mean_cross_cosine, without_diagonal

FLOAT64_EPSILON = torch.finfo(torch.float64).eps
ARROWS = {"lower": " ↓", "higher": " ↑", None: ""}
SUMMARY_PLACES = {
    "embedding": {"": "all layers", "_last": "last layer"},
    "attention": {"": "all blocks", "_first": "first block"},
    "weight": {"": "all matrices", "_qkv": "q k v"},
}
"""{level: {suffix of a name in a report's summary: the layers or matrices it is the mean of}}."""


@dataclass(frozen=True)
class Measure:
    """One measure of redundancy.

    Attributes:
        name: its name in `MEASURES`.
        level: "embedding", "attention" or "weight".
        heading: what it is, for the headings of tables and the titles of plots.
        unit: label of its axis in a plot.
        better: "lower" or "higher", whichever is less redundant; None where neither is.
        geometric: whether its means are geometric and its axis is logarithmic.
        reads: what it reads, see this module's docstring.
        doc: its docstring: the formula, and in the second paragraph the range.
        function: the decorated function.
    """

    name: str
    level: str
    heading: str
    unit: str
    better: str | None
    geometric: bool
    reads: tuple[str, ...]
    doc: str
    function: Callable[..., torch.Tensor | None]

    def __call__(self, **inputs) -> torch.Tensor | None:
        """Compute it from what it reads; further inputs of its level are ignored."""
        return self.function(**{name: inputs[name] for name in self.reads})

    @property
    def key(self) -> str:
        """Its name among the measures of its level, as reports have it: without the level in front."""
        return self.name.removeprefix(f"{self.level}_")

    def label(self, place: str = "") -> str:
        """Its heading with the layers it is of, and an arrow that points to less redundancy."""
        return self.heading + (f", {place}" if place else "") + ARROWS[self.better]


MEASURES: dict[str, Measure] = {}


def measure(level: str, heading: str, unit: str, better: str | None, geometric: bool = False):
    """Enter the decorated function into `MEASURES` under its own name; for the arguments see `Measure`."""
    assert level in LEVELS and better in ARROWS, f"unknown level {level!r} or direction {better!r}"

    def enter(function: Callable[..., torch.Tensor | None]) -> Measure:
        reads, doc = tuple(inspect.signature(function).parameters), inspect.getdoc(function)
        assert function.__name__ not in MEASURES, f"{function.__name__} is entered twice"
        entry = Measure(function.__name__, level, heading, unit, better, geometric, reads, doc, function)
        MEASURES[entry.name] = entry
        return entry

    return enter


def measures_of(level: str) -> dict[str, Measure]:
    """{key: the measures of a level}, in the order of `MEASURES`."""
    return {entry.key: entry for entry in MEASURES.values() if entry.level == level}


def summary_measures() -> dict[str, tuple[Measure, str]]:
    """{name in a report's summary: its measure, and the layers or matrices it is the mean of}."""
    return {
        f"{level}_{key}{suffix}": (entry, place)
        for level, places in SUMMARY_PLACES.items()
        for key, entry in measures_of(level).items()
        for suffix, place in places.items()
    }


def measures_table() -> str:
    """The docs' Markdown table of measures, one row for each entry of `MEASURES`."""
    rows = ["| level | name | heading in tables | unit | value | range |", "|---|---|---|---|---|---|"]
    for entry in MEASURES.values():
        value, value_range = (" ".join(part.split()).replace("|", r"\|") for part in entry.doc.split("\n\n")[:2])
        rows.append(f"| {entry.level} | `{entry.key}` | {entry.label()} | {entry.unit} | {value} | {value_range} |")
    return "\n".join(rows)


def effective_rank_of(singular_values: torch.Tensor) -> torch.Tensor:
    """exp(H(s / sum s)) over the last axis: 1 for a matrix of rank 1, n for n equal singular values.

    Source: The effective rank (Roy and Vetterli 2007).
    """
    fractions = singular_values / singular_values.sum(dim=-1, keepdim=True).clamp_min(1e-300)
    return torch.special.entr(fractions).sum(dim=-1).exp()


@measure("embedding", "token cosine", unit="cosine", better="lower")
def token_cosine(tokens):
    """Mean cosine of two different patch tokens of an image.

    From -1 / (P - 1) to 1; 1 for parallel tokens, 0 for orthogonal ones.
    """
    return without_diagonal(mean_cosine(tokens), tokens) if tokens.shape[1] > 1 else None


@measure("embedding", "absolute token cosine", unit="absolute cosine", better="lower")
def token_abscosine(tokens):
    """Mean absolute cosine of two different patch tokens of an image.

    From 0 for orthogonal tokens to 1 for tokens along one line.
    """
    if tokens.shape[1] < 2:
        return None
    return without_diagonal(cosines(tokens).abs().mean(dim=(-2, -1)), tokens)


@measure("embedding", "cosine to the first embedding", unit="cosine", better="lower")
def first_cosine(tokens, first):
    """Mean cosine of a patch token and its own first embedding, the input of the first block (of its stage in a Swin).

    From -1 to 1; 1 where the blocks only rescale the tokens.
    """
    return F.cosine_similarity(first, tokens, dim=-1).mean(dim=-1)


@measure("embedding", "effective rank", unit="rank", better="higher")
def effective_rank(tokens):
    """exp(H(s / sum s)) of the singular values s of an image's matrix of patch tokens, H the entropy.

    From 1 for parallel tokens to min(P, D) for orthogonal tokens of one length.
    """
    tokens = tokens.mT if tokens.shape[-2] > tokens.shape[-1] else tokens
    return effective_rank_of(torch.linalg.eigvalsh(tokens @ tokens.mT).clamp_min(0).sqrt())


@measure("embedding", "components of 90 % of the variance", unit="principal components", better="higher")
def components_90(variance):
    """Number of principal components that hold 90 % of the variance of all images' patch tokens.

    From 1 to 90 % of D.
    """
    return (variance.cumsum(0) < 0.9 - 1e-9).sum() + 1


@measure("attention", "head cosine", unit="cosine", better="lower")
def head_cosine(maps):
    """Mean cosine of the flattened attention maps of two different heads.

    From 0 for heads that attend to different tokens to 1 for equal maps.
    """
    maps = maps.flatten(start_dim=2)
    return without_diagonal(mean_cosine(maps), maps) if maps.shape[1] > 1 else None


@measure("attention", "standard deviation of a row", unit="standard deviation", better=None)
def row_std(maps):
    """Mean standard deviation of a token's attention row.

    From 0 for uniform attention to about 1 / sqrt(N) for attention to one token.
    """
    return maps.std(dim=-1, unbiased=False).mean(dim=(-2, -1))


@measure("attention", "entropy of a row in nats", unit="nats", better=None)
def row_entropy(maps):
    """Mean entropy of a token's attention row.

    From 0 for attention to one token to log N for uniform attention.
    """
    return torch.special.entr(maps).sum(dim=-1).mean(dim=(-2, -1))


@measure("attention", "cosine to the block before", unit="cosine", better="lower")
def previous_cosine(maps, previous):
    """Mean cosine of the flattened map of a head and each map of the block before; in a Swin only of the same windows.

    From 0 to 1; 1 where all maps of both blocks are equal.
    """
    return None if previous is None else mean_cross_cosine(previous.flatten(start_dim=2), maps.flatten(start_dim=2))


@measure("weight", "effective rank of weights", unit="rank", better="higher")
def weight_effective_rank(singular_values):
    """exp(H(s / sum s)) of the singular values s of the matrix, H the entropy.

    From 1 for a matrix of rank 1 to min(Dout, Din) for equal singular values.
    """
    return effective_rank_of(singular_values)


@measure("weight", "condition number", unit="ratio", better="lower", geometric=True)
def condition_number(singular_values):
    """Largest over smallest singular value; means are geometric.

    From 1 for equal singular values to 1 / the epsilon of float64, the limit.
    """
    return 1 / (singular_values[-1] / singular_values[0]).nan_to_num().clamp_min(FLOAT64_EPSILON)


@measure("weight", "absolute row cosine", unit="absolute cosine", better="lower")
def row_abscosine(matrix):
    """Mean absolute cosine of two different rows.

    From 0 for orthogonal rows to 1 for rows along one line.
    """
    return without_diagonal(cosines(matrix).abs().mean(), matrix)


@measure("weight", "smallest angle of rows in degrees", unit="degrees", better="higher")
def smallest_angle(matrix):
    """Smallest angle between the lines along two rows.

    From 0 for two rows along one line to 90 for orthogonal rows.
    """
    closest = cosines(matrix).abs().fill_diagonal_(0).max().clamp_max(1)
    return closest.new_tensor(math.degrees(math.acos(closest.item())))
