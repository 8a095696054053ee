"""What a run continues from: its state, when it is saved, and how it is found again."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from timm.scheduler import PlateauLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn

from models.weights import is_weights, load_state_dict, load_weights, local_file, read
from training import checkpoint_files
from training.background import BackgroundWriter, copy_to_cpu, first_non_finite
from training.log import RunLog
from training.meters import EpochTotals
from training.stopping import RESUMABLE, Agreement, StopSignals
from utils import World

SETTINGS = {"weight_decay", "betas", "eps", "momentum", "initial_lr", "fused"}  # of a group, from flags and device
LAST = "checkpoint.pth"
BEST = {"acc1": "checkpoint_best.pth", "acc1_ema": "checkpoint_best_ema.pth"}


@dataclass
class TrainState:
    """Everything that changes while a run trains, and so everything a run continues from.

    No random state is among it: see utils.py. It is saved between optimizer steps, when no batch is accumulated.

    Attributes:
        model: the stock timm model, not its wrappers, so that files hold timm's keys.
        optimizer, scheduler, loss_scaler: None in an evaluation.
        epoch: the epoch in training, or the next one.
        step: optimizer steps of this epoch that are done.
        totals: what this epoch has added up.
        skipped: steps of the epochs before that were not finite.
        best: {"acc1": percent, "acc1_ema": percent}, the best so far.
        earlier_seconds: of the processes that this one continues.
        started: this process's clock.
    """

    model: nn.Module
    model_ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer | None = None
    scheduler: Scheduler | None = None
    loss_scaler: torch.amp.GradScaler | None = None
    epoch: int = 0
    step: int = 0
    totals: EpochTotals = field(default_factory=EpochTotals)
    skipped: int = 0
    best: dict[str, float] = field(default_factory=dict)
    earlier_seconds: float = 0.0
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """What all processes of this run have taken, one after the other."""
        return self.earlier_seconds + time.monotonic() - self.started

    def next_epoch(self, accuracies: dict[str, float]) -> list[str]:
        """Begin the next epoch; returns the keys of `BEST` whose value in `accuracies` is the best so far."""
        kept = ["acc1"] if self.model_ema is None else list(BEST)
        improved = [name for name in kept if accuracies[name] > self.best.get(name, -1.0)]
        self.best |= {name: accuracies[name] for name in improved}
        self.skipped += self.totals.skipped(self.step)
        self.epoch, self.step, self.totals = self.epoch + 1, 0, EpochTotals()
        return improved

    def state_dict(self, world: World) -> dict:
        """What a checkpoint holds, not yet copied; every process must call it."""
        whole = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": _scheduler_state(self.scheduler),
            "scaler": self.loss_scaler.state_dict(),
            "epoch": self.epoch - 1,  # the finished one, as DeiT writes it
            "step": self.step,
            "totals": self.totals.state_dict(world),
            "skipped": self.skipped,
            "best": dict(self.best),
            "seconds": self.seconds,
        }
        if self.model_ema is not None:
            whole["model_ema"] = self.model_ema.module.state_dict()
        return whole

    def restore(self, checkpoint: dict, path: str, global_batch: int = 0, device: torch.device | None = None):
        """Continue from a loaded checkpoint.pth, weights included.

        The schedule and the optimizer's settings stay those of the flags; timm's schedules depend on the epoch alone,
        except plateau's.

        Args:
            global_batch: images of an optimizer step; within an epoch it must be the stored one.
            device: of the means so far.

        Raises:
            SystemExit: it is of another model, of another optimizer, of another global batch, or holds weights alone.
        """
        missing = {"optimizer", "lr_scheduler", "scaler", "epoch"} - checkpoint.keys()
        if missing:
            raise SystemExit(
                f"error: --resume {path} holds no {', '.join(sorted(missing))}; "
                f"training continues from {LAST}, other weights start a new run with --finetune"
            )
        step, stored_batch = checkpoint.get("step", 0), checkpoint.get("global_batch", global_batch)
        if step and stored_batch != global_batch:
            raise SystemExit(
                f"error: --resume {path} is within an epoch of {stored_batch} images per optimizer step, not "
                f"{global_batch}; keep processes x --batch-size x --accum-steps"
            )
        load_model_and_ema(self.model, self.model_ema, checkpoint, path)
        stored, own = (
            state["param_groups"][0].keys() for state in (checkpoint["optimizer"], self.optimizer.state_dict())
        )
        if stored != own:
            raise SystemExit(f"error: --resume {path} was written with another optimizer, see --opt")
        for group, own in zip(checkpoint["optimizer"]["param_groups"], self.optimizer.param_groups, strict=False):
            group.update({key: own[key] for key in SETTINGS & own.keys()})  # before, as they say where state belongs
        try:
            self.optimizer.load_state_dict(checkpoint["optimizer"])
        except ValueError as error:
            raise SystemExit(f"error: --resume {path} was written with another optimizer: {error}") from None
        self.epoch, self.step = checkpoint["epoch"] + 1, step
        if isinstance(self.scheduler, PlateauLRScheduler):
            _restore_plateau(self.scheduler, checkpoint["lr_scheduler"])
        elif self.epoch:
            self.scheduler.step(checkpoint["epoch"])
        if checkpoint["scaler"]:  # empty when the run so far did not scale its loss
            self.loss_scaler.load_state_dict(checkpoint["scaler"])
        if "totals" in checkpoint:
            self.totals.load_state_dict(checkpoint["totals"], device)
        self.skipped = checkpoint.get("skipped", 0)
        self.best = checkpoint.get("best", {})
        self.earlier_seconds = checkpoint.get("seconds", 0.0)


def _scheduler_state(scheduler: Scheduler) -> dict:
    """timm's state, and for plateau the counters of torch's scheduler inside, which timm leaves out."""
    state = scheduler.state_dict()
    if isinstance(scheduler, PlateauLRScheduler):
        state["plateau"] = scheduler.lr_scheduler.state_dict()
    return state


def _restore_plateau(scheduler: PlateauLRScheduler, state: dict):
    scheduler.load_state_dict({name: value for name, value in state.items() if name != "plateau"})
    if "plateau" in state:
        scheduler.lr_scheduler.load_state_dict(state["plateau"])


class Saver:
    """Saves a run while it trains: after some steps or minutes, at the end of an epoch, and when it is stopped.

    Files are written by a thread while training goes on; one at a time. A save that fails is said, and the next one
    tries again; weights that are not finite are not saved. Every process calls each method; the main one writes.

    Args:
        state: of the run.
        extras: what else a checkpoint holds: the flags, the global batch, known bad images; every process calls it.
        output_dir: the run folder; None on other processes, or for a run that keeps nothing.
        steps: optimizer steps between saves; 0 = none.
        minutes: between saves; 0 = none.
        keep: checkpoints that are kept, the newest and those before it.
        signals: what asks the run to stop.
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
        """Save if it is time, stop if a signal came to any process.

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
        """In the midst of an evaluation: stop if a signal came to any process.

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
        self.agreement.vote(False)  # no process leaves before the file is there: torchrun would end the others
        self.log.print(f"stopped in epoch {self.state.epoch} after step {self.state.step}, saved; start again to go on")
        self.log.close()
        raise SystemExit(RESUMABLE)

    def _submit(self, improved: list[str]):
        whole = self.state.state_dict(self.world) | self.extras()
        self.log.flush()  # the rows up to this state must not be lost when the run goes on from it
        self._begin_interval()
        if self.output_dir is None:
            return
        self.writer.wait()  # which reads the buffers
        whole, path = copy_to_cpu(whole, self.buffers), self.output_dir / LAST
        weights = {"acc1": whole["model"], "acc1_ema": whole.get("model_ema")}

        def write():
            bad = first_non_finite({key: whole.get(key, {}) for key in ("model", "model_ema")})
            if bad:
                raise ValueError(f"{bad} is not finite")
            for name in improved:  # first, since a run that goes on from before them writes them again
                best = {"model": weights[name], "acc1": whole["best"][name], "epoch": whole["epoch"]}
                checkpoint_files.write(best | {"args": whole["args"]}, self.output_dir / BEST[name], keep=1)
            checkpoint_files.write(whole, path, keep=self.keep)
            self.error = None

        self.writer.submit(write)

    def _begin_interval(self):
        self.saved_at, self.steps_since, self.asked = time.monotonic(), 0, False

    def _failed(self, error: BaseException):
        self.error = error
        line = f"error: no checkpoint saved in {self.output_dir}: {error}; training goes on, the next save tries again"
        print(line, file=sys.stderr, flush=True)


