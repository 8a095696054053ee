"""What --grad-norms-every measures: how strongly each summand of the loss moves the weights."""

import math

import torch

from diversity import DiverseLoss
from engine import autocast
from training.checkpoint import TrainState
from training.log import RunLog
from utils import World


class GradientNorms:
    """Measures the gradient norms of the loss's summands on the first batch of an epoch; the main process does.

    The training is the same with or without it. `state.totals` gets the norms, so a run that resumes within the epoch
    logs them too.

    Args:
        every: epochs between measurements, of which the first and the last epoch have one; 0 = none.
        loss_fn: the loss, not DistributedDataParallel around it.
        state: of the run.
        num_epochs: of the run.
        log: for messages.
        amp_dtype: of the training's autocast.
    """

    def __init__(
        self, every: int, loss_fn: DiverseLoss, state: TrainState, num_epochs: int, log: RunLog, world: World,
        amp_dtype: torch.dtype | None,
    ):  # fmt: skip
        self.every, self.loss_fn, self.state, self.log = every, loss_fn, state, log
        self.last, self.world, self.amp_dtype = num_epochs - 1, world, amp_dtype

    def measure(self, batch: int, images: torch.Tensor, labels: torch.Tensor, draws):
        """Measure, if this is the first batch of an epoch that has its turn; before its forward pass."""
        epoch = self.state.epoch
        if batch or not self.every or not self.world.is_main or (epoch % self.every and epoch != self.last):
            return
        try:
            with autocast(self.world.device, self.amp_dtype):
                norms = self.loss_fn.gradient_norms(images, labels, draws)
        except torch.OutOfMemoryError:
            self.log.print(f"epoch {epoch}: gradient norms are not measured: the memory does not suffice")
            return
        norms = {name: norm.item() for name, norm in norms.items()}
        self.state.totals.gradient_norms = {name: norm for name, norm in norms.items() if math.isfinite(norm)}
        if missing := [name for name in norms if name not in self.state.totals.gradient_norms]:
            self.log.print(f"epoch {epoch}: gradient norms that are not finite are not logged: {', '.join(missing)}")

    def record(self) -> dict[str, float]:
        """The norms of this epoch, for its record."""
        return {f"gradnorm_{name}": norm for name, norm in self.state.totals.gradient_norms.items()}
