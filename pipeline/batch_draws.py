"""What is drawn for images that are augmented in batches, and the tables of random numbers that it is made of.

No global generator is used. What is drawn for an image depends on the seed, the epoch, the image and the number of its
copy alone: not on the batch, the order, the rank or the number of loader workers.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from pipeline.batch_augmentation import to_device_at_once
from utils import seed_of


class DrawTable:
    """Uniform numbers of each image in each epoch, and normal numbers of an epoch.

    Args:
        seed: of the run.
        num_images: of the training set.
        num_draws: uniform numbers of an image.
        num_noise: normal numbers of an epoch.
    """

    def __init__(self, seed: int, num_images: int, num_draws: int, num_noise: int):
        self.seed, self.num_images, self.num_draws, self.num_noise = seed, num_images, num_draws, num_noise
        self.epoch: int | None = None
        self.tables: dict[int, np.ndarray] = {}

    def rows(self, epoch: int, indices: np.ndarray, repeats: np.ndarray) -> np.ndarray:
        """The uniform numbers [B, num_draws], float32 in [0, 1), of copies `repeats` [B] of images `indices` [B]."""
        if epoch != self.epoch:
            self.epoch, self.tables = epoch, {}
        rows = np.empty((len(indices), self.num_draws), np.float32)
        for repeat in np.unique(repeats).tolist():
            if repeat not in self.tables:
                shape = (self.num_images, self.num_draws)
                self.tables[repeat] = self._generator("batch augment", epoch, repeat).random(shape, np.float32)
            is_repeat = repeats == repeat
            rows[is_repeat] = self.tables[repeat].take(indices[is_repeat], axis=0)
        return rows

    def noise(self, epoch: int) -> torch.Tensor:
        """Normal numbers [num_noise], float32, that fill the boxes erased in an epoch."""
        return torch.from_numpy(self._generator("batch noise", epoch).standard_normal(self.num_noise, np.float32))

    def _generator(self, purpose: str, *counters: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=seed_of(purpose, self.seed, *counters)))


class Sampling(NamedTuple):
    """Images of a batch that are sampled with one kernel.

    Attributes:
        rows: their places in the batch, [n].
        maps: from the pixels of the result to those of the cached image, or of its crop where all crops are shifts by
            pixels, [n, 2, 3].
        frames: from the pixels of the result to those of the crop before each layer's geometry, [n, L, 2, 3]; None =
            the policy has none.
        interpolation: "nearest", "bilinear" or "bicubic".
    """

    rows: torch.Tensor
    maps: torch.Tensor
    frames: torch.Tensor | None
    interpolation: str

    def split(self, size: int) -> "list[Sampling]":
        """The same in parts of at most `size` images."""
        rows, maps = self.rows.split(size), self.maps.split(size)
        frames = [None] * len(rows) if self.frames is None else self.frames.split(size)
        return [Sampling(*part, self.interpolation) for part in zip(rows, maps, frames, strict=True)]


class Layer(NamedTuple):
    """Operations on pixels, at most one an image.

    Attributes:
        rows: places in the batch, [n], of the images of the first operation, then of the second, ...
        strengths: [n].
        groups: names of the operations, and their numbers of images.
    """

    rows: torch.Tensor
    strengths: torch.Tensor
    groups: tuple[tuple[str, int], ...]


class Erasing(NamedTuple):
    """Boxes of the erased images.

    Attributes:
        rows: places of the images in the batch, [n].
        boxes: (yl, yh, xl, xh) in pixels, [n, max_count, 4].
        offsets: of each box in the table of normal numbers, [n, max_count].
    """

    rows: torch.Tensor
    boxes: torch.Tensor
    offsets: torch.Tensor


class BatchDraws(NamedTuple):
    """What happens to the images of a batch.

    Attributes:
        epoch: from 0.
        shifts: top and left of the crop in the padded image, and 1 for a flip, [B, 3]; None = all images are sampled.
        samplings: of the images that are not only shifted.
        layers: of the policy's operations on pixels.
        erasing: None = no image is erased.
    """

    epoch: int
    shifts: torch.Tensor | None
    samplings: tuple[Sampling, ...]
    layers: tuple[Layer, ...]
    erasing: Erasing | None

    def to(self, device: torch.device) -> "BatchDraws":
        """The same on a device; a GPU gets all of it by one copy, for which the host does not wait."""
        if device.type == "cpu":
            return self
        tensors: list[torch.Tensor] = []
        _replaced(self, tensors.append)
        moved = iter(to_device_at_once(tensors, device))
        return _replaced(self, lambda _: next(moved))


def _replaced(value, function: Callable[[torch.Tensor], torch.Tensor | None]):
    """Nested tuples with what a function makes of each tensor in them."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, tuple):
        parts = [_replaced(part, function) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value
