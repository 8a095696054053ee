"""The weights in the content of a file: the key and the prefix under which a trainer stores them, and their layout."""

from collections.abc import Collection
from typing import NamedTuple

import timm
from torch import nn

from models.weights.layouts import LAYOUTS, Layout, first, groups, is_weights
from models.weights.names import Tensors

CONTAINERS = {
    "state_dict": "timm, Lightning, lightly, MoCo v3",
    "model": "DeiT, this program, MAE, BEiT, Swin",
    "teacher": "DINO, DINOv2, iBOT",
    "module": "BEiT v2, EVA",
    "encoder": "I-JEPA",
    "target_encoder": "I-JEPA",
    "student": "DINO, DINOv2, iBOT",
}
"""{key of the weights in a file: whose}, the preferred first; a file without these keys is a dict of weights."""

AVERAGES = ("state_dict_ema", "model_ema", "teacher")
"""Keys of averaged weights."""

ORDINARY = ("state_dict", "state_dict_ema", "model", "model_ema")
"""Keys that are no news: what they contain is what the file is about."""


class Weights(NamedTuple):
    """Weights of a file in some layout.

    Attributes:
        layout: whose names the tensors have; None if they are timm's.
        tensors: without the prefix.
        notes: one line for the key, the prefix, and what was left out.
    """

    layout: Layout | None
    tensors: Tensors
    notes: list[str]


def unwrap(stored, model: nn.Module, path: str, use_ema: bool = False, key: str = "") -> Weights:
    """The weights in the content of a file.

    Args:
        stored: what `read` returned.
        model: a timm model for them.
        path: of the file, for the errors.
        use_ema: take the averaged weights.
        key: which weights, if the file has several: a key of the file, or the beginning of their names.

    Raises:
        ValueError: there are no such weights.
    """
    tensors, notes, key = _contained(stored, path, use_ema, key)
    tensors = timm.models.clean_state_dict(tensors)
    if key:  # not a key of the file
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{key.rstrip('.')}.")}
    for layout in [*LAYOUTS.values(), None]:
        anchor = layout.anchor if layout else _anchor_of(model)
        prefixes = _prefixes(tensors, anchor)
        if layout:
            prefixes = [prefix for prefix in prefixes if layout.matches(_without(tensors, prefix, layout))]
        if prefixes:
            prefix, others = _chosen(prefixes, path)
            return _unwrapped(tensors, layout, prefix, others, notes)
    return Weights(None, tensors, notes)


def _contained(stored, path: str, use_ema: bool, key: str) -> tuple[Tensors, list[str], str]:
    """A dict of weights of the file, a note about its key, and `key` if it is no key of the file."""
    was_asked = use_ema or bool(key)
    found = {name: value for name, value in stored.items() if is_weights(value)} if isinstance(stored, dict) else {}
    if is_weights(stored):
        chosen = ""
    elif key in found:
        chosen, key = key, ""
    elif use_ema:
        chosen = next((name for name in AVERAGES if name in found), None)
    else:
        known = [name for name in CONTAINERS if name in found] or [*found]
        chosen = known[0] if known else None
    if use_ema and not chosen:
        raise ValueError(f"{path} contains no averaged weights")
    if chosen is None:
        keys = f"; its keys are {first(stored)}" if isinstance(stored, dict) and stored else ""
        raise ValueError(f"{path} contains no model weights{keys}")
    tensors = stored[chosen] if chosen else stored
    if key and not any(name.startswith(f"{key.rstrip('.')}.") for name in timm.models.clean_state_dict(tensors)):
        raise ValueError(
            f"{path} has no weights under {key}; it has {first(found or tensors)}; choose one of them with "
            "--checkpoint-key"
        )
    return tensors, _container_note(chosen, [] if was_asked else found), key


def _container_note(chosen: str, found: Collection[str]) -> list[str]:
    """A note about a key and the other ones, unless it is the ordinary one."""
    if not chosen or chosen in ORDINARY:
        return []
    others = [name for name in found if name != chosen and name in (*CONTAINERS, *AVERAGES)]
    also = f"; the file also has {', '.join(others)}, see --checkpoint-key" if others else ""
    return [f"weights of {chosen!r}{also}"]


def _anchor_of(model: nn.Module) -> str:
    """The name of a tensor of the model that is in each file for it."""
    names = [*model.state_dict()]
    return next((name for name in names if name.endswith("patch_embed.proj.weight")), max(names[:5], key=len))


def _prefixes(names: Collection[str], anchor: str) -> list[str]:
    """What names have before `anchor`, without longer prefixes that begin with a shorter one."""
    found = [name.removesuffix(anchor) for name in names if name == anchor or name.endswith(f".{anchor}")]
    return [one for one in found if not any(one != other and one.startswith(other) for other in found)]


def _parent(prefix: str) -> str:
    """A prefix without its last word: model. for model.vit."""
    return prefix[: prefix.rstrip(".").rfind(".") + 1]


def _without(tensors: Tensors, prefix: str, layout: Layout | None) -> Tensors:
    """The tensors behind a prefix, and those that stand beside it in a layout."""
    inside = {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if prefix and layout:
        starts = tuple(_parent(prefix) + start for start in layout.beside)
        inside |= {name[len(_parent(prefix)) :]: tensors[name] for name in tensors if name.startswith(starts)}
    return inside


def _chosen(prefixes: list[str], path: str) -> tuple[str, list[str]]:
    """The prefix of the weights to take, and the other ones.

    A teacher comes first, as in the evaluation of DINO; a momentum encoder after the encoder, as in that of MoCo.

    Raises:
        ValueError: there are several, and none comes first.
    """

    def rank(prefix: str) -> int:
        if "teacher" in prefix:
            return 0
        return 2 if any(word in prefix for word in ("student", "momentum", "ema", "target", "predictor")) else 1

    best = [prefix for prefix in prefixes if rank(prefix) == min(map(rank, prefixes))]
    if len(best) > 1:
        raise ValueError(f"{path} has several models: {first(prefixes)}; choose one with --checkpoint-key")
    return best[0], [prefix for prefix in prefixes if prefix != best[0]]


def _unwrapped(tensors: Tensors, layout: Layout | None, prefix: str, others: list[str], notes: list[str]) -> Weights:
    """The weights behind a prefix, and notes about the prefix and about everything that is not behind it."""
    inside = _without(tensors, prefix, layout)
    if not prefix:
        return Weights(layout, inside, notes)
    also = f"; the file also has {', '.join(others)}, see --checkpoint-key" if others else ""
    notes = [*notes, f"prefix {prefix} removed{also}"]
    taken = (prefix, *others, *(_parent(prefix) + start for start in (layout.beside if layout else ())))
    if left := [name for name in tensors if not name.startswith(taken)]:
        notes.append(f"left out, as not behind that prefix: {groups(left, _parent(prefix))}")
    return Weights(layout, inside, notes)
