"""All images of a data set in memory: decoded once, as bytes of one size."""

import itertools
import sys
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from timm.data.transforms import str_to_interp_mode
from torch.utils.data import Dataset, Subset
from torchvision import transforms
from tqdm import tqdm

from pipeline.batch_augmentation import to_device
from pipeline.free_memory import free_bytes
from pipeline.images import ReadableImages
from pipeline.transforms import SMALL, pixels
from pipeline.workers import StoppableLoader
from utils import World

PLACES = ("none", "memory", "device")
BATCH = 64  # images that a loader process reads before it sends them
SHARED_ROWS = 1024  # images that a rank sends to the others at once


def side_of(cache_size: int | None, input_size: int) -> int:
    """The side in pixels of a cached training image.

    Args:
        cache_size: as a flag gives it; None = the input size up to 32 px, otherwise the resized side of DeiT's
            evaluation, such as 256 px for an input of 224.
    """
    return cache_size or (input_size if input_size <= SMALL else round(input_size / 0.875))


class Squeeze:
    """RGB image -> its bytes as a square, [3, C, C]; the aspect ratio is not kept.

    Args:
        size: side of the square in pixels, C.
        interpolation: of Pillow, with its antialiasing.
    """

    def __init__(self, size: int, interpolation: str):
        self.resize = transforms.Resize((size, size), interpolation=str_to_interp_mode(interpolation))

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return pixels(self.resize(image)).permute(2, 0, 1).contiguous()


class WithSize:
    """RGB image -> what a transform makes of it, and the height and width of the image."""

    def __init__(self, transform: Callable):
        self.transform = transform

    def __call__(self, image: Image.Image) -> tuple[torch.Tensor, tuple[int, int]]:
        return self.transform(image), (image.height, image.width)


class FloatPath(transforms.Normalize):
    """Bytes [B, 3, H, W] -> normalised float32, bit for bit as timm's transforms make it of one image."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images.contiguous().float().div(255))


class CachedImages(Dataset):
    """Images as rows of a tensor, and their labels. Batches are on the host or on the device, where the images are.

    Args:
        images: [N, ...] uint8.
        labels: [N] int64, on the CPU.
        sizes: height and width of each image before it was resized, [N, 2].
        read: what read them, of which the cache has the source and the numbers of the unreadable images.
        pin: whether batches on the host are page-locked.
    """

    def __init__(
        self, images: torch.Tensor, labels: torch.Tensor, sizes: np.ndarray, read: ReadableImages, pin: bool = False
    ):
        self.images, self.labels, self.sizes, self.pin = images, labels, sizes, pin
        self.source, self.is_bad = read.source, read.is_bad

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index], int(self.labels[index])

    def __getitems__(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch of these images [B, ...] and their labels [B]; for a loader that collates nothing."""
        rows = torch.from_numpy(np.asarray(indices))
        return _rows_of(self.images, rows, self.pin), _rows_of(self.labels, rows, self.pin)


def _rows_of(tensor: torch.Tensor, rows: torch.Tensor, pin: bool) -> torch.Tensor:
    if tensor.device.type == "cuda":
        return tensor.index_select(0, to_device(rows, tensor.device))
    batch = torch.empty(len(rows), *tensor.shape[1:], dtype=tensor.dtype, pin_memory=pin)
    return torch.index_select(tensor, 0, rows, out=batch)


def require_memory(place: str, world: World, train: tuple[int, int], val: tuple[int, int]) -> str:
    """Refuse a cache that does not fit; each process has all of it.

    Args:
        place: "memory" of the host, or "device".
        train, val: the number of images and the side of each in pixels.

    Returns:
        A line about the cache.

    Raises:
        SystemExit: it needs more bytes than are free.
    """
    num_bytes = sum(count * 3 * side**2 for count, side in (train, val))
    images = f"{train[0]:,} training images of {train[1]} px and {val[0]:,} validation images of {val[1]} px"
    on_gpu = place == "device" and world.device.type == "cuda"
    copies = 1 if on_gpu else world.local_size
    free = free_bytes(world.device if on_gpu else torch.device("cpu"))
    if free is not None and copies * num_bytes > free:
        of_each = f" in each of {copies} processes" if copies > 1 else ""
        owner, other = ("the GPU", "memory or ") if on_gpu else ("the memory", "")
        raise SystemExit(
            f"error: --cache-images {place} needs {num_bytes:,} bytes{of_each} for {images}, but {free:,} bytes of "
            f"{owner} are free; take --cache-images {other}none, or a smaller --cache-size"
        )
    return f"{images} are in {'device memory' if place == 'device' else 'memory'}: {num_bytes:,} bytes"


def cache_images(
    images: ReadableImages, shape: Sequence[int], world: World, place: str, settings: dict, pin: bool
) -> CachedImages:
    """Read all images once with loader processes; each rank reads a share, and all get all of them.

    Args:
        images: whose transform returns bytes [*shape]; it is replaced.
        place: "memory" of the host, or "device".
        settings: of `DataLoader`, about its processes.
        pin: whether batches on the host are page-locked.

    Raises:
        BadImageError: too many images cannot be read.
    """
    count = len(images)
    device = world.device if place == "device" else torch.device("cpu")
    cached = torch.empty(count, *shape, dtype=torch.uint8, device=device)
    labels, sizes = torch.empty(count, dtype=torch.int64), torch.empty(count, 2, dtype=torch.int64)
    bounds = [count * rank // world.size for rank in range(world.size + 1)]
    first, end = bounds[world.rank : world.rank + 2]
    images.transform = WithSize(images.transform)
    loader = StoppableLoader(Subset(images, range(first, end)), batch_size=BATCH, **settings)
    is_shown = world.is_main and sys.stderr.isatty()
    if world.is_main and not is_shown:
        print(f"reading {count:,} images once", file=sys.stderr, flush=True)
    with tqdm(desc="reading", total=end - first, unit=" images", leave=False, disable=not is_shown) as bar:
        for (pixels_of_batch, sizes_of_batch), labels_of_batch in loader:
            rows = slice(first, first + len(labels_of_batch))
            cached[rows], labels[rows] = pixels_of_batch, labels_of_batch
            sizes[rows] = torch.stack(sizes_of_batch, dim=1)
            first = rows.stop
            bar.update(len(labels_of_batch))
    for rank, (first, end) in enumerate(itertools.pairwise(bounds)):
        for tensor in (cached, labels, sizes):
            world.copy_from(rank, tensor[first:end].split(SHARED_ROWS))
    return CachedImages(cached, labels, sizes.numpy(), images, pin)
