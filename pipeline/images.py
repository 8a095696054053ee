"""Reading images: what can be read becomes RGB, what cannot is counted and replaced by the next image."""

import itertools
import multiprocessing
import sys
from collections.abc import Callable, Iterable
from typing import BinaryIO, NamedTuple

import numpy as np
import timm.data
import torch
from PIL import Image
from torch.utils.data import Dataset

from pipeline.sources import image_name
from pipeline.workers import TOO_MANY_FILES
from utils import BadImageError, reseed


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
    """The images of a source with transforms applied; an unreadable one is said, counted and replaced by the next.

    The pixels of a `Sample` follow from it and the seed alone, whichever worker reads it and whatever was read before.
    A replacement has its own label and is augmented with the seed of the sample it stands for. A plain index, as in
    validation, seeds nothing. An image that follows itself in a batch is decoded once, with the same pixels.

    Args:
        source: map-style data set of (PIL image, label), without transforms.
        transform: PIL image, which it must leave as it is -> tensor. What it raises is a bug, not a bad image.
        max_bad: distinct unreadable images that are replaced; the next one raises `BadImageError`.
        seed: the run's.
        decode_once: False decodes an image for each of its augmentations.
    """

    def __init__(self, source: Dataset, transform: Callable, max_bad: int, seed: int = 0, *, decode_once: bool = True):
        self.source = source
        self.transform = transform
        self.max_bad = max_bad
        self.seed = seed
        self.decode_once = decode_once
        self.is_bad = torch.zeros(len(source), dtype=torch.uint8).share_memory_()  # one for all loader workers
        self.lock = multiprocessing.Lock()

    @property
    def num_bad(self) -> int:
        """Distinct unreadable images this process and its workers have met, or were told of."""
        return int(self.is_bad.count_nonzero())

    def bad_indices(self) -> list[int]:
        """The images that `num_bad` counts, for a checkpoint."""
        return self.is_bad.nonzero().flatten().tolist()

    def mark_bad(self, indices: Iterable[int]):
        """Count these images as unreadable; they are replaced without another try, and nothing is said."""
        for index in indices:
            if not 0 <= index < len(self):
                raise ValueError(f"image {index} was unreadable, but the data set has {len(self)} images")
            self.is_bad[index] = 1

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
        """The items of samples that are all of the image at `index`."""
        image, label = self._read_from(index)
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
                if getattr(error, "errno", None) in TOO_MANY_FILES:
                    raise  # not the image's fault
                self._report(candidate, str(error) or type(error).__name__)
        raise BadImageError(f"none of the {len(self)} images can be read")

    def _read(self, index: int) -> tuple[Image.Image, int]:
        if hasattr(self.source, "samples"):  # torchvision's folders would read them as RGB, with less care
            path, label = self.source.samples[index]
            return read_rgb(open(path, "rb")), label
        if isinstance(self.source, timm.data.ImageDataset):  # would skip unreadable images in silence
            file, label = self.source.reader[index]
            return read_rgb(file), label
        image, label = self.source[index]
        with image:
            return to_rgb(image), label

    def _report(self, index: int, reason: str):
        with self.lock:
            is_new = not self.is_bad[index]
            number = self.num_bad + is_new
            if number <= self.max_bad:
                self.is_bad[index] = 1
        message = " ".join(f"unreadable image {image_name(self.source, index)}: {reason}".split())
        if number > self.max_bad:
            raise BadImageError(f"{message} (number {number}; {self.max_bad} may be replaced)") from None
        if is_new:
            sys.stderr.write(f"{message}; replaced by the next one\n")  # in one piece, as other workers write too
            sys.stderr.flush()


def _index(sample: int | Sample) -> int:
    return sample.index if isinstance(sample, Sample) else sample


def read_rgb(file: BinaryIO) -> Image.Image:
    """Decode an image file to RGB by `to_rgb`, and close it."""
    with file, Image.open(file) as image:
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB of 8 bits: its first frame, without alpha, the pixels as they are stored.

    An EXIF rotation is not applied, as in DeiT, timm and torchvision. Grey of more than 8 bits, which PIL would cut off
    at 255, is scaled: mode "I" is taken for 16 bits, and "F" for the smallest of 0..1, 0..255 and 0..65535 that holds
    the image.

    Raises:
        ValueError: more pixels than PIL's `Image.MAX_IMAGE_PIXELS` (a decompression bomb), or values out of range.
    """
    num_pixels = image.width * image.height
    if Image.MAX_IMAGE_PIXELS and num_pixels > Image.MAX_IMAGE_PIXELS:  # PIL itself only warns up to twice as many
        raise ValueError(f"it has {num_pixels} pixels, more than {Image.MAX_IMAGE_PIXELS}: a decompression bomb?")
    image.load()
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = Image.fromarray(_to_8_bits(np.asarray(image)))
    image.info.pop("transparency", None)  # only alpha would use it, and PIL warns of it in palettes
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bits(grey: np.ndarray) -> np.ndarray:
    """Scale so that white stays white and an 8-bit image that was stored as 16 bits keeps its values."""
    whites = (1, 255, 65535) if grey.dtype.kind == "f" else (65535,)
    low, high = grey.min(), grey.max()
    white = next((white for white in whites if 0 <= low <= high <= white), None)
    if white is None:
        raise ValueError(f"its grey values {low}..{high} lie outside 0..65535")
    return np.rint(grey.astype(np.float64) * (255 / white)).astype(np.uint8)
