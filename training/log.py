"""What a run writes while it trains: means, log.txt, TensorBoard events, and what the console shows."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import timm
import torch
import torchvision
from tqdm import tqdm

from utils import World, atomic_write


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
        self.writer = None
        if self.path and tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # here, as the import takes a second

            self.writer = SummaryWriter(output_dir, purge_step=step)

    def _drop_from(self, epoch: int):
        """Leave the whole lines of earlier epochs in log.txt."""
        lines = self.path.read_text().splitlines()
        kept = [line for line in lines if (record := _parsed(line)) is not None and record["epoch"] < epoch]
        if kept != lines or not self.path.read_bytes().endswith(b"\n"):
            with atomic_write(self.path) as file:
                file.write("".join(f"{line}\n" for line in kept).encode())

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
    here = Path(__file__).parents[1]
    try:
        run = subprocess.run(
            ["git", "-C", here, "describe", "--always", "--dirty=+changes"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return run.stdout.strip() or "unknown"
