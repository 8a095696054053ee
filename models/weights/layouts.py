"""The registry of layouts: what the tensors of a file are called, and how they become timm's, and timm's theirs.

To add a layout, call `enter` in a module of this folder that `models/weights/__init__.py` imports.
"""

import itertools
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from models.weights.names import Tensors


@dataclass(frozen=True)
class Layout:
    """The names of the tensors in one kind of files.

    Attributes:
        name: whose names they are.
        doc: how they become timm's.
        anchor: the name of a tensor that every file of this layout has. What a file has before it is a prefix, such as
            `backbone.`, which is removed from all names.
        matches: names of a file's tensors, without the prefix -> whether they are of this layout.
        to_timm: (tensors of a file without the prefix, model) -> the tensors with timm's names, and one line for each
            that was left out, or that the model computes in another way. A name that the layout does not know stays.
        from_timm: (the state_dict of a timm model, model) -> new tensors with the names of this layout; ValueError if
            the layout cannot hold the model. None where there is no such direction.
        beside: beginnings of names that stand beside the prefix and not behind it, such as a classifier.
        layer_norm_eps: of the layer norms of its models, unless their config.json says otherwise; None = timm's.
    """

    name: str
    doc: str
    anchor: str
    matches: Callable[[Collection[str]], bool]
    to_timm: Callable[[Tensors, nn.Module], tuple[Tensors, list[str]]]
    from_timm: Callable[[Tensors, nn.Module], Tensors] | None = None
    beside: tuple[str, ...] = ()
    layer_norm_eps: float | None = None


LAYOUTS: dict[str, Layout] = {}
"""{name: layout}. A file has the first layout that matches; otherwise its names are timm's."""


def enter(layout: Layout) -> Layout:
    """Enter a layout into `LAYOUTS`."""
    assert layout.name not in LAYOUTS, f"{layout.name} is entered twice"
    LAYOUTS[layout.name] = layout
    return layout


def is_weights(value) -> bool:
    """Whether a value is a dict of tensors and not empty."""
    return isinstance(value, dict) and bool(value) and all(torch.is_tensor(tensor) for tensor in value.values())


def unknown_names(names: Collection[str]) -> str:
    """A text about names of which none is known: the first three, and what all of them begin with."""
    words = zip(*(name.split(".") for name in names), strict=False)
    start = ".".join(of_all[0] for of_all in itertools.takewhile(lambda of_all: len({*of_all}) == 1, words))
    begin = f", which all begin with {start}," if start and len(names) > 1 else ""
    return f"{first(names)}{begin} are in no layout that is known ({', '.join([*LAYOUTS, 'timm'])})"


def first(names: Iterable[object]) -> str:
    """The first three of some names, and how many there are besides."""
    names = sorted(map(str, names))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def groups(names: Iterable[str], parent: str = "") -> str:
    """Names as the beginnings of modules within `parent`, with the number of their tensors: `head. (6 tensors)`."""
    counts = {}
    for name in names:
        start = parent if name.startswith(parent) else ""
        word, dot, _ = name[len(start) :].partition(".")
        counts[start + word + dot] = counts.get(start + word + dot, 0) + 1
    return ", ".join(f"{start} ({count} tensors)" if count > 1 else start for start, count in counts.items())


def layouts_table() -> str:
    """The documentation's table of layouts, one row per entry of `LAYOUTS`."""
    rows = ["| names | how they become timm's | both directions |", "|---|---|---|"]
    rows += [f"| {of.name} | {of.doc} | {'yes' if of.from_timm else ''} |" for of in LAYOUTS.values()]
    return "\n".join(rows)
