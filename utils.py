"""The ground the run stands on: processes and devices, seeds, meters, and the records in DeiT's format."""

import contextlib
import ctypes
import json
import os
import platform
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import timm
import torch
import torch.distributed as dist
import torchvision
from timm.layers import set_fused_attn
from torch.distributed.rendezvous import rendezvous
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


class BadImageError(RuntimeError):
    """An image cannot be read and may not, or no longer, be replaced."""


@contextlib.contextmanager
def one_line_errors():
    """Turn `BadImageError`, and a failed exchange with another process, into the line that a command ends with."""
    try:
        yield
    except BadImageError as error:  # a loader worker's arrives with its traceback in the message
        line = str(error).strip().splitlines()[-1].removeprefix("utils.BadImageError: ")
        raise SystemExit(f"error: {line}") from None
    except RuntimeError as error:
        line = " ".join(str(error).split())
        if not (dist.is_initialized() and re.search("gloo|nccl|connection (closed|reset)", line, re.IGNORECASE)):
            raise
        raise SystemExit(
            "error: processes could not exchange data; if another one has ended, start again with --resume auto. "
            f"The message: {line}"
        ) from None


def run_command(command: Callable[[], None]):
    """Run a program; a `SystemExit` with a message becomes one line on standard error and exit code 1."""
    try:
        command()
    except SystemExit as stop:
        if isinstance(stop.code, str):
            sys.stderr.write(f"{stop.code}\n")  # in one piece, where several processes say it
            sys.exit(1)
        raise


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

    def from_main(self, value: str | None) -> str | None:
        """The main process's text, such as an error message, told to all."""
        told = [value]
        if self.size > 1:
            dist.broadcast_object_list(told, device=self.device)
        return told[0]


