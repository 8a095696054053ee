"""Loading the weights of a file into a timm model."""

import contextlib
import sys
from collections.abc import Sequence

import timm
import torch
from torch import nn

from models.weights.files import class_names, local_file, read


def load_weights(
    model: nn.Module, path: str, new_head: bool = True, use_ema: bool = False, classes: Sequence[str] = ()
) -> list[str]:
    """Load weights in any layout of timm and DeiT into a model.

    Position embeddings and patch embeddings of another size are resampled by timm.

    Args:
        model: a timm model.
        path: .pth or .safetensors file, or an https URL.
        new_head: keep the model's initial classifier if the file has one of another size or none.
        use_ema: load the averaged weights.
        classes: names of the model's classes. If the file knows those of its classifier, it is loaded by their names,
            and dropped if they are others and `new_head` is true.

    Returns:
        One line for each tensor that was dropped, resampled or not found.

    Raises:
        ValueError: the file is missing or damaged, or its weights do not fit the model.
    """
    path = local_file(path)
    stored = read(path)
    layouts = ("state_dict_ema", "model_ema") if use_ema else ("state_dict", "model")  # timm's and DeiT's names
    weights = next((stored[name] for name in layouts if name in stored), None) if isinstance(stored, dict) else None
    if use_ema and weights is None:
        raise ValueError(f"{path} contains no averaged weights")
    weights = stored if weights is None else weights
    if not is_weights(weights):
        raise ValueError(f"{path} contains no model weights")
    weights = timm.models.clean_state_dict(weights)
    notes, own = [], model.state_dict()
    of_file = class_names(stored)
    has_other_classes = new_head and bool(classes and of_file) and {*classes} != {*of_file}
    for name in _classifier_names(model):
        if classes and of_file and [*classes] != of_file and {*classes} == {*of_file} and name in weights:
            weights[name] = weights[name][[of_file.index(label) for label in classes]]
            notes.append(f"{name} is in another order in the file and was loaded by the names of the classes")
        elif has_other_classes and name in weights:
            notes.append(f"{name} dropped: the file's classes are others, such as {of_file[0]!r}")
            del weights[name]
        elif new_head and _differs(name, weights, own):
            notes.append(f"{name} of shape {[*weights[name].shape]} dropped: the model needs {[*own[name].shape]}")
            del weights[name]
        elif new_head and name not in weights:
            notes.append(f"{name} is not in the file and keeps its initial values")
        elif new_head and classes and not of_file:
            notes.append(f"{name} is from the file, which does not name its classes")
    resized = [name for name in ("pos_embed", "patch_embed.proj.weight") if _differs(name, weights, own)]
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if adapt is not None:
        with contextlib.suppress(RuntimeError):  # load_state_dict reports what cannot be resampled
            weights = adapt(weights, model)
    for name in resized:
        if not _differs(name, weights, own):
            notes.append(f"{name} resampled to {[*own[name].shape]}")
    load_state_dict(model, weights, path, may_miss=[note.split()[0] for note in notes])
    return notes


def load_state_dict(model: nn.Module, weights: dict, path: str, may_miss: list[str] = ()):
    """Load weights into a model, with an error of one line that names the first tensor that does not fit.

    Args:
        may_miss: names of the model's tensors that `weights` need not contain.

    Raises:
        ValueError: a tensor is missing, unknown, of another shape or not finite.
    """
    own = model.state_dict()
    misfits = [
        f"{name} is {[*weights[name].shape]} in the file and {[*own[name].shape]} in the model"
        for name in own.keys() & weights.keys()
        if _differs(name, weights, own)
    ]
    misfits += [f"{name} is not in the file" for name in own.keys() - weights.keys() - set(may_miss)]
    misfits += [f"{name} is not in the model" for name in weights.keys() - own.keys()]
    if misfits:
        misfits.sort()
        more = f", and {len(misfits) - 1} more" if len(misfits) > 1 else ""
        raise ValueError(f"{path} does not fit {type(model).__name__}: {misfits[0]}{more}")
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} is not finite; take an earlier checkpoint")
    model.load_state_dict(weights, strict=False)


def _classifier_names(model: nn.Module) -> list[str]:
    """Names of the classifiers' tensors in the model's state_dict."""
    heads = model.get_classifier()
    heads = heads if isinstance(heads, tuple) else (heads,)
    return [
        f"{name}.{parameter}" if parameter else name
        for name, module in model.named_modules()
        if any(module is head for head in heads)
        for parameter in module.state_dict()
    ]


def is_weights(value) -> bool:
    """Whether a value is a dict of tensors and not empty."""
    return isinstance(value, dict) and bool(value) and all(torch.is_tensor(tensor) for tensor in value.values())


def _differs(name: str, weights: dict, own: dict) -> bool:
    return name in weights and name in own and weights[name].shape != own[name].shape
