"""Clock, throughput and console lines of training; a bar too where a person watches a terminal."""

import datetime
import sys
import time
from collections.abc import Iterable, Iterator

import torch
from tqdm import tqdm

from training.checkpoint import TrainState
from training.first_step import FirstStep
from training.log import RunLog, by_group
from training.meters import Meters
from training.schedule import learning_rates
from utils import World


class Progress:
    """Measures the steps of a run and reports them.

    Args:
        state: of the run; its `totals` get images, seconds and the time spent waiting.
        num_steps: optimizer steps of an epoch.
        log: where lines and values go.
        world: this process.
        log_interval: optimizer steps between console lines; 0 = none.
        first_step: reports the values of the run's first step; None = they are not reported.
    """

    def __init__(
        self, state: TrainState, num_steps: int, log: RunLog, world: World, log_interval: int = 50,
        first_step: FirstStep | None = None,
    ):  # fmt: skip
        self.state, self.num_steps, self.log, self.world = state, num_steps, log, world
        self.log_interval, self.first_step = log_interval, first_step
        self.is_warm = False  # whether this process has taken a step

    def batches(self, loader: Iterable) -> Iterator:
        """The loader's batches for the rest of an epoch; the time spent waiting for each is added up."""
        self.images, self.waited = 0, 0.0  # of the step in progress
        self.step_images = 0  # of the last step
        self.first = (0, 0.0, 0.0)  # images, seconds and waiting of this process's first step
        self.window = [0, 0.0, 0.0]  # the same since the last console line
        self.clock = time.perf_counter()
        is_on_terminal = self.world.is_main and sys.stderr.isatty()
        steps = {"initial": self.state.step, "total": self.num_steps}
        self.bar = tqdm(**steps, desc=f"epoch {self.state.epoch}", leave=False, disable=not is_on_terminal)
        batches = iter(loader)
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.waited += time.perf_counter() - start
            yield batch

    def count_images(self, count: int):
        """Count the images of a batch of this process; all processes have as many."""
        self.images += count * self.world.size

    def end_step(self):
        """Count an optimizer step, which `state` already counts; report it every `log_interval` steps."""
        totals, now = self.state.totals, time.perf_counter()
        measured = (self.images, now - self.clock, self.waited)
        if self.is_warm:
            totals.images += measured[0]
            totals.seconds += measured[1]
            totals.waited += measured[2]
        else:  # this process's first step compiles and starts the loader's workers
            self.first, self.is_warm = measured, True
        self.window = [sum(pair) for pair in zip(self.window, measured, strict=True)]
        self.step_images, self.images, self.waited, self.clock = self.images, 0, 0.0, now
        self.bar.update()
        if self.first_step is not None and self.first_step.is_pending:
            table = self.first_step.report(totals, self.world)
            if table:
                self.log.print(table)
        step = self.state.step - 1
        if self.log_interval > 0 and step % self.log_interval == 0 and step < self.num_steps - 1:
            self._report(step)
            self.state.totals.window, self.window = Meters(), [0, 0.0, 0.0]

    def end_epoch(self):
        """Report the last step; a run that is stopped after it, or in the evaluation, reports it again."""
        if self.log_interval:
            self._report(self.num_steps - 1)
        self.bar.close()

    def speed(self) -> dict[str, float]:
        """images_per_s and data_wait over the epoch so far."""
        images, seconds, waited = self.state.totals.images, self.state.totals.seconds, self.state.totals.waited
        if not images:  # there was no step but the first
            images, seconds, waited = self.first
        return {"images_per_s": images / max(seconds, 1e-9), "data_wait": waited / max(seconds, 1e-9)}

    def _report(self, step: int):
        """A console line of at most 100 columns; the terms too go to TensorBoard."""
        totals, epoch = self.state.totals, self.state.epoch
        rates = learning_rates(self.state.optimizer)
        lr = " to ".join(f"{rate:.3g}" for rate in sorted(rates.values()))
        averages = totals.window.averages(self.world)
        images, seconds, waited = self.window
        seconds = max(seconds, 1e-9)  # 0 if this process has only resumed after the last step
        eta = "unknown"  # after the first step of a process
        if totals.images:
            step_seconds = totals.seconds / totals.images * self.step_images
            eta = datetime.timedelta(seconds=round(step_seconds * (self.num_steps - step - 1)))
        means = f"loss {averages['loss']:.4g}  grad {averages['grad_norm']:.3g}" if averages else "no step taken"
        self.log.print(
            f"epoch {epoch} {step:>{len(str(self.num_steps))}}/{self.num_steps}  {means}  lr {lr}  "
            f"{images / seconds:.0f} images/s  data wait {100 * waited / seconds:.0f} %  eta {eta}"
        )
        values = rates | averages
        if self.world.device.type == "cuda":
            values["max_memory_mib"] = torch.cuda.max_memory_allocated(self.world.device) / 2**20
        self.log.scalars(by_group(values, "train"), epoch * self.num_steps + step)