def init_world(device: str = "auto", dist_url: str = "env://") -> World:
    """Join the process group that torchrun's variables describe; without them, this is the only process.

    SLURM's variables are not looked at: a plain `python main.py` inside a SLURM job is one process.

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
        raise SystemExit(f"error: --device {device} puts {size} processes on one GPU; --device cuda gives each its own")
    if device == "cuda":
        device = f"cuda:{local_rank}"
    if device.startswith("cuda"):
        _require_gpu(device)
        torch.cuda.set_device(device)
    if size > 1:
        on_gpu = device.startswith("cuda")
        backend, options = ("nccl", {"device_id": torch.device(device)}) if on_gpu else ("gloo", {})
        meeting = {"init_method": dist_url}
        if dist_url == "env://" and local_size == size:
            # torchrun's store outlives a restart of its ranks, and with it the addresses of those that died
            store, _, _ = next(rendezvous(dist_url, rank, size))
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            meeting = {"store": dist.PrefixStore(f"attempt {attempt}", store)}
        dist.init_process_group(backend, **meeting, rank=rank, world_size=size, **options)
    return World(rank, size, local_rank, local_size, torch.device(device))


def _launched() -> tuple[int, int, int, int]:
    """Rank, number of processes, and the same on this machine, as torchrun says them; 0, 1, 0, 1 without it."""
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


def _require_gpu(device: str):
    index = device.removeprefix("cuda:")
    if not index.isdigit() or int(index) >= torch.cuda.device_count():
        raise SystemExit(f"error: --device {device}: there are {torch.cuda.device_count()} GPUs, cuda:0 and up")


@contextlib.contextmanager
def joined_world(device: str, dist_url: str):
    """`init_world`, and leave the process group at a good end.

    After an error the process just ends: leaving may wait for ranks that wait for this one.
    """
    yield init_world(device, dist_url)
    if dist.is_initialized():
        dist.destroy_process_group()


class Meters:
    """Running sums of named numbers, kept on their device so that adding never waits for the host."""

    def __init__(self):
        self.names: list[str] = []
        self.sums: torch.Tensor | None = None  # one vector, so that adding is a kernel or two for any number of names
        self.count: int | torch.Tensor = 0  # what was added
        self.of_names: int | torch.Tensor = 0  # of it, what was added under the present names

    def add(self, names: Sequence[str], values: torch.Tensor, counts: torch.Tensor | None = None):
        """Add values [n] to the sums of n names, where `counts`, a 0-dim boolean, holds.

        Other names than before, as of an epoch that is continued with other terms, begin anew: no mean mixes them.
        """
        added, counted = (values.float(), 1) if counts is None else (values.float().where(counts, 0.0), counts)
        if self.names != [*names]:
            self.names, self.sums, self.of_names = [*names], None, 0
        self.sums = added if self.sums is None else self.sums + added
        self.count = self.count + counted
        self.of_names = self.of_names + counted

    def averages(self, world: World) -> dict[str, float]:
        """Means over all steps and processes; every process must call it."""
        if not self.of_names:
            return {}
        return {name: value / int(self.of_names) for name, value in self.state_dict(world)["sums"].items()}

    def state_dict(self, world: World) -> dict:
        """The sums as means over the processes, and the counts; every process must call it."""
        means = [] if self.sums is None else (world.sum(self.sums.clone()) / world.size).tolist()
        counts = {"count": int(self.count), "of_names": int(self.of_names)}
        return {"sums": dict(zip(self.names, means, strict=True))} | counts

    def load_state_dict(self, state: dict, device: torch.device):
        self.names = [*state["sums"]]
        self.sums = torch.tensor([*state["sums"].values()], device=device) if state["sums"] else None
        self.count, self.of_names = state["count"], state.get("of_names", state["count"])


@dataclass
class EpochTotals:
    """What an epoch has added up so far.

    Attributes:
        epoch: means over its steps.
        window: means since the last console line.
        images: seen by all processes.
        seconds: trained.
        waited: of these seconds, those spent waiting for the loader.
        overflows: steps that fp16's loss scale skipped, counted on the device.
    """

    epoch: Meters = field(default_factory=Meters)
    window: Meters = field(default_factory=Meters)
    images: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    overflows: int | torch.Tensor = 0

    def skipped(self, steps: int) -> int:
        """How many of the epoch's steps so far were not finite; waits for the device."""
        return steps - int(self.epoch.count) - int(self.overflows)

    def state_dict(self, world: World) -> dict:
        """Numbers only, the same on all processes, each of which must call it."""
        numbers = {"images": self.images, "seconds": self.seconds, "waited": self.waited}
        numbers["overflows"] = int(self.overflows)
        return numbers | {"epoch": self.epoch.state_dict(world), "window": self.window.state_dict(world)}

    def load_state_dict(self, state: dict, device: torch.device):
        for name, value in state.items():
            if isinstance(value, dict):
                getattr(self, name).load_state_dict(value, device)
            else:
                setattr(self, name, value)


