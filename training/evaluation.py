"""What a run measures after an epoch: accuracies of the weights and of their average, and redundancy."""

import dataclasses
from collections.abc import Callable

import torch
from timm.utils import ModelEmaV3
from torch import nn

from diversity import measurable, measure_redundancy
from engine import evaluate
from pipeline.run_data import Data
from training.log import RunLog
from training.predictions import Predictions
from utils import World, errors_of

REDUNDANCY_IMAGES = 64


def evaluate_both(
    model: nn.Module,
    model_ema: ModelEmaV3 | None,
    data: Data,
    world: World,
    amp_dtype: torch.dtype | None = None,
    after_batch: Callable[[], None] = lambda: None,
    predictions: Predictions | None = None,
) -> dict[str, float]:
    """`engine.evaluate` of the raw weights and, with `_ema` appended to its names, of their average.

    The values are the same on all processes: the main one's where each evaluates all images. All processes get the
    buffers of the main one, which are those that it saves: running statistics are of the images of a process.
    `predictions` has those of this evaluation alone.

    Raises:
        SystemExit: a validation image cannot be read.
    """
    among = world if data.val_is_shared else dataclasses.replace(world, size=1)
    average = None if model_ema is None else model_ema.module
    if predictions is not None:
        predictions.clear()
    for module in filter(None, (model, average)):
        world.copy_from_main(module.buffers())
    common = data.common_val_batches(among)
    stats = evaluate(model, data.val, among, amp_dtype, after_batch, common, average, predictions)
    if stats["images"] != data.num_val:
        raise SystemExit(f"error: {data.num_val - stats['images']} of {data.num_val} validation images are unreadable")
    return stats if data.val_is_shared else world.from_main(stats)


class RedundancyMonitor:
    """Measures the redundancy of a model in training on the first validation images.

    Args:
        every: epochs between measurements, which the last epoch has too; 0 = none.
        name: of the model, for messages.
        draw: a matplotlib figure for TensorBoard, from the epoch and the report of `measure_redundancy`.

    Raises:
        SystemExit: the model cannot be measured.
    """

    def __init__(self, every: int, model: nn.Module, name: str, data: Data, world: World, draw: Callable):
        self.every, self.model, self.draw, self.batch, self.num_classes = every, model, draw, None, data.num_classes
        if every:
            with errors_of(f"--redundancy-every cannot measure --model {name}:"):
                measurable(model)
            if world.is_main:
                self.batch = tuple(part.to(world.device) for part in data.first_val_batch(REDUNDANCY_IMAGES))

    def measure(self, epoch: int, is_last: bool, log: RunLog, step: int) -> dict[str, float]:
        """Means over the layers of what analyze.py measures, for the epoch's record; `log` gets a figure of them."""
        if self.batch is None or not ((epoch + 1) % self.every == 0 or is_last):
            return {}
        try:
            report = measure_redundancy(self.model, [self.batch], self.num_classes)
        except ValueError as error:
            log.print(f"epoch {epoch}: redundancy is not measured: {error}")
            return {}
        log.figure("redundancy/by_depth", lambda: self.draw(epoch, report), step)
        measures = {f"redundancy_{name}": value for name, value in report["summary"].items()}
        return measures | {"redundancy_images": report["images"]}
