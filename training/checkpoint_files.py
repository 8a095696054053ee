"""Files that are whole or not there: sealed with a checksum, the previous ones kept, written in the background.

A sealed file is torch's zip file with a comment, `sha256:` and 64 hex digits, which whatever reads zip files skips.
"""

import contextlib
import copy
import errno
import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import torch

from utils import TEMPORARY

DAMAGED = ".damaged"
CHUNK = 2**20  # bytes read at a time
END = b"PK\x05\x06"  # starts a zip file's last record: 22 bytes, the last two the length of the comment that follows
END_SIZE = 22
SEAL = re.compile(rb"sha256:([0-9a-f]{64})")
SEAL_SIZE = 71
NO_COMMENT, SEAL_LENGTH = (size.to_bytes(2, "little") for size in (0, SEAL_SIZE))


class DamagedFile(Exception):
    """A file is not what was written; the message is the reason, in one line."""


class UnsealedFile(DamagedFile):
    """A file that ends as torch ends one but carries no checksum, so that nothing is known about its content."""


def write(state: dict, path: Path, keep: int = 2):
    """Write `state` so that whenever the machine stops, `path` or the previous file is whole.

    The file is written beside the target, sealed and flushed to disk before any other is touched. Then the one at
    `checkpoint.pth` becomes `checkpoint.1.pth`, that one `checkpoint.2.pth`, and the new one takes its place.

    Args:
        state: tensors, numbers, strings, dicts and lists only, so that `weights_only=True` can load it.
        path: the target.
        keep: files to keep, this one included.

    Raises:
        OSError: the disk refused. The files are as they were, but where it was the folder that could not be flushed:
            then the new file is in place.
    """
    assert keep >= 1
    path = Path(path)
    temporary = path.with_name(path.name + TEMPORARY)
    with contextlib.ExitStack() as undo:
        undo.callback(_try_remove, temporary)
        with open(temporary, "wb", buffering=0) as file:  # unbuffered: a forked loader worker has nothing to flush
            _write_sealed(state, file)
            os.fsync(file.fileno())
        replaced = _rotate(path, keep, undo)
        os.replace(temporary, path)
        undo.pop_all()
    if replaced is not None:
        _try_remove(replaced)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def verify(path: Path):
    """Check that a file is what `write` wrote, byte for byte.

    Raises:
        UnsealedFile: it carries no checksum: another program wrote it, or an older version of this one.
        DamagedFile: it is truncated, changed, or cannot be read.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - END_SIZE - SEAL_SIZE))
            end = file.read()
            if end[-END_SIZE:].startswith(END) and end.endswith(NO_COMMENT):
                raise UnsealedFile("it carries no checksum")
            seal = SEAL.fullmatch(end, END_SIZE)
            if seal is None or end[END_SIZE - 2 : END_SIZE] != SEAL_LENGTH:
                raise DamagedFile("it does not end with a checksum: it is truncated, or no checkpoint of this program")
            file.seek(0)
            checksum, left = hashlib.sha256(), size - SEAL_SIZE - 2
            while left and (chunk := file.read(min(left, CHUNK))):
                checksum.update(chunk)
                left -= len(chunk)
    except OSError as error:
        raise DamagedFile(f"it cannot be read: {error.strerror or error}") from None
    checksum.update(NO_COMMENT)
    if checksum.hexdigest().encode() != seal[1]:
        raise DamagedFile("its content does not match its checksum")


def candidates(path: Path) -> list[Path]:
    """The file and those that were at its place before, as far as they exist, newest first."""
    path = Path(path)
    numbered = re.compile(rf"{re.escape(path.stem)}\.([1-9][0-9]*){re.escape(path.suffix)}")
    found = {int(match[1]): file for file in path.parent.glob("*") if (match := numbered.fullmatch(file.name))}
    found[0] = path
    return [found[number] for number in sorted(found) if found[number].is_file()]


def set_aside(path: Path) -> Path:
    """Rename a damaged file to `<name>.damaged`, so that it never takes a good one's place, and return the new path."""
    aside = path.with_name(path.name + DAMAGED)
    os.replace(path, aside)
    return aside


def copied(tree, buffers: dict[tuple, torch.Tensor] | None = None):
    """A copy in CPU memory that later changes of the original do not reach.

    Args:
        tree: nested dicts, lists and tuples of tensors and plain values.
        buffers: page-locked tensors that earlier calls made for what lies on a GPU, by place in the tree, to be written
            again: the copy before then changes. Made here where they are missing.
    """
    devices = set()
    copies = _copied(tree, devices, {} if buffers is None else buffers, ())
    for device in devices:
        torch.cuda.synchronize(device)
    return copies


def first_non_finite(tree) -> str | None:
    """Dotted name of the first tensor that holds a NaN or an infinity, such as `model.blocks.0.attn.qkv.weight`."""
    for name, tensor in _named_tensors(tree, ()):
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            return ".".join(name)
    return None


