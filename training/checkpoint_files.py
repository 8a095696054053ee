"""Checkpoint files: written in one step, the previous ones kept, and checked before they are used."""

import contextlib
import errno
import functools
import os
import pickle
import re
import sys
import zipfile
from pathlib import Path
from typing import BinaryIO

import torch

from utils import TEMPORARY, atomic_write

DAMAGED = ".damaged"


class DamagedFile(Exception):
    """A file is not what was written; the message is the reason, in one line."""


def write(state: dict, path: Path, keep: int = 2):
    """Write `state` so that whenever the machine stops, `path` or the previous file is complete.

    The new file is written beside the target and flushed to disk first. Then `checkpoint.pth` also becomes
    `checkpoint.1.pth`, which becomes `checkpoint.2.pth`, and so on, and the new file replaces `checkpoint.pth`.

    Args:
        state: tensors, numbers, strings, dicts and lists only, so that `weights_only=True` can load it.
        path: the target.
        keep: files to keep, this one included.

    Raises:
        OSError: the disk failed. All files are as they were; but if only the flush of the folder failed, the new file
            is in place.
    """
    assert keep >= 1
    path = Path(path)
    names = [path, *(path.with_name(f"{path.stem}.{number}{path.suffix}") for number in range(1, keep))]
    oldest = names[-1].with_name(names[-1].name + TEMPORARY)
    with contextlib.ExitStack() as undo:
        with atomic_write(path, before_rename=lambda: _rotate(names, oldest, undo)) as file:
            _save(state, file)
        undo.pop_all()
    with contextlib.suppress(OSError):  # a later run removes it
        oldest.unlink(missing_ok=True)
    _flush_folder(path.parent)


def verify(path: Path):
    """Check a file that `torch.save` wrote: the CRC-32 of every record, and that torch can read the file.

    Raises:
        DamagedFile: it is truncated or changed, is no such file, or cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip() or next((info.filename for info in archive.infolist() if info.external_attr), None)
        if bad is None:
            torch.load(path, mmap=True, weights_only=True)  # reads the list of records, not their content
    except pickle.UnpicklingError:
        return  # the file is complete, but holds objects of another program
    except OSError as error:
        raise DamagedFile(f"it cannot be read: {error.strerror or error}") from None
    except Exception:  # zipfile and torch raise many types for a damaged file
        raise DamagedFile("it is truncated or damaged, or no checkpoint of this program") from None
    if bad is not None:
        raise DamagedFile(f"its record {bad} does not match its checksum")


def candidates(path: Path) -> list[Path]:
    """The file and the previous ones that exist, newest first."""
    path = Path(path)
    numbered = re.compile(rf"{re.escape(path.stem)}\.([1-9][0-9]*){re.escape(path.suffix)}")
    found = {int(match[1]): file for file in path.parent.glob("*") if (match := numbered.fullmatch(file.name))}
    found[0] = path
    return [found[number] for number in sorted(found) if found[number].is_file()]


def set_aside(path: Path) -> Path:
    """Rename a damaged file to `<name>.damaged`, so that it never replaces a good one, and return the new path."""
    aside = path.with_name(path.name + DAMAGED)
    os.replace(path, aside)
    return aside


def _flush_folder(folder: Path):
    """Write the names of a folder's files to the disk; a file system that refuses to do so is warned about."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EACCES, errno.EPERM, errno.EBADF):
            raise
        _warn_of_refusal(folder, error.strerror)


@functools.cache  # once for a folder
def _warn_of_refusal(folder: Path, reason: str):
    print(
        f"warning: the file system of {folder} does not flush folders ({reason}); after a crash of the machine the "
        "last checkpoint may be missing",
        file=sys.stderr,
        flush=True,
    )


def _save(state: dict, file: BinaryIO):
    try:
        torch.save(state, file)
    except RuntimeError as error:  # after an error of the disk, torch raises another one about file positions
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _rotate(names: list[Path], oldest: Path, undo: contextlib.ExitStack):
    """Give each file the next name up to the first one that is free (or `oldest`); the newest keeps its own as well."""
    free = next((number for number, name in enumerate(names) if not name.exists()), len(names))
    if free == 0 or len(names) == 1:
        return
    if free > 1 and names[0].samefile(names[1]):  # an earlier rotation, whose new file never came
        return
    names = [*names, oldest]
    for number in range(free, 1, -1):
        _rename(names[number - 1], names[number], undo)
    try:
        os.link(names[0], names[1])
    except OSError:  # a file system without hard links
        _rename(names[0], names[1], undo)
    else:
        undo.callback(names[1].unlink)


def _rename(path: Path, target: Path, undo: contextlib.ExitStack):
    os.replace(path, target)
    undo.callback(os.replace, target, path)