def load_model_and_ema(model: nn.Module, model_ema: ModelEmaV3 | None, checkpoint: dict, path: str):
    """Weights of a loaded checkpoint; an average it does not hold starts from its raw weights.

    Raises:
        SystemExit: the weights do not fit the model.
    """
    load_state_dict(model, checkpoint["model"], path, "--resume")
    if model_ema is not None:
        load_state_dict(model_ema.module, checkpoint.get("model_ema", checkpoint["model"]), path, "--resume")


class Start(NamedTuple):
    """What a run starts from.

    Attributes:
        path: the checkpoint that was restored; empty for initial or fine-tuned weights.
        notes: one line for each weight that was not loaded unchanged.
        bad_images: unreadable training images that the run has met.
    """

    path: str = ""
    notes: Sequence[str] = ()
    bad_images: Sequence[int] = ()


def resume(
    state: TrainState, path: str, folder: str, world: World, *, finetune: str = "", global_batch: int = 0
) -> Start:
    """Find, load and restore what a run continues from; without anything to continue, load weights to start from.

    Without an optimizer in `state`, as in an evaluation, only the weights are restored, and an average that the file
    does not hold is dropped; training starts it from the weights.

    Args:
        path: a checkpoint.pth, an https URL, "auto" for the newest undamaged checkpoint of `folder` if there is one, or
            empty.
        folder: the run folder.
        finetune: weights in any of timm's and DeiT's layouts; empty = keep the initial weights.
        global_batch: images per optimizer step.

    Raises:
        SystemExit: a file is missing, damaged or does not fit.
    """
    if path == "auto":
        newest = find_newest(Path(folder)) if world.is_main else None
        path = world.from_main(str(newest or ""))
    is_training = state.optimizer is not None
    if path:
        checkpoint = load(path, "--resume")
        if is_training:
            state.restore(checkpoint, path, global_batch, world.device)
        else:
            if "model_ema" not in checkpoint:
                state.model_ema = None
            load_model_and_ema(state.model, state.model_ema, checkpoint, path)
        return Start(path, bad_images=checkpoint.get("bad_images", []))
    notes = load_weights(state.model, finetune, "--finetune") if finetune else []
    if not is_training:
        state.model_ema = None
    elif finetune and state.model_ema is not None:
        state.model_ema.set(state.model)
    return Start(notes=notes)


def find_newest(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run folder, None where there is none; damaged ones are said and set aside."""
    for path in checkpoint_files.candidates(folder / LAST):
        try:
            checkpoint_files.verify(path)
        except checkpoint_files.DamagedFile as error:
            aside = checkpoint_files.set_aside(path)
            print(f"damaged checkpoint: {error}; it is now {aside.name}", file=sys.stderr, flush=True)
        else:
            return path
    return None


def load(path: str, flag: str) -> dict:
    """A checkpoint of this program or of DeiT for `--resume`, from a file or an https URL.

    Raises:
        SystemExit: the file is missing, damaged, or not one of this program's.
    """
    path = local_file(path, flag)
    checkpoint = read(path, flag)
    if not isinstance(checkpoint, dict) or not is_weights(checkpoint.get("model")):
        raise SystemExit(f"error: {flag} {path} holds no weights under 'model'; it is not a checkpoint of this program")
    return checkpoint
