"""What a run writes while it trains: log.txt, TensorBoard events, and the lines on the console."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torchvision
from tqdm import tqdm

from training.records import LOG, read_records
from utils import World, atomic_write


class RunLog:
    """What a run reports: console lines, `log.txt` (one JSON object per epoch, DeiT's keys) and TensorBoard events.

    Only the main process writes.

    Args:
        output_dir: the run folder, or None to write to the console alone.
        world: this process.
        tensorboard: also write events.
        epoch, step: where the run starts; what an earlier process logged after that is removed.
    """

    def __init__(self, output_dir: Path | None, world: World, tensorboard: bool, epoch: int = 0, step: int = 0):
        self.is_main = world.is_main
        self.path = output_dir / LOG if output_dir and self.is_main else None
        self.unwritten = ""
        if self.path and self.path.exists():
            self._drop_from(epoch)
        if self.path and [*output_dir.glob(f"events.out.tfevents.{int(time.time())}.*")]:
            time.sleep(1)  # TensorBoard reads event files in the order of their names, which contain the second
        self.writer = None
        if self.path and tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # here, as the import takes a second

            self.writer = SummaryWriter(output_dir, purge_step=step)

    def _drop_from(self, epoch: int):
        """Remove the lines of this and later epochs, and incomplete ones, from log.txt."""
        earlier = [record for record in read_records(self.path) if record is not None and record["epoch"] < epoch]
        text = "".join(f"{json.dumps(record)}\n" for record in earlier)
        if text != self.path.read_text():
            with atomic_write(self.path) as file:
                file.write(text.encode())

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

        A line that cannot be written is reported, and written with the next one.
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
                    os.truncate(self.path, size)  # no incomplete line stays
                    raise
            self.unwritten = ""
        except OSError as error:
            print(f"error: {self.path} cannot be written: {error.strerror}; training continues", file=sys.stderr)

    def flush(self):
        """Write TensorBoard's events so far."""
        if self.writer:
            try:
                self.writer.flush()
            except OSError as error:
                print(f"error: TensorBoard's events cannot be written: {error}; they end here", file=sys.stderr)
                self.writer = None

    def close(self):
        if self.writer:
            self.writer.close()


def epoch_line(record: dict[str, float], num_epochs: int) -> str:
    """An epoch on one line of at most 100 columns; its terms are in log.txt and in `terms_table`."""
    loss = f"loss {record['train_loss']:.4g}" if "train_loss" in record else "no step taken"
    accuracies = _accuracies({name.removeprefix("test_"): value for name, value in record.items()})
    speed = f"{record['train_images_per_s']:.0f} images/s, data wait {100 * record['train_data_wait']:.0f} %"
    return f"epoch {record['epoch']} of {num_epochs}: {loss}, accuracy {accuracies}, {speed}"


def accuracy_line(stats: dict[str, float]) -> str:
    """The accuracies of `evaluate_both` on one line."""
    return f"test accuracy: {_accuracies(stats)}"


def _accuracies(stats: dict[str, float]) -> str:
    ema = f", EMA {stats['acc1_ema']:.2f} %" if "acc1_ema" in stats else ""
    return f"raw {stats['acc1']:.2f} %{ema}"


def terms_table(record: dict[str, float]) -> str:
    """The terms of an epoch's record, one line each: raw value and weighted fraction of the loss; empty without one."""
    names = [name.removesuffix("_share") for name in record if name.endswith("_share")]
    rows = [
        f"{name.removeprefix('train_'):<28}{record[name]:>12.4g}{100 * record[f'{name}_share']:>12.2f} %"
        for name in names
    ]
    return "\n".join([f"{'term':<28}{'value':>12}{'of the loss':>14}", *rows]) if rows else ""


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
