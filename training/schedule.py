"""The learning rate of each epoch: timm's schedule, set after each epoch as DeiT does, and the cool-down."""

from collections.abc import Sequence

import torch
from timm.scheduler import PlateauLRScheduler
from timm.scheduler.scheduler import Scheduler


def scale_of(group: dict) -> float:
    """The factor of the learning rate of a group of parameters, such as timm's groups of layers have."""
    return group.get("lr_scale", 1.0)


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """ "lr", the largest rate of the groups of parameters, and "lr_min", the smallest one, if the groups are scaled."""
    rates = [group["lr"] for group in optimizer.param_groups]
    is_scaled = any(scale_of(group) != 1 for group in optimizer.param_groups)
    return {"lr": max(rates)} | ({"lr_min": min(rates)} if is_scaled else {})


def layer_rates_line(optimizer: torch.optim.Optimizer, layer_decay: float | None, lr: float) -> str:
    """The range of layer-wise learning rates, for the log; empty where all layers have one rate.

    Args:
        layer_decay: the factor from each layer to the one before it.
        lr: `--lr`, scaled to the global batch.
    """
    scales = sorted({scale_of(group) for group in optimizer.param_groups})
    if scales == [1]:
        return ""
    return (
        f"layer-wise learning rates: --layer-decay {layer_decay:g}, {len(scales)} layers with {scales[0]:.3g} to "
        f"{scales[-1]:.3g} times the rate of the schedule, which is {lr:g} at most"
    )


class Schedule:
    """Sets the learning rate of each epoch, one rate for all of its steps.

    Epoch 0 has the first rate of timm's schedule, the epoch after epoch t has its rate at t, and the cool-down has
    `min_lr`. A rate depends on the number of the epoch only; with plateau, on the accuracies of the epochs before it
    too. They are the state of a schedule, from which a resumed run computes the rate again. Each rate is multiplied by
    the factor of a group of parameters, its `lr_scale`, if it has one.

    Args:
        scheduler: timm's schedule of the optimizer, which has not been stepped.
        epochs: of timm's schedule.
        cooldown_epochs: after these.
        min_lr: learning rate of the cool-down.
    """

    def __init__(self, scheduler: Scheduler, epochs: int, cooldown_epochs: int = 0, min_lr: float = 0.0):
        self.scheduler, self.epochs, self.min_lr = scheduler, epochs, min_lr
        self.num_epochs = epochs + cooldown_epochs
        if isinstance(scheduler, PlateauLRScheduler):
            if scheduler.warmup_t == 0:
                scheduler.warmup_t = -1  # otherwise timm sets the first rate of the warm-up after epoch 0, and keeps it
            plateau, groups = scheduler.lr_scheduler, scheduler.optimizer.param_groups
            plateau.min_lrs = [low * scale_of(group) for low, group in zip(plateau.min_lrs, groups, strict=True)]
            plateau.eps = 0  # a smaller change too is a change, of the small rate of a first layer
        self.first = [group["lr"] for group in scheduler.optimizer.param_groups]
        self.accuracies: list[float | None] = []

    def step(self, accuracy: float | None = None):
        """Set the rate of the next epoch; `accuracy`, the same on all processes, is that of the epoch before it."""
        epoch = len(self.accuracies)
        self.accuracies.append(accuracy)
        self.scheduler.step(epoch, accuracy)
        if epoch + 1 >= self.epochs:
            self.scheduler.update_groups(self.min_lr)

    def start(self, epoch: int, accuracies: Sequence[float | None] | None = None):
        """Set the rate of an epoch, in a process that has trained none.

        Args:
            accuracies: of the epochs before it; None = unknown.
        """
        assert not self.accuracies
        for group, lr in zip(self.scheduler.optimizer.param_groups, self.first, strict=True):
            group["lr"] = lr
        for accuracy in accuracies or [None] * epoch:
            self.step(accuracy)

    def state_dict(self) -> dict:
        return {"accuracies": list(self.accuracies)}

    def load_state_dict(self, state: dict, epoch: int):
        """Continue in `epoch` from what `state_dict` returned, or from another program's state, which is not read.

        Raises:
            ValueError: plateau needs accuracies that the state does not contain.
        """
        accuracies = state.get("accuracies")
        if accuracies is None and epoch and isinstance(self.scheduler, PlateauLRScheduler):
            raise ValueError("does not contain the accuracies of its epochs, which --sched plateau needs")
        self.start(epoch, accuracies)
