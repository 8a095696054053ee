"""The state of a run, and how it is restored from a checkpoint."""

import time
from dataclasses import dataclass, field

import torch
from timm.utils import ModelEmaV3
from torch import nn

from models.weights import load_state_dict
from training.meters import EpochTotals
from training.schedule import Schedule
from utils import World, errors_of

SETTINGS = {"weight_decay", "betas", "eps", "momentum", "initial_lr", "lr_scale", "fused"}  # of a group, by the flags
OPTIMIZER = "optimizer_name"  # the entry of a checkpoint that names the class
LAST = "checkpoint.pth"
BEST = {"acc1": "checkpoint_best.pth", "acc1_ema": "checkpoint_best_ema.pth"}


@dataclass
class TrainState:
    """Everything that changes while a run trains, and so everything that a resumed run needs.

    It has no random state: see utils.py. It is saved between optimizer steps, when no batch is accumulated.

    Attributes:
        model: the stock timm model, not its wrappers, so that files have timm's keys.
        optimizer, scheduler, loss_scaler: None in an evaluation.
        epoch: the epoch in training, or the next one.
        step: optimizer steps of this epoch that are done.
        totals: the sums of this epoch so far.
        skipped: steps of earlier epochs that were not finite.
        best: {"acc1": percent, "acc1_ema": percent}, the best so far.
        earlier_seconds: training time of the processes before this one.
        started: when this process started, by the monotonic clock.
    """

    model: nn.Module
    model_ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer | None = None
    scheduler: Schedule | None = None
    loss_scaler: torch.amp.GradScaler | None = None
    epoch: int = 0
    step: int = 0
    totals: EpochTotals = field(default_factory=EpochTotals)
    skipped: int = 0
    best: dict[str, float] = field(default_factory=dict)
    earlier_seconds: float = 0.0
    started: float = field(default_factory=time.monotonic)

    @property
    def num_parameters(self) -> int:
        """Of the model."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def seconds(self) -> float:
        """Training time of this run, that of earlier processes included."""
        return self.earlier_seconds + time.monotonic() - self.started

    def next_epoch(self, accuracies: dict[str, float]) -> list[str]:
        """Begin the next epoch; returns the keys of `BEST` whose value in `accuracies` is the best so far."""
        names = ["acc1"] if self.model_ema is None else list(BEST)
        improved = [name for name in names if accuracies[name] > self.best.get(name, -1.0)]
        self.best |= {name: accuracies[name] for name in improved}
        self.skipped += self.totals.skipped(self.step)
        self.epoch, self.step, self.totals = self.epoch + 1, 0, EpochTotals()
        return improved

    def state_dict(self, world: World) -> dict:
        """The content of a checkpoint, not yet copied; every process must call it."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            OPTIMIZER: type(self.optimizer).__name__,
            "lr_scheduler": self.scheduler.state_dict(),
            "scaler": self.loss_scaler.state_dict(),
            "epoch": self.epoch - 1,  # the finished one, as DeiT writes it
            "step": self.step,
            "totals": self.totals.state_dict(world),
            "skipped": self.skipped,
            "best": dict(self.best),
            "seconds": self.seconds,
        }
        if self.model_ema is not None:
            state["model_ema"] = self.model_ema.module.state_dict()
        return state

    def restore(self, checkpoint: dict, path: str, global_batch: int = 0, world: World | None = None):
        """Continue from a loaded checkpoint.pth, weights included.

        The schedule and the settings of the optimizer are those of the flags.

        Args:
            global_batch: images per optimizer step; within an epoch it must be the stored one.
            world: this process, whose means so far are restored.

        Raises:
            SystemExit: it belongs to another model, optimizer or global batch, or contains only weights.
        """
        step, stored_batch = checkpoint.get("step", 0), checkpoint.get("global_batch", global_batch)
        if step and stored_batch != global_batch:
            raise SystemExit(
                f"error: --resume {path} is within an epoch of {stored_batch} images per optimizer step, not "
                f"{global_batch}; keep processes x --batch-size x --accum-steps"
            )
        load_model_and_ema(self.model, self.model_ema, checkpoint, path)
        own, groups = type(self.optimizer).__name__, checkpoint["optimizer"]["param_groups"]
        lacks = {"betas", "momentum"} & self.optimizer.param_groups[0].keys() - groups[0].keys()
        stored = f"without {', '.join(sorted(lacks))}" if lacks else own  # by a file that does not name it, as DeiT's
        if (stored := checkpoint.get(OPTIMIZER, stored)) != own:
            line = f"was written with another optimizer, {stored}, not {own}; see --opt"
            raise SystemExit(f"error: --resume {path} {line}")
        for group, flags in zip(groups, self.optimizer.param_groups, strict=False):
            # An optimizer may add keys while it runs, and another version of it may have more: those of the flags count
            # only where the file has none. `fused` decides where state belongs.
            group.update({key: value for key, value in flags.items() if key in SETTINGS or key not in group})
        with errors_of(f"--resume {path} was written with another optimizer:"):
            self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.epoch, self.step = checkpoint["epoch"] + 1, step
        with errors_of(f"--resume {path}"):
            self.scheduler.load_state_dict(checkpoint["lr_scheduler"], self.epoch)
        if checkpoint["scaler"]:  # empty when the run so far did not scale its loss
            self.loss_scaler.load_state_dict(checkpoint["scaler"])
        if "totals" in checkpoint:
            self.totals.load_state_dict(checkpoint["totals"], world)
        self.skipped = checkpoint.get("skipped", 0)
        self.best = checkpoint.get("best", {})
        self.earlier_seconds = checkpoint.get("seconds", 0.0)


def load_model_and_ema(model: nn.Module, model_ema: ModelEmaV3 | None, checkpoint: dict, path: str):
    """Load the weights of a checkpoint; an average that it lacks starts from the raw weights.

    Raises:
        SystemExit: the weights do not fit the model.
    """
    with errors_of("--resume"):
        load_state_dict(model, checkpoint["model"], path)
        if model_ema is not None:
            load_state_dict(model_ema.module, checkpoint.get("model_ema", checkpoint["model"]), path)