class BackgroundWriter:
    """Runs one job at a time on a thread of its own. A job that fails is reported and stops nothing.

    The methods are for one thread, the one that trains.

    Args:
        on_error: called with the exception of a job, once, from the next `submit`, `poll`, `wait` or `close`.
    """

    def __init__(self, on_error: Callable[[BaseException], None]):
        self.on_error = on_error
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether a job is in flight."""
        return self._thread is not None and self._thread.is_alive()

    def submit(self, job: Callable[[], None]):
        """Wait for the job in flight, then start this one."""
        self.wait()
        thread = threading.Thread(target=self._run, args=(job,), name="background writer")
        try:
            thread.start()
        except RuntimeError:  # the system has no thread to give
            self._run(job)
        else:
            self._thread = thread

    def poll(self):
        """Report the last job's error if it has ended with one; waits for nothing."""
        if not self.busy:
            self.wait()

    def wait(self):
        """Wait for the job in flight, and report its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            self.on_error(error)
            error.with_traceback(None)  # whose frames hold the job, and with it its state

    def close(self):
        """The last `wait`; a writer holds nothing else."""
        self.wait()

    def _run(self, job: Callable[[], None]):
        try:
            job()
        except BaseException as error:
            self._error = error


class _Hashed:
    """What torch.save writes to: a raw file, hashed on its way.

    An error is kept for later. Thrown through torch's writer it would come out as another one, about positions.
    """

    def __init__(self, file: BinaryIO):
        self.file = file
        self.checksum = hashlib.sha256()
        self.end = b""
        self.error: BaseException | None = None

    def write(self, data: memoryview) -> int:
        if self.error is None:
            try:
                _write_all(self.file, data)
                self.checksum.update(data)
                self.end = (self.end + data[-END_SIZE:])[-END_SIZE:]
            except BaseException as error:
                self.error = error
        return len(data)

    def flush(self):
        pass


def _write_sealed(state: dict, file: BinaryIO):
    hashed = _Hashed(file)
    torch.save(state, hashed)
    if hashed.error is not None:
        raise hashed.error
    assert hashed.end.startswith(END) and hashed.end.endswith(NO_COMMENT)  # else torch ends its files in another way
    file.seek(-len(NO_COMMENT), os.SEEK_END)
    _write_all(file, SEAL_LENGTH + b"sha256:" + hashed.checksum.hexdigest().encode())


def _write_all(file: BinaryIO, data: bytes | memoryview):
    """A raw file may take less than it is given."""
    data = memoryview(data)
    while data:
        written = file.write(data)
        if not written:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        data = data[written:]


def _rotate(path: Path, keep: int, undo: contextlib.ExitStack) -> Path | None:
    """Free `path` for a new file: each one moves on by a number, as far as the first number that is free.

    Args:
        undo: receives what puts everything back.

    Returns:
        The oldest file, at a temporary name, if there was no number for it.
    """
    names = [path, *(path.with_name(f"{path.stem}.{number}{path.suffix}") for number in range(1, keep))]
    taken = next((number for number, name in enumerate(names) if not name.exists()), keep)
    if taken == 0 or keep == 1:
        return None
    if taken > 1 and path.samefile(names[1]):  # a rotation that was stopped before the new file came
        return None
    replaced = None
    if taken == keep:
        replaced = names[-1].with_name(names[-1].name + TEMPORARY)
        _move(names[-1], replaced, undo)
        taken -= 1
    for number in range(taken, 1, -1):
        _move(names[number - 1], names[number], undo)
    try:
        os.link(path, names[1])  # two names for the newest, so that at no moment it has none
    except OSError:  # a file system without them
        _move(path, names[1], undo)
    else:
        undo.callback(_try_remove, names[1])
    return replaced


def _move(path: Path, target: Path, undo: contextlib.ExitStack):
    os.replace(path, target)
    undo.callback(os.replace, target, path)


def _try_remove(path: Path):
    with contextlib.suppress(OSError):
        path.unlink()


def _copied(tree, devices: set[torch.device], buffers: dict[tuple, torch.Tensor], place: tuple):
    """`copied` of what is at a place, whose copies from the GPUs that are added to `devices` may still be under way."""
    if isinstance(tree, torch.Tensor):
        tensor = tree.detach()
        if not tensor.is_cuda:
            return tensor.cpu() if tensor.device.type != "cpu" else tensor.clone()
        devices.add(tensor.device)
        buffer = buffers.get(place)
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            buffers[place] = buffer = torch.empty_like(tensor, device="cpu", pin_memory=True)
        return buffer.copy_(tensor, non_blocking=True)
    if isinstance(tree, dict):
        copies = copy.copy(tree)  # keeps its type, and the metadata of a state_dict
        copies.update((key, _copied(value, devices, buffers, (*place, key))) for key, value in tree.items())
        return copies
    if isinstance(tree, list | tuple):
        return type(tree)(_copied(value, devices, buffers, (*place, i)) for i, value in enumerate(tree))
    return copy.deepcopy(tree)


def _named_tensors(tree, name: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], torch.Tensor]]:
    if isinstance(tree, torch.Tensor):
        yield name, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from _named_tensors(value, (*name, str(key)))
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from _named_tensors(value, (*name, str(index)))
