"""Processes, files and seeds.

Randomness is counter-based: every draw is a function of what it is for, not of what was drawn before. So a run may be
cut anywhere, and use any number of loader workers, and a checkpoint needs no random state. Who draws seeds the
generators first, with `reseed` and its own counters:

    "augmentation"  seed, epoch, sample index, repeat     pipeline.images.ReadableImages
    "mixing"        seed, epoch, batch                    pipeline.batch_augmentation, the same on all ranks
    "erasing"       seed, rank, epoch, batch              pipeline.batch_augmentation: boxes
    "step"          seed, rank, epoch, batch              engine.train_one_epoch: dropout, probes, erased pixels
    "order"         seed, epoch                           pipeline.run_data.Data.batches, of a data set that streams

Images that are augmented in batches read rows of tables, `pipeline.batch_draws.DrawTable`, and no global generator:

    "batch augment" seed, epoch, repeat                   uniform numbers, a row for each sample index
    "batch noise"   seed, epoch                           normal numbers that fill erased boxes
"""

import contextlib
import errno
import hashlib
import io
import json
import multiprocessing
import operator
import os
import random
import re
import signal
import socket
import struct
import sys
import sysconfig
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TextIO, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from torch.distributed.rendezvous import rendezvous

T = TypeVar("T")
os.environ["MPLBACKEND"] = "agg"  # figures are files; the backend that a notebook sets for it may not be installed
STOP_SIGNALS = (
    *(signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT),
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU),
)
"""The signals that terminals, schedulers and launchers send to stop a program."""
TEMPORARY = ".tmp"  # ends the name of a file that is being written


class BadImageError(RuntimeError):
    """An image cannot be read and may not, or no longer, be replaced."""


PROGRAM = {"datasets", "diversity", "engine", "models", "pipeline", "reports", "studies", "training", "utils"}


def is_bug(error: BaseException) -> bool:
    """Whether an error needs its traceback, since a user's code or a mistake in this program raised it.

    Otherwise its message is enough: a library refused what this program gave to it, or this program refused a value.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    in_library = [_is_installed(frame.f_code.co_filename) for frame in frames]
    in_program = [frame.f_globals.get("__name__", "").partition(".")[0] in PROGRAM for frame in frames]
    if not all(map(operator.or_, in_library, in_program)):
        return True
    return not in_library[-1] and not isinstance(error, OSError | ValueError)


def _is_installed(file: str) -> bool:
    """Whether a file of code belongs to Python or to an installed package."""
    return file.startswith((sysconfig.get_path("stdlib"), "<")) or "-packages/" in file


@contextlib.contextmanager
def one_line_errors():
    """Turn `BadImageError`, and the loss of another process, into the line that a command ends with."""
    try:
        yield
    except BadImageError as error:  # a loader worker's arrives with its traceback in the message
        line = str(error).strip().splitlines()[-1].removeprefix("utils.BadImageError: ")
        raise SystemExit(f"error: {line}") from None
    except RuntimeError as error:
        line = " ".join(str(error).split())
        if not (dist.is_initialized() and re.search("gloo/transport|connection (closed|reset)", line, re.IGNORECASE)):
            raise
        raise SystemExit(
            "error: processes could not exchange data; if another one has ended, start again with --resume auto. "
            f"The message: {line}"
        ) from None


@contextlib.contextmanager
def errors_of(subject: str):
    """Turn a `ValueError` into the line that a command ends with; `subject`, such as a flag, begins the sentence."""
    try:
        yield
    except ValueError as error:
        if is_bug(error):
            raise
        raise SystemExit(f"error: {subject} {error}") from None


def run_command(command: Callable[[], None]):
    """Run a program; a `SystemExit` with a message becomes one line on standard error and exit code 1.

    So does output that could not be written, but without the line where its reader has ended, as in `... | head`.
    SIGTERM ends it as an exception does, with exit code 143: its loader workers and temporary files end with it. A
    second one ends it at once. Ctrl-C where no `StopSignals` receives it is one line, and exit code 130.
    """
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # characters that its encoding lacks are written as escapes
            stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, _exit)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it ended the program while it imported its modules
    code = None
    try:
        command()
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            sys.stderr.write("interrupted\n")
        code = 128 + signal.SIGINT
    except SystemExit as stop:
        code = stop.code
    except OSError:
        code = _output_error("\n")  # fails again if it was of the output
        if code is None:
            raise
    lost = _output_error()
    code = code or lost
    if isinstance(code, str):
        with contextlib.suppress(OSError):
            sys.stderr.write(f"{code}\n")  # in one piece, as several processes may write it
        code = 1
    drop_unwritten(sys.stderr)
    if code:
        sys.exit(code)


def _open_closed_streams():
    """Open the standard streams that are closed as the null device, so that no other file gets their number."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 for as long as the process
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


