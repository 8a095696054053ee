"""Weights in any layout of timm and DeiT: read without running code from the file, refused with one line."""

import argparse
import contextlib
import pickletools
import re
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import safetensors.torch
import timm
import torch
from torch import nn

_numpy_scalar = np.float64().__reduce__()[0]
ALLOWED = [
    argparse.Namespace,  # `args` of DeiT's and timm's checkpoints
    (_numpy_scalar, "numpy._core.multiarray.scalar"),  # `metric` of timm's, where it is numpy's number
    (_numpy_scalar, "numpy.core.multiarray.scalar"),  # the same, written with numpy 1
    np.dtype,  # the type of that number
    type(np.dtype(np.float64)),  # its class, which sets the byte order
]
"""What a checkpoint may name beyond torch's own list of tensors and plain types; none of it runs code of the file."""


def origin(path: str, flag: str) -> tuple[dict, int | None]:
    """The flags that a checkpoint of this program was trained with, and its last epoch; {}, None for other files.

    Raises:
        SystemExit: the file is damaged.
    """
    if path.endswith(".safetensors"):
        return {}, None
    stored = read(path, flag)
    args = stored.get("args") if isinstance(stored, dict) else None
    return (args, stored.get("epoch")) if isinstance(args, dict) else ({}, None)


def load_weights(model: nn.Module, path: str, flag: str, new_head: bool = True, use_ema: bool = False) -> list[str]:
    """Load weights in any of timm's and DeiT's layouts, to fine-tune from or to teach with.

    Position embeddings and patch embeddings of another size are resampled by timm. A classifier of another size is
    dropped when `new_head` is set, which leaves the model's own initial one.

    Args:
        model: a timm model.
        path: .pth or .safetensors file, or an https URL.
        flag: the flag that named it, for messages.
        use_ema: load the averaged weights.

    Returns:
        One line for each thing that did not go in as it was.

    Raises:
        SystemExit: the file is missing or damaged, or does not fit beyond the head.
    """
    path = local_file(path, flag)
    stored = read(path, flag)
    layouts = ("state_dict_ema", "model_ema") if use_ema else ("state_dict", "model")  # timm's and DeiT's names
    weights = next((stored[name] for name in layouts if name in stored), None) if isinstance(stored, dict) else None
    if use_ema and weights is None:
        raise SystemExit(f"error: {flag} {path} holds no averaged weights")
    weights = stored if weights is None else weights
    if not is_weights(weights):
        raise SystemExit(f"error: {flag} {path} holds no model weights")
    weights = timm.models.clean_state_dict(weights)
    notes, own = [], model.state_dict()
    for name in _classifier_names(model):
        if new_head and _differs(name, weights, own):
            notes.append(f"{name} of shape {[*weights[name].shape]} dropped: the model needs {[*own[name].shape]}")
            del weights[name]
        elif new_head and name not in weights:
            notes.append(f"{name} is not in the file: it starts anew")
    resized = [name for name in ("pos_embed", "patch_embed.proj.weight") if _differs(name, weights, own)]
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if adapt is not None:
        with contextlib.suppress(RuntimeError):  # what cannot be resampled is named as a misfit below
            weights = adapt(weights, model)
    for name in resized:
        if not _differs(name, weights, own):
            notes.append(f"{name} resampled to {[*own[name].shape]}")
    load_state_dict(model, weights, path, flag, may_miss=[note.split()[0] for note in notes])
    return notes


def load_state_dict(model: nn.Module, weights: dict, path: str, flag: str, may_miss: list[str] = ()):
    """model.load_state_dict that answers a misfit with one line that names the first tensor.

    Raises:
        SystemExit: a tensor is missing, unknown or of another shape.
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
        raise SystemExit(f"error: {flag} {path} does not fit {type(model).__name__}: {misfits[0]}{more}")
    model.load_state_dict(weights, strict=False)


def _classifier_names(model: nn.Module) -> list[str]:
    """state_dict names of the classifiers."""
    heads = model.get_classifier()
    heads = heads if isinstance(heads, tuple) else (heads,)
    return [
        f"{name}.{parameter}" if parameter else name
        for name, module in model.named_modules()
        if any(module is head for head in heads)
        for parameter in module.state_dict()
    ]


def is_weights(value) -> bool:
    return isinstance(value, dict) and bool(value) and all(torch.is_tensor(tensor) for tensor in value.values())


def _differs(name: str, weights: dict, own: dict) -> bool:
    return name in weights and name in own and weights[name].shape != own[name].shape


def local_file(path: str, flag: str) -> str:
    """A file on this machine: `path` itself, or what an https URL names, kept in torch's hub folder."""
    if not path.startswith("https://"):
        if not Path(path).is_file():
            raise SystemExit(f"error: {flag} {path}: there is no such file")
        return path
    local = Path(torch.hub.get_dir()) / "checkpoints" / path.rsplit("/", 1)[-1]
    if not local.is_file():
        local.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(path, str(local), progress=False)
        except OSError as error:
            raise SystemExit(f"error: {flag} {path} cannot be downloaded: {error}") from None
    return str(local)


def read(path: str, flag: str):
    """What a file of torch or safetensors holds, its tensors on the CPU.

    Raises:
        SystemExit: the file is damaged, or holds code.
    """
    try:
        if path.endswith(".safetensors") and not zipfile.is_zipfile(path):
            return safetensors.torch.load_file(path)
        with (
            open(path, "rb") as file,
            warnings.catch_warnings(action="ignore"),  # of what is refused anyway
            torch.serialization.safe_globals(ALLOWED),
        ):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign file makes them raise anything
        if refused := refusal(error, path):
            reason = f"{refused}; have its weights saved alone, as a state_dict or as safetensors"
        else:
            reason = f"cannot be read, it is truncated or no checkpoint ({_first_sentence(error)})"
        raise SystemExit(f"error: {flag} {path} {reason}") from None


def refusal(error: Exception, path: str = "") -> str:
    """What is wrong with a file that was not loaded because it holds code; empty for other errors.

    Args:
        error: what torch, or a library that called it, raised.
        path: the file, where it is known: for some pickles the error names no code.
    """
    refused = re.search(r"GLOBAL ([\w.]+) w", f"{error} {error.__cause__}")
    code = refused[1] if refused else _code_in(path)
    if not code:
        return ""
    code = code if "." in code else f"builtins.{code}"
    return f"holds pickled code ({code}), which this program does not run"


def _code_in(path: str) -> str:
    """The first function or class that a pickle names, found without running it; empty for other files."""
    code, words = "", []
    with contextlib.suppress(Exception), open(path, "rb") as file:
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name in ("GLOBAL", "INST"):
                code = argument.replace(" ", ".")
            elif opcode.name == "STACK_GLOBAL":
                code = ".".join(words[-2:])
            elif isinstance(argument, str):
                words.append(argument)
            if code:
                break
    return code if re.fullmatch(r"[\w.]+", code) else ""


def _first_sentence(error: Exception) -> str:
    """Of what torch found; its advice to load the file with its code follows later."""
    found = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
    text = found[1] if found else str(error).strip()
    return re.split(r"(?<=\S)\. |\n", text)[0] or type(error).__name__
