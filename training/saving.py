"""When a run is saved while it trains, and how it stops so that it can be resumed."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from training import checkpoint_files
from training.background import BackgroundWriter, copy_to_cpu, first_non_finite
from training.checkpoint import BEST, LAST, TrainState
from training.log import RunLog
from training.stopping import RESUMABLE, Agreement, StopSignals
from utils import World


class Saver:
    """Saves a run while it trains: after some steps or minutes, at the end of an epoch, and when it is stopped.

    A thread writes one file at a time while training continues. A save that fails is reported, and the next one tries
    again, best checkpoints included; weights that are not finite are not saved. Every process calls each method; the
    main one writes, and what it does about an error involves no other process.

    Args:
        state: of the run.
        extras: returns what else a checkpoint contains: the flags, the global batch, unreadable images; every process
            calls it.
        output_dir: the run folder; None on other processes, or for a run without one.
        steps: optimizer steps between saves; 0 = none.
        minutes: between saves; 0 = none.
        keep: how many checkpoints stay: the newest and those before it.
        signals: of the system, which stop the run.
    """

    def __init__(
        self,
        state: TrainState,
        extras: Callable[[], dict],
        output_dir: Path | None,
        log: RunLog,
        world: World,
        signals: StopSignals,
        *,
        steps: int = 0,
        minutes: float = 0,
        keep: int = 2,
    ):
        self.state, self.extras, self.output_dir, self.log, self.world = state, extras, output_dir, log, world
        self.signals, self.steps, self.minutes, self.keep = signals, steps, minutes, keep
        self.agreement = Agreement(world)
        self.writer = BackgroundWriter(self._failed)
        self.error, self.is_last_try = "", False  # of the last save that failed; the error of the last try ends the run
        self.buffers: dict[tuple, torch.Tensor] = {}
        self.unwritten_best: dict[str, dict] = {}  # by the keys of `BEST`
        self.submitted: tuple[int, int] | None = None  # epoch and step of the last state
        self.unwritten: Callable[[], None] | None = None  # writes the last state, until it has done so
        self._begin_interval()

    def after_step(self):
        """Save if it is time, and stop if any process received a signal.

        Raises:
            SystemExit: with `RESUMABLE`, once the state is saved.
        """
        self.writer.poll()
        self.steps_since += 1
        is_due = 0 < self.steps <= self.steps_since or 0 < self.minutes * 60 <= time.monotonic() - self.saved_at
        is_due = is_due and self.output_dir is not None and not self.asked and not self.writer.busy
        self.asked = self.asked or is_due
        stop, due = self.agreement.exchange(bool(self.signals.received), is_due)
        if stop:
            self._stop()
        if due:
            self._submit([])

    def after_batch(self):
        """During an evaluation: stop if any process received a signal.

        Raises:
            SystemExit: with `RESUMABLE`, once the state is saved.
        """
        if self.agreement.vote(bool(self.signals.received))[0]:
            self._stop()

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Save before an evaluation, so that the epoch is not lost if it fails; then only the evaluation is repeated.

        The save ends with it at the latest.
        """
        self._submit_once()
        try:
            yield
        finally:
            self.writer.wait()

    def end_epoch(self, improved: list[str]):
        """Save after an epoch, and the weights alone as best checkpoints.

        Args:
            improved: the keys of `BEST` to write.
        """
        self._submit(improved)

    def close(self):
        """Wait for the last save; if it or the log failed, try once more. No process returns before the file exists.

        Raises:
            SystemExit: on all processes, if it cannot be written.
        """
        self.agreement.finish()
        self.writer.wait()
        if self.unwritten:
            self.is_last_try = True
            self.writer.submit(self.unwritten)
            self.writer.wait()
        self.log.flush()
        (is_lost,) = self.agreement.vote(self.unwritten is not None)
        if is_lost:
            reason = f"error: the last checkpoint could not be written: {self.error}"
            raise SystemExit(reason if self.unwritten else 1)

    def _stop(self):
        self._submit_once()
        self.close()
        self.log.print(
            f"stopped in epoch {self.state.epoch} after step {self.state.step}, saved; start again to continue"
        )
        raise SystemExit(RESUMABLE)

    def _submit_once(self):
        """Save the state, unless the last save has it already."""
        if self.submitted != (self.state.epoch, self.state.step):
            self._submit([])

    def _submit(self, improved: list[str]):
        state = self.state.state_dict(self.world) | self.extras()
        self.submitted = (self.state.epoch, self.state.step)
        self.log.flush()  # a run that resumes from this state needs the rows up to it
        self._begin_interval()
        if self.output_dir is None:
            return
        self.writer.wait()  # which reads the buffers
        self.unwritten = None  # this state replaces the one that could not be written
        self.unwritten_best = copy_to_cpu(self.unwritten_best)  # out of the buffers, which are written next
        state = copy_to_cpu(state | {"unwritten_log": self.log.unwritten}, self.buffers)
        weights = {"acc1": state["model"], "acc1_ema": state.get("model_ema")}

        def write():
            bad = first_non_finite({key: state.get(key, {}) for key in ("model", "model_ema")})
            if bad:
                raise ValueError(f"{bad} is not finite")
            for name in improved:
                best = {"model": weights[name], "acc1": state["best"][name], "epoch": state["epoch"]}
                best["is_average"] = name == "acc1_ema"
                self.unwritten_best[name] = best | {key: state[key] for key in ("args", "data") if key in state}
            for name, best in list(self.unwritten_best.items()):  # first: the state says that they are written
                checkpoint_files.write(best, self.output_dir / BEST[name], keep=1)
                del self.unwritten_best[name]
            checkpoint_files.write(state, self.output_dir / LAST, keep=self.keep)
            self.unwritten = None

        self.unwritten = write
        self.writer.submit(write)

    def _begin_interval(self):
        self.saved_at, self.steps_since, self.asked = time.monotonic(), 0, False

    def _failed(self, error: BaseException):
        self.error = str(error)
        if self.is_last_try:
            return
        line = (
            f"error: no checkpoint saved in {self.output_dir}: {error}; training continues, the next save tries again"
        )
        print(line, file=sys.stderr, flush=True)
