"""Reading files of weights without running code from them; a file that cannot be read is an error of one line."""

import argparse
import contextlib
import hashlib
import pickletools
import re
import urllib.parse
import warnings
import zipfile
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
from filelock import FileLock

from models.weights.descriptions import describe
from models.weights.unwrapping import AVERAGES

_numpy_scalar = np.float64().__reduce__()[0]
ALLOWED = [
    argparse.Namespace,  # `args` of DeiT's and timm's checkpoints
    (_numpy_scalar, "numpy._core.multiarray.scalar"),  # `metric` of timm's, where it is numpy's number
    (_numpy_scalar, "numpy.core.multiarray.scalar"),  # the same, written with numpy 1
    np.dtype,  # the type of that number
    type(np.dtype(np.float64)),  # its class, which sets the byte order
    *(
        (of_any, f"{module}.{name}")  # a path in `args` or hyperparameters, written on another system or Python, too
        for of_any, name in ((PurePosixPath, "PosixPath"), (PureWindowsPath, "WindowsPath"))
        for module in ("pathlib", "pathlib._local")
    ),
]
"""Classes that a checkpoint may contain beyond those that torch allows; none of them runs code from the file."""


def local_file(path: str) -> str:
    """A file on this machine: `path`, or for an https URL its download in the cache folder of torch.hub.

    The name in the cache contains a digest of the URL. Of several processes one downloads, while the others wait.
    """
    if not path.startswith("https://"):
        if not Path(path).is_file():
            problem = " is a folder; name a file in it" if Path(path).is_dir() else ": there is no such file"
            raise ValueError(f"{path}{problem}")
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
    """The content of a file of torch, safetensors or numpy, with its tensors on the CPU.

    Args:
        mmap: of torch's zip files: a tensor is read when it is used.

    Raises:
        ValueError: the file is damaged, or contains code.
    """
    try:
        if path.endswith(".safetensors") and not zipfile.is_zipfile(path):
            return safetensors.torch.load_file(path)
        if path.endswith(".npz"):
            with np.load(path, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
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
    if "TorchScript" in str(error):
        return "contains code (it is a TorchScript archive), which this program does not run"
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


class Origin(NamedTuple):
    """What a checkpoint of this program contains about its training; empty for any other file, but for what an
    exported one is described with, see `describe`.

    Attributes:
        flags: of main.py.
        epoch: the last one in which its weights were trained, from 0.
        classes: their names in the order of the model's outputs.
        is_average: whether the weights are averaged ones: the file has them alone, or says so, or
            they were chosen by their key.
    """

    flags: dict
    epoch: int | None
    classes: list[str]
    is_average: bool = False


def origin(path: str, checkpoint_key: str = "") -> Origin:
    """What a checkpoint file contains about its training.

    Args:
        checkpoint_key: which weights of the file are meant, if it has several.

    Raises:
        ValueError: the file is damaged.
    """
    is_average, described = checkpoint_key in AVERAGES, describe(path)
    of_others = Origin({}, None, described.classes, is_average or described.is_average)
    if path.endswith((".safetensors", ".npz")):
        return of_others
    # Its tensors are not needed, and so not read; torch cannot map every file name that the system allows.
    stored = read(path, mmap=zipfile.is_zipfile(path) and path.isascii())
    if not isinstance(stored, dict) or not isinstance(stored.get("args"), dict):
        return of_others
    epoch = stored.get("epoch")
    if stored.get("step"):  # saved within the epoch after the finished one
        epoch += 1
    return Origin(stored["args"], epoch, class_names(stored), is_average or stored.get("is_average", False))


def class_names(stored) -> list[str]:
    """Names of the classes of a checkpoint of this program in the order of its outputs; empty for any other content."""
    data = stored.get("data") if isinstance(stored, dict) else None
    return data.get("classes", []) if isinstance(data, dict) else []
