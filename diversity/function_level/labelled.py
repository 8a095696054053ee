"""Labelled images that are read several times, and the accuracy of a model on them."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

CHUNK = 128  # images that run through the model at a time


class Chunk(NamedTuple):
    """Some images in a row.

    Attributes:
        first: number of the first image, from 0.
        images: [B, 3, S, S].
        labels: [B], integer classes.
    """

    first: int
    images: torch.Tensor
    labels: torch.Tensor


class LabelledImages:
    """Batches of (images, labels) that can be read more than once, as chunks on a device.

    Args:
        batches: a list, a loader or any other object that starts again with each loop over it.
        num_classes: labels are 0 to num_classes - 1.
        device: where the model is.
        words: what they are, for messages.

    Raises:
        TypeError: `batches` can be read only once, or its items are not (images, labels).
        ValueError: a label that is not a class; or, once all were read, fewer than two images or classes.
    """

    def __init__(self, batches: Iterable, num_classes: int, device: torch.device, words: str):
        if iter(batches) is batches:
            raise TypeError(f"the {words} are read several times; give a list or a loader, not an iterator")
        self.batches, self.num_classes, self.device, self.words = batches, num_classes, device, words
        self.num_images = None  # once they were read

    def __iter__(self) -> Iterator[Chunk]:
        first, counts = 0, torch.zeros(self.num_classes, dtype=torch.long)
        for batch in self.batches:
            images, labels = self._checked(batch)
            counts += torch.bincount(labels, minlength=self.num_classes)
            for some, of_some in zip(images.split(CHUNK), labels.split(CHUNK), strict=True):
                if len(some):
                    yield Chunk(first, some.to(self.device), of_some.to(self.device))
                    first += len(some)
        if first < 2 or counts.count_nonzero() < 2:
            found = f"{first} image(s) of {int(counts.count_nonzero())} class(es)"
            raise ValueError(f"the {self.words} must be of two classes at least; got {found}; use more images")
        self.num_images = first

    def count(self) -> int:
        """How many images there are."""
        if self.num_images is None:
            for _ in self:
                pass
        return self.num_images

    def _checked(self, batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The images and, on the CPU, the labels of a batch."""
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise TypeError(f"the {self.words} need labels: batches of (images, labels)")
        images, labels = batch[0], batch[1].cpu()
        if labels.is_floating_point() or labels.shape != images.shape[:1]:
            raise ValueError(f"the {self.words} need one integer label for each image; got {tuple(labels.shape)}")
        if len(labels) and not 0 <= labels.min() <= labels.max() < self.num_classes:
            wrong = labels[(labels < 0) | (labels >= self.num_classes)][0]
            classes = f"the classes of the model are 0 to {self.num_classes - 1}"
            raise ValueError(f"the {self.words} have the label {wrong}, but {classes}")
        return images, labels.long()


def hits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """How many of the classified items [..., C] have their label [...] as the largest logit: 0-dim, float64.

    Raises:
        ValueError: a logit is not finite.
    """
    if not logits.isfinite().all():
        raise ValueError("the logits are not finite")
    return (logits.argmax(dim=-1) == labels).sum(dtype=torch.float64)


def percent(count: torch.Tensor, total: int):
    """Counts [...] as percentages of a total: a number or nested lists."""
    return (100 * count.double() / total).tolist()
