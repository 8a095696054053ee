"""Decoded images of one size become batches of training samples, on any device: DeiT's augmentation, batch by batch.

Crop, flip and the policy's geometry are one affine map and one sampling of each image, or none where an image is only
shifted by pixels. The policy's operations on pixels follow, each for all images that drew it, then normalisation and
erasing. So an image differs from the one that a loader makes: operations on pixels come after all geometry; what a
crop makes smaller is not smoothed before; and values between pixels are computed once, and rounded where Pillow cuts
them.
"""

from collections.abc import Sequence
from itertools import chain, product

import numpy as np
import torch
from torch.nn import functional as F

from pipeline import batch_geometry
from pipeline.batch_augmentation import BatchErasing, Normalize, to_device
from pipeline.batch_boxes import BOX_DRAWS, resized_crops
from pipeline.batch_draws import BatchDraws, DrawTable, Erasing, Layer, Sampling
from pipeline.batch_ops import PIXEL_OPS
from pipeline.batch_policies import GEOMETRY, OPERATIONS, Choice, build_policy
from pipeline.images import Sample
from pipeline.transforms import SMALL, TransformOptions

PADDING = 4  # pixels around an image up to 32 px, as DeiT has it for CIFAR
LEAST_NOISE = 1 << 20
SAMPLED_AT_ONCE = 1 << 18  # values that a CPU samples together; with more it waits for memory


