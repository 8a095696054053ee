"""What happens to a batch on its device: bytes are normalised, boxes erased, images mixed.

Random numbers are drawn on the host, with a seed from the batch's number, into two small tensors; the rest is tensor
operations, which compile into one kernel with the model's first cast.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from diversity import MixedTarget, PatchMixup
from diversity.mixing import in_box
from pipeline.batch_boxes import BOX_DRAWS, draw_boxes
from utils import reseed


class Normalize(nn.Module):
    """Bytes [B, 3, H, W] -> float32, less the mean, over the standard deviation; floats are left as they are.

    Args:
        mean, std: of the three colours, where the largest byte is 1; by default ImageNet's.
    """

    def __init__(self, mean: Sequence[float] = IMAGENET_DEFAULT_MEAN, std: Sequence[float] = IMAGENET_DEFAULT_STD):
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, 255 * torch.tensor(values)[:, None, None], persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().sub_(self.mean).div_(self.std) if images.dtype == torch.uint8 else images


class BatchErasing:
    """timm's RandomErasing (Zhong et al. 2017) for a whole batch of normalised images.

    Boxes are drawn as timm draws them, image by image; pixels are written at once.

    Args:
        probability: of an image to be erased at all.
        mode: what a box is filled with: "const", zeros; "rand", one normal colour per box; "pixel", normal noise.
        max_count: most boxes of an image, which divide the area among them.
    """

    AREAS = (0.02, 1 / 3)  # smallest and largest, as fractions of the image's
    LOG_ASPECTS = (math.log(0.3), -math.log(0.3))  # of height over width

    def __init__(self, probability: float, mode: str = "pixel", max_count: int = 1):
        assert mode in ("const", "rand", "pixel"), f"unknown mode {mode!r}"
        self.probability, self.mode, self.max_count = probability, mode, max_count
        self.num_draws = 2 + max_count * BOX_DRAWS

    def draw(self, batch: int, image_size: tuple[int, int]) -> torch.Tensor:
        """`boxes` of numbers from numpy's global generator."""
        return torch.from_numpy(self.boxes(np.random.rand(batch, self.num_draws), image_size))

    def boxes(self, uniforms: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
        """Boxes (yl, yh, xl, xh) in pixels, [B, max_count, 4] int32, from uniform numbers [B, num_draws].

        A box is empty where the image is not erased, or where all of ten drawn boxes were too large.
        """
        is_erased, count, of_boxes = np.split(uniforms, (1, 2), axis=1)
        count = 1 + (count * self.max_count).astype(np.int64)
        is_drawn = (is_erased < self.probability) & (np.arange(self.max_count) < count)
        boxes = np.zeros((*is_drawn.shape, 4), np.int32)
        sides = np.broadcast_to(np.array(image_size), (is_drawn.sum(), 2))
        area = np.prod(image_size) / np.broadcast_to(count, is_drawn.shape)[is_drawn]
        of_boxes = of_boxes.reshape(*is_drawn.shape, BOX_DRAWS)[is_drawn]
        drawn = draw_boxes(of_boxes, area[:, None] * np.array(self.AREAS), self.LOG_ASPECTS, sides - 1, sides)
        (top, left), (height, width) = drawn[:, :2].T, drawn[:, 2:].T
        boxes[is_drawn] = np.stack((top, top + height, left, left + width), axis=1)
        return boxes

    def draw_fill(self, images: torch.Tensor) -> torch.Tensor:
        """What fills the boxes of images [B, 3, H, W]: broadcastable to [B, max_count, 3, H, W]."""
        batch, channels, height, width = images.shape
        device = images.device
        if self.mode == "pixel":  # in the order of the bytes in memory, and no finer than the model's input
            autocast = torch.is_autocast_enabled(device.type)
            dtype = torch.get_autocast_dtype(device.type) if autocast else torch.float32
            noise = torch.randn(batch, 1, height, width, channels, dtype=dtype, device=device)
            return noise.permute(0, 1, 4, 2, 3)
        if self.mode == "rand":
            return torch.randn(batch, self.max_count, channels, 1, 1, device=device)
        return torch.zeros(batch, 1, 1, 1, 1, device=device)

    def erase(self, samples: torch.Tensor, boxes: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
        """Samples [B, 3, H, W] with boxes [B, max_count, 4] filled; a later box covers an earlier one."""
        fills = fill.expand(-1, self.max_count, -1, -1, -1)
        for box, content in zip(boxes.unbind(1), fills.unbind(1), strict=True):
            samples = torch.where(in_box(box, tuple(samples.shape[-2:])), content, samples)
        return samples


class Draws(NamedTuple):
    """The random numbers of a batch.

    Attributes:
        mixing: of `PatchMixup.draw`.
        boxes: of `BatchErasing.draw`; None = nothing is erased.
    """

    mixing: torch.Tensor | None = None
    boxes: torch.Tensor | None = None


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on a device; on a GPU through page-locked memory, so that the host does not wait."""
    if device.type == "cuda":
        tensor = torch.empty_like(tensor, pin_memory=True).copy_(tensor)
    return tensor.to(device, non_blocking=True)


def to_device_at_once(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """`to_device` of many small tensors, at least one, as one copy of their bytes; the results are contiguous."""
    # The largest elements come first, so that each tensor begins at a multiple of the size of its elements.
    order = sorted(range(len(tensors)), key=lambda place: -tensors[place].element_size())
    # Copies, as a tensor of one element may have a stride with which it has no view as bytes.
    copies = (tensors[place].clone(memory_format=torch.contiguous_format) for place in order)
    packed = [copy.view(-1).view(torch.uint8) for copy in copies]
    parts = to_device(torch.cat(packed), device).split([len(part) for part in packed])
    moved = {place: part.view(tensors[place].dtype) for place, part in zip(order, parts, strict=True)}
    return [moved[place].view(tensor.shape) for place, tensor in enumerate(tensors)]


class BatchAugmentation(nn.Module):
    """Normalises, erases and mixes a batch where it is.

    Args:
        mixup: None = labels stay plain.
        erasing: None = nothing is erased.
        memory_format: of the samples.
        normalize: None = with ImageNet's mean and standard deviation.
    """

    def __init__(
        self,
        mixup: PatchMixup | None = None,
        erasing: BatchErasing | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
        normalize: Normalize | None = None,
    ):
        super().__init__()
        self.normalize = normalize or Normalize()
        self.mixup = mixup or PatchMixup(0, 0)
        self.erasing = erasing
        self.memory_format = memory_format

    def with_grid(self, grid: tuple[int, int] | None) -> "BatchAugmentation":
        """This module, its mixup with the given grid unless it has one."""
        self.mixup = self.mixup.with_grid(grid)
        return self

    def draw(self, images: torch.Tensor, seed: int, rank: int, epoch: int, batch: int) -> Draws:
        """The draws for a batch of images [B, 3, H, W], on their device; they depend on the given numbers alone.

        Mixing is the same on all ranks, erasing is not. The host does not wait for the device.
        """
        count, image_size = len(images), tuple(images.shape[-2:])
        reseed("mixing", seed, epoch, batch)
        mixing, boxes = self.mixup.draw(count, image_size), None
        if self.erasing is not None:
            reseed("erasing", seed, rank, epoch, batch)
            boxes = self.erasing.draw(count, image_size)
        return Draws(*(None if drawn is None else to_device(drawn, images.device) for drawn in (mixing, boxes)))

    def forward(self, images: torch.Tensor, labels: torch.Tensor, draws: Draws) -> tuple[torch.Tensor, MixedTarget]:
        """Images [B, 3, H, W] and their labels [B] -> mixed samples in floating point, and their labels."""
        fill = None if draws.boxes is None else self.erasing.draw_fill(images)
        samples, partners = self._normalized(images, draws.boxes, fill), None
        if torch.compiler.is_compiling() and images.dtype == torch.uint8:
            # Made again from their bytes, so that one kernel reads bytes and writes the mixed samples.
            flipped = (None if tensor is None else tensor.flip(0) for tensor in (images, draws.boxes, fill))
            partners = self._normalized(*flipped)
        samples = self.mixup.mix(samples, draws.mixing, partners)
        if self.memory_format is not torch.preserve_format:  # else a compiled convolution writes them twice
            samples = samples.contiguous(memory_format=self.memory_format)
        return samples, self.mixup.target(samples, labels, draws.mixing)

    def _normalized(self, images, boxes, fill):
        samples = self.normalize(images)
        return samples if boxes is None else self.erasing.erase(samples, boxes, fill)