class RunLog:
    """What a run tells: console lines, `log.txt` (one JSON object per epoch, DeiT's keys) and TensorBoard events.

    Only the main process writes.

    Args:
        output_dir: the run folder, or None to write to the console alone.
        world: this process.
        tensorboard: also write events.
        epoch, step: where the run goes on; what an earlier process logged from there on is dropped, as it comes again.
    """

    def __init__(self, output_dir: Path | None, world: World, tensorboard: bool, epoch: int = 0, step: int = 0):
        self.is_main = world.is_main
        self.path = output_dir / "log.txt" if output_dir and self.is_main else None
        self.unwritten = ""
        if self.path and self.path.exists():
            self._drop_from(epoch)
        if self.path and [*output_dir.glob(f"events.out.tfevents.{int(time.time())}.*")]:
            time.sleep(1)  # TensorBoard reads event files in the order of their names, which hold the second
        self.writer = SummaryWriter(output_dir, purge_step=step) if self.path and tensorboard else None

    def _drop_from(self, epoch: int):
        """Leave the whole lines of earlier epochs in log.txt."""
        lines = self.path.read_text().splitlines()
        kept = [line for line in lines if (record := _parsed(line)) is not None and record["epoch"] < epoch]
        if kept != lines or not self.path.read_bytes().endswith(b"\n"):
            temporary = self.path.with_name(f"{self.path.name}.tmp")
            temporary.write_text("".join(f"{line}\n" for line in kept))
            temporary.replace(self.path)

    def print(self, text: str):
        if self.is_main:
            tqdm.write(text)
            sys.stdout.flush()

    def scalars(self, values: dict[str, float], step: int):
        """TensorBoard points at an optimizer step."""
        if self.writer:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def figure(self, name: str, draw: Callable, step: int):
        """The matplotlib figure that `draw()` returns, in TensorBoard; it is closed. Without events it is not drawn."""
        if self.writer:
            self.writer.add_figure(name, draw(), step)

    def epoch(self, record: dict, step: int):
        """One epoch's record: a line of log.txt, and its numbers in TensorBoard under `epoch/` at its last step.

        A line that cannot be written is said, and written with the next one.
        """
        numbers = {f"epoch/{name}": value for name, value in record.items() if isinstance(value, int | float)}
        self.scalars(numbers, step)
        self.flush()
        if not self.path:
            return
        self.unwritten += json.dumps(record) + "\n"
        try:
            size = self.path.stat().st_size if self.path.exists() else 0
            with open(self.path, "a") as file:
                try:
                    file.write(self.unwritten)
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    os.truncate(self.path, size)  # no part of a line stays
                    raise
            self.unwritten = ""
        except OSError as error:
            print(f"error: {self.path} cannot be written: {error.strerror}; training goes on", file=sys.stderr)

    def flush(self):
        """Write what TensorBoard has been told so far."""
        if self.writer:
            try:
                self.writer.flush()
            except OSError as error:
                print(f"error: TensorBoard's events cannot be written: {error}; they end here", file=sys.stderr)
                self.writer = None

    def close(self):
        if self.writer:
            self.writer.close()


def _parsed(line: str) -> dict | None:
    """A record of log.txt; None for a line that was cut off."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def write_json(value: dict, path: Path):
    """Write a JSON file that is whole whenever it is there."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(value) + "\n")
    temporary.replace(path)


def environment_lines(world: World, seed: int) -> list[str]:
    """What a reader of the log needs to repeat the run: versions, commit, device, seed."""
    name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else platform.processor() or "CPU"
    return [
        f"python {platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}, "
        f"timm {timm.__version__}, commit {_commit()}",
        f"{world.size} process{'es' if world.size > 1 else ''} on {world.device.type} ({name}), seed {seed}",
    ]


def _commit() -> str:
    """Short commit of this checkout, with `+changes` when files differ from it."""
    here = Path(__file__).parent
    try:
        run = subprocess.run(
            ["git", "-C", here, "describe", "--always", "--dirty=+changes"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return run.stdout.strip() or "unknown"


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on a device; on a GPU through page-locked memory, so that the host does not wait."""
    if device.type == "cuda":
        tensor = torch.empty_like(tensor, pin_memory=True).copy_(tensor)
    return tensor.to(device, non_blocking=True)


def cpu_count() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_backends(fused_attn: bool, tf32: bool):
    """How torch and timm compute: cuDNN chooses its algorithms by trial, and the flags of the same names."""
    torch.backends.cudnn.benchmark = True
    set_fused_attn(fused_attn)
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32


def keep_freed_memory() -> bool:
    """Have glibc keep the large buffers that a step on the CPU, or a decoded image, frees; loader workers inherit it.

    By default it returns them to the system, and the next step or image pays for their pages again. What a run holds at
    most stays the same.

    Returns:
        Whether the setting was taken; False where the C library is another one.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    trim_threshold, top_pad, mmap_max = -1, -2, -4
    settings = ((trim_threshold, 2**31 - 1), (top_pad, 64 * 2**20), (mmap_max, 0))
    return mallopt is not None and all(mallopt(*setting) for setting in settings)


def quiet_warnings():
    """Drop the warnings of libraries that a user of this program can do nothing about."""
    warnings.filterwarnings("ignore", message=".*TensorFloat32 tensor cores.*available but not enabled.*")
    warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*before.*optimizer.step.*")
    warnings.filterwarnings("ignore", message=".*PlateauLRScheduler is deprecated.*")
    warnings.filterwarnings("ignore", message=".*Corrupt EXIF data.*")
