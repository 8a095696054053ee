"""Loading weights in any layout of timm and DeiT, without running code from the file; errors are one line."""

import argparse
import contextlib
import hashlib
import pickletools
import re
import sys
import urllib.parse
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import timm
import torch
from filelock import FileLock
from torch import nn

_numpy_scalar = np.float64().__reduce__()[0]
ALLOWED = [
    argparse.Namespace,  # `args` of DeiT's and timm's checkpoints
    (_numpy_scalar, "numpy._core.multiarray.scalar"),  # `metric` of timm's, where it is numpy's number
    (_numpy_scalar, "numpy.core.multiarray.scalar"),  # the same, written with numpy 1
    np.dtype,  # the type of that number
    type(np.dtype(np.float64)),  # its class, which sets the byte order
]
"""Classes that a checkpoint may contain beyond those that torch allows; none of them runs code from the file."""


class Origin(NamedTuple):
    """What a checkpoint of this program contains about its training; empty for any other file.

    Attributes:
        flags: of main.py.
        epoch: the last one in which its weights were trained, from 0.
        classes: their names in the order of the model's outputs.
        is_average: whether the file has the averaged weights alone, under the name of the raw ones.
    """

    flags: dict
    epoch: int | None
    classes: list[str]
    is_average: bool = False


def origin(path: str) -> Origin:
    """What a checkpoint file contains about its training.

    Raises:
        ValueError: the file is damaged.
    """
    if path.endswith(".safetensors"):
        return Origin({}, None, [])
    # Its tensors are not needed, and so not read; torch cannot map every file name that the system allows.
    stored = read(path, mmap=zipfile.is_zipfile(path) and path.isascii())
    if not isinstance(stored, dict) or not isinstance(stored.get("args"), dict):
        return Origin({}, None, [])
    epoch = stored.get("epoch")
    if stored.get("step"):  # saved within the epoch after the finished one
        epoch += 1
    return Origin(stored["args"], epoch, _classes(stored), stored.get("is_average", False))


def _classes(stored) -> list[str]:
    data = stored.get("data") if isinstance(stored, dict) else None
    return data.get("classes", []) if isinstance(data, dict) else []


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
    of_file = _classes(stored)
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


def local_file(path: str) -> str:
    """A file on this machine: `path`, or for an https URL its download in the cache folder of torch.hub.

    The name in the cache contains a digest of the URL. Of several processes one downloads, while the others wait.
    """
    if not path.startswith("https://"):
        if not Path(path).is_file():
            raise ValueError(f"{path}: there is no such file")
        return path
    digest, name = hashlib.sha256(path.encode()).hexdigest()[:12], Path(urllib.parse.urlparse(path).path).name
    local = Path(torch.hub.get_dir()) / "checkpoints" / f"{digest}-{name}"
    try:
        local.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{local}.lock"):
            if not local.is_file():
                torch.hub.download_url_to_file(path, str(local), progress=False)
    except OSError as error:
        raise ValueError(f"{path} cannot be downloaded: {error}") from None
    return str(local)


def read(path: str, mmap: bool = False):
    """The content of a file of torch or safetensors, with its tensors on the CPU.

    Args:
        mmap: of torch's zip files: a tensor is read when it is used.

    Raises:
        ValueError: the file is damaged, or contains code.
    """
    try:
        if path.endswith(".safetensors") and not zipfile.is_zipfile(path):
            return safetensors.torch.load_file(path)
        with (
            open(path, "rb") as file,
            warnings.catch_warnings(action="ignore"),  # about files that are refused in any case
            torch.serialization.safe_globals(ALLOWED),
        ):
            return torch.load(path if mmap else file, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch and safetensors raise many types for a damaged file
        if refused := refusal(error, path):
            reason = f"{refused}; ask for a file with the weights only, a state_dict or safetensors"
        else:
            reason = f"cannot be read, it is truncated or not a checkpoint ({_first_sentence(error)})"
        raise ValueError(f"{path} {reason}") from None


def refusal(error: Exception, path: str = "") -> str:
    """Why a file was refused, if it contains code; empty for other errors.

    Args:
        error: the exception of torch, or of a library that called torch.
        path: the file if it is known, since for some pickles the error does not name the code.
    """
    refused = re.search(r"GLOBAL ([\w.]+) w", f"{error} {error.__cause__}")
    code = refused[1] if refused else _code_in(path)
    if not re.fullmatch(r"[\w.]+", code):
        return ""
    code = code if "." in code else f"builtins.{code}"
    return f"contains pickled code ({code}), which this program does not run"


def _code_in(path: str) -> str:
    """The first function or class that a pickle names, found without running it; empty for other files."""
    words = []
    with contextlib.suppress(Exception), open(path, "rb") as file:
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name in ("GLOBAL", "INST"):
                return argument.replace(" ", ".")
            if opcode.name == "STACK_GLOBAL":
                return ".".join(words[-2:])
            if isinstance(argument, str):
                words.append(argument)
    return ""


def _first_sentence(error: Exception) -> str:
    """The first sentence of an error, without torch's advice to load the file with its code."""
    found = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
    text = found[1] if found else str(error).strip()
    return re.split(r"(?<=\S)\. |\n", text)[0] or type(error).__name__
