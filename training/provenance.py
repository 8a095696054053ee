"""Where the numbers of a run come from: environment.json, with one entry for each start of the run, and its data."""

import hashlib
import itertools
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import timm
import torch
import torchvision
from torch.utils.data import DataLoader, Dataset, Subset

from pipeline.holdout import Part, complete, numbers
from pipeline.run_data import Data
from training.records import ENVIRONMENT
from training.run_folder import same_error_everywhere
from utils import World, errors_of, write_json

STAT_THREADS = 16  # sizes of files on a network file system arrive one after the other in a single thread
DIGESTS = {"train_digest": "training files", "val_digest": "validation files"}


def add_start(
    folder: Path | None, world: World, data: Data, data_set: str, data_path: str, **start: object
) -> list[str]:
    """Add an entry about this start of the run to environment.json; every process calls it.

    Args:
        folder: what `lock_run_folder` yields.
        data: of the run; `data_set` and `data_path` are the flags that name it.
        start: what only the caller knows, such as the images per optimizer step; the entry has it unchanged.

    Returns:
        One line for each split whose files are not those of the start before.

    Raises:
        SystemExit: on all processes, if the file cannot be written.
    """
    notes = []
    with same_error_everywhere(str(folder), world):
        if folder is not None:
            with errors_of("--output-dir:"):
                entries = read_starts(folder)
            entry = {
                "time": datetime.now().astimezone().isoformat(timespec="seconds"),
                "command": shlex.join(sys.orig_argv),
                "host": socket.gethostname(),
                "processes": world.size,
                "device": world.device.type,
                "card": card_name(world.device),
                **start,
                **versions(),
                "data": fingerprint(data, data_set, data_path),
            }
            write_json([*entries, entry], folder / ENVIRONMENT)
            notes = _other_files(entries, entry["data"])
    return notes


def check_files(folder: Path, data: Data, data_set: str, data_path: str) -> list[str]:
    """The same lines for a finished run, which does not start again."""
    with errors_of("--output-dir:"):
        return _other_files(read_starts(folder), fingerprint(data, data_set, data_path))


def _other_files(starts: list[dict], now: dict) -> list[str]:
    before = starts[-1]["data"] if starts else now
    return [
        f"the {text} are not those of the last start: {before[key]} -> {now[key]} ({ENVIRONMENT})"
        for key, text in DIGESTS.items()
        if before[key] != now[key]
    ]


def read_starts(folder: Path) -> list[dict]:
    """The entries of a run folder's environment.json; none for a run of a version that did not write it.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / ENVIRONMENT
    try:
        starts = json.loads(path.read_text()) if path.exists() else []
    except ValueError:
        starts = None
    if not isinstance(starts, list) or not all(isinstance(start, dict) and "data" in start for start in starts):
        raise ValueError(f"{path} is not a complete list of starts; move it away")
    return starts


def versions() -> dict[str, str]:
    """Of Python, of the libraries, and of this program: a short commit, with `+changes` when files differ from it."""
    libraries = {module.__name__: module.__version__ for module in (torch, torchvision, timm)}
    return {"python": platform.python_version(), **libraries, "commit": _commit()}


def card_name(device: torch.device) -> str:
    """The name of a GPU, or of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"


def environment_lines(world: World, seed: int) -> list[str]:
    """What a reader of the log needs to repeat the run: versions, commit, device, seed."""
    processes = f"{world.size} process{'es' if world.size > 1 else ''}"
    return [
        ", ".join(f"{name} {version}" for name, version in versions().items()),
        f"{processes} on {world.device.type} ({card_name(world.device)}), seed {seed}",
    ]


def _commit() -> str:
    here = Path(__file__).parents[1]
    try:
        run = subprocess.run(
            ["git", "-C", here, "describe", "--always", "--dirty=+changes"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return run.stdout.strip() or "unknown"


def data_name(data_set: str, data_path: str) -> str:
    """What a reader calls the data: an image folder by its name, another data set with the name of its folder."""
    folder = Path(data_path).resolve().name if data_path else ""
    if data_set in ("IMNET", "UNLABELLED"):  # the names of the readers of all image folders
        return folder or data_set
    return f"{data_set} ({folder})" if folder else data_set


def fingerprint(data: Data, data_set: str, data_path: str) -> dict[str, object]:
    """What two runs on the same data have in common, but for `path`; the training set may be left out."""
    path = str(Path(data_path).resolve()) if data_path else ""
    sizes = {"classes": data.num_classes, "train_images": data.num_train, "val_images": data.num_val}
    digests = {
        f"{split}_digest": digest(source_of(loader), data_set, data_path)
        for split, loader in (("train", data.train), ("val", data.val))
        if loader is not None
    }
    return {"name": data_name(data_set, data_path), "path": path} | sizes | digests


def source_of(loader: DataLoader) -> Dataset:
    """The data set that a loader of `build_data` reads, without transforms."""
    dataset = loader.dataset.dataset if isinstance(loader.dataset, Subset) else loader.dataset
    return getattr(dataset, "source", dataset)


def digest(source: Dataset, data_set: str, root: str) -> str:
    """16 hexadecimal digits: sha256 of the sorted paths of all files below `root` and their sizes in bytes.

    Of a data set that does not know its files, of its name and its number of images, and of the numbers of a part's.
    """
    root = str(Path(root))
    paths = _files(source, root)
    if paths:
        batches = [paths[first : first + 1000] for first in range(0, len(paths), 1000)]
        with ThreadPoolExecutor(STAT_THREADS) as threads:
            sizes = itertools.chain.from_iterable(threads.map(_sizes, batches))
            lines = [f"{path.removeprefix(f'{root}/')} {size}" for path, size in zip(paths, sizes, strict=True)]
    else:
        lines = [f"{data_set} {len(source)}", *(map(str, source.indices) if isinstance(source, Part) else ())]
    return hashlib.sha256("\n".join(sorted(lines)).encode(errors="surrogateescape")).hexdigest()[:16]


def _files(source: Dataset, root: str) -> list[str]:
    """Paths of images or shards; empty where they are not known."""
    reader = getattr(complete(source), "reader", complete(source))
    shards = getattr(getattr(reader, "split_info", None), "filenames", ())  # Hugging Face's splits name no files
    if shards:
        return [f"{root}/{name}" for name in shards]
    samples = getattr(reader, "samples", [])
    paths = [samples[number][0] for number in numbers(source)] if samples else []
    return paths if all(isinstance(path, str) for path in paths) else []


def _sizes(paths: Sequence[str]) -> list[int]:
    """Of files in bytes; -1 for one that cannot be found."""
    sizes = []
    for path in paths:
        try:
            sizes.append(os.stat(path).st_size)
        except OSError:
            sizes.append(-1)
    return sizes
