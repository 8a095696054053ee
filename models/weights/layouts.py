"""The registry of layouts: what the tensors of a file are called, and how they become timm's.

To add a layout, write a function here that renames the tensors of a file and decorate it with `layout`. To add a
trainer whose checkpoints have the weights under another key, add its keys to `CONTAINERS`.
"""

import itertools
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import timm
import torch

Tensors = dict[str, torch.Tensor]

CONTAINERS = {"timm": ("state_dict", "state_dict_ema"), "DeiT and this program": ("model", "model_ema")}
"""{whose checkpoints: keys of the raw and of the averaged weights}; a file without these keys is a dict of weights."""


@dataclass(frozen=True)
class Layout:
    """The names of the tensors in one kind of files.

    Attributes:
        name: whose names they are.
        doc: how they become timm's.
        matches: names of a file's tensors -> whether they are of this layout.
        to_timm: tensors of a file -> the same with timm's names, and one line for each that was left out.
    """

    name: str
    doc: str
    matches: Callable[[Collection[str]], bool]
    to_timm: Callable[[Tensors], tuple[Tensors, list[str]]]


LAYOUTS: dict[str, Layout] = {}
"""{name: layout}. A file has the first layout that matches; otherwise its names are timm's."""


def layout(name: str, matches: Callable[[Collection[str]], bool]):
    """Enter the decorated function, which is `to_timm`, into `LAYOUTS`."""

    def enter(function: Callable[[Tensors], tuple[Tensors, list[str]]]):
        assert name not in LAYOUTS, f"{name} is entered twice"
        LAYOUTS[name] = Layout(name, " ".join(function.__doc__.split()), matches, function)
        return function

    return enter


def weights_in(stored, use_ema: bool, path: str) -> tuple[Tensors, list[str]]:
    """The weights in the content of a file, with timm's names, and one line for each tensor that was left out.

    Args:
        stored: what `read` returned.
        use_ema: take the averaged weights.
        path: of the file, for the errors.

    Raises:
        ValueError: there are no such weights.
    """
    keys = [average if use_ema else raw for raw, average in CONTAINERS.values()]
    weights = next((stored[key] for key in keys if key in stored), None) if isinstance(stored, dict) else None
    if use_ema and weights is None:
        raise ValueError(f"{path} contains no averaged weights")
    weights = stored if weights is None else weights
    if not is_weights(weights):
        keys = f"; its keys are {_first(stored)}" if isinstance(stored, dict) and stored else ""
        raise ValueError(f"{path} contains no model weights{keys}")
    weights = timm.models.clean_state_dict(weights)
    return next(of for of in LAYOUTS.values() if of.matches(weights.keys())).to_timm(weights)


def is_weights(value) -> bool:
    """Whether a value is a dict of tensors and not empty."""
    return isinstance(value, dict) and bool(value) and all(torch.is_tensor(tensor) for tensor in value.values())


def unknown_names(names: Collection[str]) -> str:
    """A text about names of which none is known: the first three, and what all of them begin with."""
    words = zip(*(name.split(".") for name in names), strict=False)
    start = ".".join(of_all[0] for of_all in itertools.takewhile(lambda of_all: len({*of_all}) == 1, words))
    begin = f", which all begin with {start}," if start and len(names) > 1 else ""
    return f"{_first(names)}{begin} are in no layout that is known ({', '.join(LAYOUTS)})"


def _first(names: Iterable[object]) -> str:
    names = sorted(map(str, names))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# The layouts


DINOV2_NAMES = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.": "patch_embed.proj.",
    "encoder.layer.": "blocks.",
    ".attention.output.dense.": ".attn.proj.",
    ".layer_scale1.lambda1": ".ls1.gamma",
    ".layer_scale2.lambda1": ".ls2.gamma",
    ".mlp.weights_in.": ".mlp.fc1.",
    ".mlp.weights_out.": ".mlp.fc2.",
    "layernorm.": "norm.",
}


def _is_dinov2_of_transformers(names: Collection[str]) -> bool:
    return "encoder.layer.0.layer_scale1.lambda1" in names and "embeddings.register_tokens" not in names


@layout("Dinov2Model of transformers", _is_dinov2_of_transformers)
def _dinov2_of_transformers(weights: Tensors) -> tuple[Tensors, list[str]]:
    """For timm's `vit_*_patch14_dinov2`. Query, key and value are joined; the mask token is left out."""
    renamed, parts, notes = {}, {}, []
    for name, tensor in weights.items():
        block, is_qkv, part = name.partition(".attention.attention.")
        if name == "embeddings.mask_token":
            notes.append(f"{name} left out: timm's model has none")
        elif is_qkv:  # part: query.weight, ...
            which, _, parameter = part.partition(".")
            parts.setdefault(f"{block}.attn.qkv.{parameter}", {})[which] = tensor
        else:
            renamed[name] = tensor
    renamed |= {
        name: torch.cat([of["query"], of["key"], of["value"]])
        for name, of in parts.items()
        if {"query", "key", "value"} <= of.keys()  # otherwise it is reported as missing
    }
    for theirs, ours in DINOV2_NAMES.items():
        renamed = {name.replace(theirs, ours): tensor for name, tensor in renamed.items()}
    return renamed, notes


@layout("timm", lambda names: True)
def _timm(weights: Tensors) -> tuple[Tensors, list[str]]:
    """As they are; also DeiT's, this program's, and the names that timm's function for the model converts."""
    return weights, []