def _output_error(text: str = "") -> str | int | None:
    """Write `text`; an exit code, or a line for `SystemExit`, if standard output cannot be written."""
    error = drop_unwritten(sys.stdout, text)
    if error is None or isinstance(error, BrokenPipeError):
        return error and 1
    return f"error: standard output cannot be written: {error.strerror}"


def drop_unwritten(stream: TextIO, text: str = "") -> OSError | None:
    """Write and flush. After an error, which is returned, text is lost; Python would try again and exit with 120."""
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        with contextlib.suppress(OSError), open(os.devnull, "w") as null:
            os.dup2(null.fileno(), stream.fileno())
        return error


def _exit(number: int, _frame):
    if number in signal.pthread_sigmask(signal.SIG_BLOCK, ()):  # another thread received it
        return signal.pthread_kill(threading.get_ident(), number)  # arrives when it is no longer blocked
    signal.signal(number, signal.SIG_DFL)
    processes = multiprocessing.active_children()
    for process in processes:
        process.terminate()
    for process in processes:  # before the files that they read are removed
        process.join(1)
    sys.exit(128 + number)


@dataclass(frozen=True)
class World:
    """This process among those of the run."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def from_main(self, value: T) -> T:
        """A value of the main process, such as an error message, on every process."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, device=self.device)
        return values[0]

    def copy_from_main(self, tensors: Iterable[torch.Tensor]):
        """Copy the values of the main process into tensors of the same shapes, in place."""
        self.copy_from(0, tensors)

    def copy_from(self, rank: int, tensors: Iterable[torch.Tensor]):
        """Copy the values of the process `rank` into tensors of the same shapes, in place."""
        for tensor in tensors if self.size > 1 else ():
            values = tensor.to(self.device).contiguous()  # an average may be on the CPU
            dist.broadcast(values, rank)
            tensor.copy_(values)


def init_world(device: str = "auto", dist_url: str = "env://") -> World:
    """Join the process group that torchrun's variables describe; without them, this is the only process.

    SLURM's variables are not read: a plain `python main.py` inside a SLURM job is one process.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:N".
        dist_url: rendezvous of the process group.

    Raises:
        SystemExit: CUDA was asked for and there is none.
    """
    rank, size, local_rank, local_size = _launched()
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit(f"error: --device {device}, but torch {torch.__version__} finds no CUDA GPU; use --device cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda:") and size > 1:
        raise SystemExit(f"error: --device {device} puts {size} processes on one GPU; --device cuda gives each a GPU")
    if device == "cuda":
        device = f"cuda:{local_rank}"
    if device.startswith("cuda"):
        num_gpus = torch.cuda.device_count()
        if device not in [f"cuda:{index}" for index in range(num_gpus)]:
            raise SystemExit(f"error: --device {device}: there are {num_gpus} GPUs, cuda:0 and up")
        torch.cuda.set_device(device)
    if size > 1:
        on_gpu = device.startswith("cuda")
        backend, options = ("nccl", {"device_id": torch.device(device)}) if on_gpu else ("gloo", {})
        meeting = {"init_method": dist_url}
        try:
            if dist_url == "env://" and local_size == size:
                # torchrun's store outlives a restart of its ranks, and with it the addresses of those that died
                store, _, _ = next(rendezvous(dist_url, rank, size))
                attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
                meeting = {"store": dist.PrefixStore(f"attempt {attempt}", store)}
            dist.init_process_group(backend, **meeting, rank=rank, world_size=size, **options)
        except (dist.DistNetworkError, dist.DistStoreError) as error:  # a port in use, a process that does not come
            place = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
            place = place if dist_url == "env://" else dist_url
            raise SystemExit(
                f"error: the {size} processes cannot meet at {place}; choose another port, or use torchrun "
                f"--standalone. The message: {' '.join(str(error).split())}"
            ) from None
    return World(rank, size, local_rank, local_size, torch.device(device))