class BatchTransform:
    """Draws what happens to the images of a batch, and does it.

    Args:
        options: as for the transforms of single images.
        seed: of the run.
        num_images: of the training set.
        cache_size: side of the cached images in pixels. They are squares, however the files' images are.

    Raises:
        SystemExit: a policy that is not applied to batches.
    """

    def __init__(self, options: TransformOptions, seed: int, num_images: int, cache_size: int):
        self.options, self.cache_size = options, cache_size
        self.size = size = options.input_size
        self.is_small = size <= SMALL
        self.only_shifts = self.is_small and cache_size == size
        self.policy = build_policy(options.aa, options.color_jitter, size)
        self.fill = [min(255, round(255 * value)) for value in options.mean] if self.policy.fills_with_mean else [0] * 3
        is_random = options.train_interpolation == "random"
        self.kernels = ("bilinear", "bicubic") if is_random else (options.train_interpolation,)
        self.erasing = BatchErasing(options.reprob, options.remode, options.recount) if options.reprob else None
        self.normalize = Normalize(options.mean, options.std)
        self.noise: tuple[int, torch.Tensor] | None = None  # of the latest epoch
        num_crop = 2 if self.is_small else BOX_DRAWS
        num_erasing = self.erasing.num_draws + options.recount if self.erasing else 0
        ends = np.cumsum([num_crop, 1, 1, self.policy.num_draws, num_erasing])
        self.parts = ends[:-1]
        self.table = DrawTable(seed, num_images, ends[-1], max(LEAST_NOISE, 8 * size * size))

    def draw(self, samples: Sequence[Sample], sizes: np.ndarray) -> BatchDraws:
        """What happens to the images of one epoch's samples; it depends on the seed and each sample alone.

        Args:
            sizes: height and width of the files' images in pixels, [B, 2]; up to 32 px of input they do not matter.
        """
        numbers = np.fromiter(chain.from_iterable(samples), np.int64, 3 * len(samples))
        indices, epochs, repeats = numbers.reshape(-1, 3).T
        assert (epochs == epochs[0]).all(), "samples of several epochs in one batch"
        uniforms = self.table.rows(epochs[0], indices, repeats)
        of_crop, of_flip, of_kernel, of_policy, of_erasing = np.split(uniforms, self.parts, axis=1)
        choice = self.policy.choose(of_policy.astype(np.float64))
        is_flipped = of_flip[:, 0] < self.options.hflip
        if self.is_small:
            corners = (of_crop * (2 * PADDING + 1)).astype(np.int64)
            boxes = np.concatenate((corners - PADDING, np.full_like(corners, self.size)), axis=1) / self.size
            shifts = torch.from_numpy(np.column_stack((corners, is_flipped))) if self.only_shifts else None
        else:
            boxes = resized_crops(of_crop, sizes, self.options.scale, self.options.ratio) / np.tile(sizes, 2)
            shifts = None
        kernels = (of_kernel[:, 0] * len(self.kernels)).astype(np.int64)
        samplings = self._samplings(boxes.astype(np.float32) * self.cache_size, is_flipped, kernels, choice)
        return BatchDraws(int(epochs[0]), shifts, samplings, _pixel_layers(choice), self._draw_erasing(of_erasing))

    def _samplings(
        self, boxes: np.ndarray, is_flipped: np.ndarray, kernels: np.ndarray, choice: Choice
    ) -> tuple[Sampling, ...]:
        """Of boxes [B, 4] (top, left, height, width) in pixels of the cached images."""
        operations, strengths = (np.ascontiguousarray(values.T) for values in choice)
        is_moved = (operations > 0) & (operations <= len(GEOMETRY))
        layers, has_geometry = is_moved.any(axis=1), is_moved.any(axis=0)
        if self.only_shifts:
            maps = batch_geometry.identity(len(boxes))
        else:
            maps = batch_geometry.crop(*torch.from_numpy(boxes).unbind(1), self.size)
            maps = batch_geometry.compose(maps, batch_geometry.flip(torch.from_numpy(is_flipped), self.size))
        steps = [maps]  # from the result to the image, then to what each layer's geometry changes
        for moves in self._moves(operations[layers], strengths[layers]).unbind():
            steps = [*(batch_geometry.compose(step, moves) for step in steps), moves]
        maps = torch.stack(steps, dim=1)
        groups = (True,) if self.only_shifts else (False, True)  # whether the policy moves an image
        samplings = []
        for (kernel, interpolation), is_of_group in product(enumerate(self.kernels), groups):
            rows = torch.from_numpy(np.flatnonzero((has_geometry == is_of_group) & (kernels == kernel)))
            if len(rows):
                frames = maps[rows, 1:] if is_of_group else None
                samplings.append(Sampling(rows, maps[rows, 0], frames, interpolation))
        return tuple(samplings)

    def _moves(self, operations: np.ndarray, strengths: np.ndarray) -> torch.Tensor:
        """The maps [L, B, 2, 3] of operations [L, B]; that of an operation on pixels changes nothing."""
        levels = (torch.from_numpy(np.where(operations == OPERATIONS.index(name), strengths, 0)) for name in GEOMETRY)
        return batch_geometry.move(*levels, self.size)

    def _draw_erasing(self, uniforms: np.ndarray) -> Erasing | None:
        if self.erasing is None:
            return None
        count = self.erasing.max_count
        boxes = self.erasing.boxes(uniforms[:, count:], (self.size, self.size))
        rows = np.flatnonzero((boxes[:, :, 1] > boxes[:, :, 0]).any(axis=1))
        offsets = (uniforms[rows, :count] * (self.table.num_noise - self._noise_of_box + 1)).astype(np.int64)
        return Erasing(*map(torch.from_numpy, (rows, boxes[rows], offsets))) if len(rows) else None

    def __call__(self, images: torch.Tensor, draws: BatchDraws) -> torch.Tensor:
        """Bytes [B, 3, C, C] -> normalised samples [B, 3, S, S] float32, with draws on the device of the images."""
        samples = self._cropped(images, draws)
        for layer in draws.layers:
            names, counts = zip(*layer.groups, strict=True)
            parts = zip(names, samples[layer.rows].split(counts), layer.strengths.split(counts), strict=True)
            samples[layer.rows] = torch.cat([PIXEL_OPS[name].apply(part, strength) for name, part, strength in parts])
        samples = self.normalize.to(images.device)(samples)
        if draws.erasing is not None:
            rows, boxes, offsets = draws.erasing
            samples[rows] = self.erasing.erase(samples[rows], boxes, self._fill(draws.epoch, offsets))
        return samples

    def _cropped(self, images: torch.Tensor, draws: BatchDraws) -> torch.Tensor:
        """The images under their crop, flip and geometry, [B, 3, S, S] bytes."""
        if draws.shifts is None:
            source, cropped = images, images.new_empty(len(images), 3, self.size, self.size)
        else:
            source = cropped = _shifted(images, draws.shifts)
        padding_mode = "zeros" if self.is_small and not self.only_shifts else "border"
        at_once = max(1, SAMPLED_AT_ONCE // source[0].numel()) if images.device.type == "cpu" else len(images)
        for rows, maps, frames, interpolation in chain.from_iterable(part.split(at_once) for part in draws.samplings):
            cropped[rows] = batch_geometry.sample(
                source[rows], maps, self.size, interpolation, frames, self.fill, padding_mode
            )
        return cropped

    @property
    def _noise_of_box(self) -> int:
        """Normal numbers that fill a box."""
        return {"pixel": 3 * self.size**2, "rand": 3, "const": 0}[self.options.remode]

    def _fill(self, epoch: int, offsets: torch.Tensor) -> torch.Tensor:
        """What fills boxes with offsets [n, M]: [n, M, 3, S, S], or [n, M, 3, 1, 1] for one colour."""
        if self.options.remode == "const":
            return torch.zeros(len(offsets), 1, 1, 1, 1, device=offsets.device)
        if self.noise is None or self.noise[0] != epoch or self.noise[1].device != offsets.device:
            self.noise = epoch, to_device(self.table.noise(epoch), offsets.device)
        fill = self.noise[1].unfold(0, self._noise_of_box, 1)[offsets]
        return fill.unflatten(2, (3, self.size, self.size) if self.options.remode == "pixel" else (3, 1, 1))


def _pixel_layers(choice: Choice) -> tuple[Layer, ...]:
    """The operations on pixels, image by image in their order; an image's first one is in the first layer."""
    on_pixels = choice.operations > len(GEOMETRY)
    numbers = on_pixels.cumsum(axis=1)  # of an image's operations on pixels, from 1
    layers = []
    for number in range(1, numbers.max(initial=0) + 1):
        rows, places = np.nonzero(on_pixels & (numbers == number))
        operations = choice.operations[rows, places].astype(np.uint8)
        order = np.argsort(operations, kind="stable")
        counts = np.bincount(operations).tolist()
        groups = tuple((OPERATIONS[kind], count) for kind, count in enumerate(counts) if count)
        strengths = choice.strengths[rows, places]
        layers.append(Layer(torch.from_numpy(rows[order]), torch.from_numpy(strengths[order]), groups))
    return tuple(layers)


def _shifted(images: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
    """Crops of the padded images, at shifts [B, 3] (top, left, is_flipped), flipped: one gather by index."""
    size = images.shape[-1]
    padded = F.pad(images, (PADDING,) * 4)
    top, left, is_flipped = shifts[:, :, None].unbind(1)
    pixels = torch.arange(size, device=images.device)
    rows, columns = top + pixels, left + torch.where(is_flipped > 0, size - 1 - pixels, pixels)
    index = rows[:, :, None] * padded.shape[-1] + columns[:, None]
    index = index.flatten(1)[:, None].expand(-1, images.shape[1], -1)
    return padded.flatten(2).gather(2, index).view_as(images)
