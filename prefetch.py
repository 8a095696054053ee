"""Batches that go to the device as bytes, one ahead of the step, and are normalised and randomly erased there."""

from collections.abc import Iterable

import torch
from timm.data.loader import PrefetchLoader
from timm.data.random_erasing import RandomErasing

from randomness import reseed


class SeededErasing(RandomErasing):
    """timm's random erasing, in place, of batches [B, S, S, 3]; what it draws follows from the batch's number alone.

    Args:
        seed: the run's.
        rank: of this process, so that no two erase alike.
        options: of timm's class.
    """

    def __init__(self, seed: int, rank: int, **options):
        super().__init__(**options)
        self.seed, self.rank = seed, rank
        self.start(0, 0)

    def start(self, epoch: int, batch: int):
        """Say which batch comes next; those after it are counted."""
        self.epoch, self.batch = epoch, batch

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        reseed("erasing", self.seed, self.rank, self.epoch, self.batch, device=images.device)
        self.batch += 1
        super().__call__(images.permute(0, 3, 1, 2))
        return images


class Prefetcher(PrefetchLoader):
    """timm's PrefetchLoader: images [B, S, S, 3] uint8 become [B, 3, S, S] float32, normalised, on a device.

    In memory they stay pixel by pixel, which torch calls channels_last. Mean and deviation are ImageNet's. A batch is
    sent while the one before it is used; on a GPU on a stream of its own.

    Args:
        loader: the batches; whatever it raises passes through.
        erasing: of training images; None = none.
    """

    def __init__(self, loader: Iterable, device: torch.device, erasing: SeededErasing | None = None):
        super().__init__(loader, device=device)
        self.mean, self.std = self.mean.flatten(), self.std.flatten()  # channels come last
        self.random_erasing = erasing

    def __iter__(self):
        for images, labels in super().__iter__():
            yield images.permute(0, 3, 1, 2), labels

    def over(self, batches: Iterable, epoch: int, first: int) -> "Prefetcher":
        """This, made to send the batches of an epoch from number `first` on."""
        self.loader = batches
        if self.random_erasing is not None:
            self.random_erasing.start(epoch, first)
        return self
