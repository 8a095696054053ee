"""Reading images: what can be read becomes RGB, what cannot is counted and replaced by the next image."""

import errno
import itertools
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np
import timm.data
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from pipeline.holdout import complete, located
from utils import BadImageError, is_bug, reseed

TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)
UNREADABLE = (OSError, SyntaxError, Image.DecompressionBombError)  # of files that a user's data set reads


class Sample(NamedTuple):
    """What a training sampler yields: which image, and which of its augmentations.

    Attributes:
        index: place of the image in its source.
        epoch: from 0.
        repeat: number of the copy among those that repeated augmentation shows in an epoch.
    """

    index: int
    epoch: int
    repeat: int


class ReadableImages(Dataset):
    """The images of a source with transforms applied; an unreadable one is reported, counted and replaced by the next.

    The pixels of a `Sample` depend on it and the seed alone, not on the worker that reads it or on what was read
    before. A replacement has its own label and is augmented with the seed of the sample that it replaces. A plain
    index, as in validation, seeds nothing. An image that is repeated in a row is decoded once.

    Args:
        source: map-style data set of (PIL image, label), without transforms.
        transform: PIL image, which it must not change -> tensor. An error in it is a bug, not a bad image.
        max_bad: distinct unreadable images that may be replaced; the next one raises `BadImageError`.
        seed: of the run.
        decode_once: False = decode an image for each of its augmentations.
        labels: what the items have in place of the source's labels 0, 1, ...; empty = the source's.
    """

    def __init__(
        self,
        source: Dataset,
        transform: Callable,
        max_bad: int,
        seed: int = 0,
        *,
        decode_once: bool = True,
        labels: Sequence[int] = (),
    ):
        self.source = source
        self.transform = transform
        self.max_bad = max_bad
        self.seed = seed
        self.decode_once = decode_once
        self.labels = labels
        self.is_bad = torch.zeros(len(source), dtype=torch.uint8).share_memory_()  # one for all loader workers
        self.lock = multiprocessing.Lock()

    @property
    def num_bad(self) -> int:
        """Distinct unreadable images that this process and its workers have met."""
        return int(self.is_bad.count_nonzero())

    def __len__(self):
        return len(self.source)

    def __getitem__(self, sample: int | Sample) -> tuple[torch.Tensor, int]:
        return self._augmented(_index(sample), [sample])[0]

    def __getitems__(self, samples: list[int | Sample]) -> list[tuple[torch.Tensor, int]]:
        """The items of a batch, which torch's loader asks for at once."""
        if not self.decode_once:
            return [self[sample] for sample in samples]
        runs = itertools.groupby(samples, key=_index)
        return [item for index, copies in runs for item in self._augmented(index, copies)]

    def _augmented(self, index: int, samples: Iterable[int | Sample]) -> list[tuple[torch.Tensor, int]]:
        """The items of samples that all show the image at `index`."""
        image, label = self._read_from(index)
        label = self.labels[label] if self.labels else label
        items = []
        for sample in samples:
            if isinstance(sample, Sample):
                reseed("augmentation", self.seed, sample.epoch, sample.index, sample.repeat)
            items.append((self.transform(image), label))
        return items

    def _read_from(self, index: int) -> tuple[Image.Image, int]:
        """The image at `index`, or the first after it that can be read."""
        if index >= len(self):
            raise IndexError(f"image {index} of {len(self)}")
        for step in range(len(self)):
            candidate = (index + step) % len(self)
            if self.is_bad[candidate]:
                continue
            try:
                return self._read(candidate)
            except Exception as error:  # decoders raise anything
                self._report(candidate, self._line(candidate, error))
        raise BadImageError(f"none of the {len(self)} images can be read")

    def _read(self, index: int) -> tuple[Image.Image, int]:
        source, index = located(self.source, index)
        if hasattr(source, "samples"):  # torchvision's folders, which would convert 16-bit grey themselves
            path, label = source.samples[index]
            return read_rgb(open(path, "rb")), label
        if isinstance(source, timm.data.ImageDataset):  # it would skip unreadable images silently
            file, label = source.reader[index]
            return read_rgb(file), label
        image, label = source[index]
        with image:
            return to_rgb(image), label

    def problem(self, index: int) -> str:
        """A line that says why an image cannot be read; empty if it can."""
        try:
            self._read(index)
        except Exception as error:
            return self._line(index, error)
        return ""

    def _line(self, index: int, error: Exception) -> str:
        if getattr(error, "errno", None) in TOO_MANY_FILES:
            raise error  # the image is not the cause
        if not _has_files(complete(self.source)) and is_bug(error) and not isinstance(error, UNREADABLE):
            raise error  # nor here
        reason = str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):  # it has the file only as a Python object
            reason = "it has no known image format"
        return " ".join(f"unreadable image {image_name(self.source, index)}: {reason}".split())

    def _report(self, index: int, message: str):
        with self.lock:
            is_new = not self.is_bad[index]
            number = self.num_bad + is_new
            if number <= self.max_bad:
                self.is_bad[index] = 1
        if number > self.max_bad:
            budget = f"number {number}; {self.max_bad} may be replaced"
            raise BadImageError(f"{message} ({budget}); --check-data lists all of them") from None
        if is_new:
            sys.stderr.write(f"{message}; replaced by the next one\n")  # one write, as other workers write too
            sys.stderr.flush()


def _index(sample: int | Sample) -> int:
    return sample.index if isinstance(sample, Sample) else sample


def _has_files(source: Dataset) -> bool:
    """Whether this module itself decodes the images of a data set."""
    return hasattr(source, "samples") or isinstance(source, timm.data.ImageDataset)


def read_rgb(file: BinaryIO) -> Image.Image:
    """Decode an image file to RGB by `to_rgb`, and close it."""
    with file, Image.open(file) as image:
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB of 8 bits, by PIL; 16-bit grey, which PIL would cut off at 255, is scaled.

    An EXIF rotation is not applied, as in DeiT, timm and torchvision.
    """
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.asarray(image).clip(0, 65535)
        image = Image.fromarray(np.rint(grey / 257).astype(np.uint8))
    return image.convert("RGB")


def image_name(source: Dataset, index: int, relative: bool = False) -> str:
    """Path of an image, or its number where it has none; `relative` to the folder of the data set."""
    source, index = located(source, index)
    if hasattr(source, "samples"):
        path = source.samples[index][0]
        return os.path.relpath(path, source.root) if relative else path
    if isinstance(source, timm.data.ImageDataset):
        return str(source.filename(index))
    return f"number {index}"
