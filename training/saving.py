"""When a run is saved while it trains, and how it stops so that it can be resumed."""

import sys
import time
from collections.abc import Callable
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
    again; weights that are not finite are not saved. Every process calls each method; the main one writes.

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
        self.error: BaseException | None = None
        self.buffers: dict[tuple, torch.Tensor] = {}
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

    def end_epoch(self, improved: list[str]):
        """Save after an epoch, and the weights alone as best checkpoints.

        Args:
            improved: the keys of `BEST` to write.
        """
        self._submit(improved)

    def close(self):
        """Wait for the last save, and try once more if it failed.

        Raises:
            SystemExit: it cannot be written.
        """
        self.agreement.finish()
        self.writer.wait()
        if self.error is not None:
            self._submit([])
            self.writer.wait()
        if self.error is not None:
            raise SystemExit(f"error: the last checkpoint could not be written: {self.error}")

    def _stop(self):
        self._submit([])
        self.close()
        self.agreement.vote(False)  # no process exits before the file exists: torchrun would end the others
        self.log.print(
            f"stopped in epoch {self.state.epoch} after step {self.state.step}, saved; start again to continue"
        )
        self.log.close()
        raise SystemExit(RESUMABLE)

    def _submit(self, improved: list[str]):
        state = self.state.state_dict(self.world) | self.extras()
        self.log.flush()  # a run that resumes from this state needs the rows up to it
        self._begin_interval()
        if self.output_dir is None:
            return
        self.writer.wait()  # which reads the buffers
        state, path = copy_to_cpu(state, self.buffers), self.output_dir / LAST
        weights = {"acc1": state["model"], "acc1_ema": state.get("model_ema")}

        def write():
            bad = first_non_finite({key: state.get(key, {}) for key in ("model", "model_ema")})
            if bad:
                raise ValueError(f"{bad} is not finite")
            for name in improved:  # first: a run that resumes from an earlier state writes them again
                best = {"model": weights[name], "acc1": state["best"][name], "epoch": state["epoch"]}
                checkpoint_files.write(best | {"args": state["args"]}, self.output_dir / BEST[name], keep=1)
            checkpoint_files.write(state, path, keep=self.keep)
            self.error = None

        self.writer.submit(write)

    def _begin_interval(self):
        self.saved_at, self.steps_since, self.asked = time.monotonic(), 0, False

    def _failed(self, error: BaseException):
        self.error = error
        line = (
            f"error: no checkpoint saved in {self.output_dir}: {error}; training continues, the next save tries again"
        )
        print(line, file=sys.stderr, flush=True)