def _launched() -> tuple[int, int, int, int]:
    """Rank, number of processes, and the same on this machine, from torchrun; 0, 1, 0, 1 without it."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if "RANK" not in os.environ and os.environ.get("WORLD_SIZE", "1") == "1":
        return 0, 1, 0, 1
    try:
        rank, size, local_rank = (int(os.environ[name]) for name in names[:3])
        return rank, size, local_rank, int(os.environ.get(names[3], size))
    except (KeyError, ValueError):
        raise SystemExit(
            f"error: {', '.join(names[:3])} in the environment do not describe a process; "
            "start with torchrun, or unset them"
        ) from None


@contextlib.contextmanager
def joined_world(device: str, dist_url: str):
    """`init_world`, and leave the process group at a good end.

    After an error the process just ends: leaving may wait for ranks that wait for this one.
    """
    yield init_world(device, dist_url)
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def atomic_write(path: Path, before_rename: Callable[[], None] = lambda: None) -> Iterator[BinaryIO]:
    """Open a file whose content replaces that of `path` in one step, when the `with` block ends without an error.

    The content is written to `<name>.tmp` in the same folder and flushed to disk. Then that file is renamed. So `path`
    never holds a part of the content, whenever the process or the machine stops. After an error `path` is unchanged.

    Args:
        before_rename: called when the content is on disk.
    """
    temporary = path.with_name(f"{path.name}{TEMPORARY}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        before_rename()
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_json(value: dict | list, path: Path):
    """Write a JSON file in one step."""
    with atomic_write(path) as file:
        file.write(f"{json.dumps(value)}\n".encode())


@contextlib.contextmanager
def lock_folder(folder: Path, flag: str) -> Iterator[None]:
    """Lock an existing folder against other processes, on any host, that lock it too.

    The lock ends with the process, also when it is killed; forked processes do not have it. The file `.lock` stays.

    Args:
        flag: names the folder in messages.

    Raises:
        SystemExit: another process has locked it.
        OSError: the folder cannot be written.
    """
    path = folder / ".lock"
    lock = FileLock(path, blocking=False, fallback_to_soft=False)  # a soft lock would remain after a kill
    try:
        lock.acquire()
    except Timeout:
        owner = path.read_text(errors="replace").strip() or "another process"
        line = f"error: {flag} {folder} is in use by {owner}; wait for its end, or choose another folder"
        raise SystemExit(line) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS):
            raise
        sys.stderr.write(
            f"warning: {flag} {folder} is on a file system without locks ({error.strerror}); "
            "nothing prevents a second run in it\n"
        )
    try:
        path.write_text(f"process {os.getpid()} on host {socket.gethostname()}\n")
        yield
    finally:
        lock.release()


def cpu_count() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quiet_warnings():
    """Drop the warnings of libraries that a user of this program can do nothing about."""
    warnings.filterwarnings("ignore", message=".*TensorFloat32 tensor cores.*available but not enabled.*")
    warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*before.*optimizer.step.*")
    warnings.filterwarnings("ignore", message=".*PlateauLRScheduler is deprecated.*")
    warnings.filterwarnings("ignore", message=".*Corrupt EXIF data.*")
    warnings.filterwarnings("ignore", message="Palette images with Transparency.*")


def seed_of(purpose: str, *counters: int) -> int:
    """A seed of 63 bits: blake2b of the purpose and the counters, each below 2^63."""
    digest = hashlib.blake2b(struct.pack(f"<{len(counters)}q", *counters), digest_size=8, person=purpose.encode())
    return int.from_bytes(digest.digest(), "little") >> 1


def reseed(purpose: str, *counters: int, device: torch.device | None = None):
    """Seed Python, numpy and torch's CPU generator, and a GPU's where `device` is one, with `seed_of` the counters.

    Ten times cheaper than torch.manual_seed, which searches for every kind of device.
    """
    seed = seed_of(purpose, *counters)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
