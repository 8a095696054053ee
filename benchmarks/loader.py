"""`benchmark.py loader`: how many images per second one core reads."""

import itertools
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from datasets import DataOptions, build_data
from pipeline.cached_loader import CachedLoader
from pipeline.images import Sample
from pipeline.transforms import build_transform
from reports.tables import print_rows
from training.build import options_of
from utils import World

from .measure import interleave

CPU = torch.device("cpu")
AS_IS, ALL, RESIZED = "DeiT's", "all three", "all three, resized copy"
ON_CPU, CACHED = "decode once, fast crop", "cached"
PARTS = {"decode once": "decode_once", "fast crop": "fast_crop", "bytes": "prefetcher"}
"""{name: option}; with bytes, normalisation and random erasing are left to the device."""
NUM_PHOTOGRAPHS, NUM_NAMES, SECONDS = 64, 16384, 5.0
NONE, EVERY = dict.fromkeys(PARTS.values(), False), dict.fromkeys(PARTS.values(), True)


def compare_loaders(own: Namespace, args: Namespace, world: World) -> dict:
    """Images per second of one core: as DeiT reads them, with each faster part alone, and with all of them.

    The last row has all loader processes together. Without a folder of images, random ones are read again and again.

    With --cache-images the rows are DeiT's, a run's on a CPU, and that of cached images: all three normalise and erase.
    """
    options = options_of(DataOptions, args)
    with tempfile.TemporaryDirectory() as folder:
        source = args.data_path or args.data_set
        if args.data_set == "IMNET" and not args.data_path:
            make_photographs(Path(folder))
            options = replace(options, data_path=folder)
            source = f"{NUM_PHOTOGRAPHS} random JPEG images of 500 x 375 pixels"
        modes = _modes(options, own.resized)
        reference = ON_CPU if CACHED in modes else ALL
        speeds = images_per_core(modes, own.steps or 8, own.rounds)
        all_workers, num_workers = images_of_all_workers(modes[reference])
    print(f"{source}, batch {args.batch_size}, medians of {own.rounds} rounds, one core\n")
    rows = {name: {"images_per_s": speed, "to_deits": speed / speeds[AS_IS]} for name, speed in speeds.items()}
    columns = {"images/s": ("images_per_s", "{:.1f}".format), "relative to DeiT's": ("to_deits", "{:.2f}".format)}
    if CACHED in modes:
        rows = {name: row | {"to_loader": speeds[name] / speeds[ON_CPU]} for name, row in rows.items()}
        columns["relative to the loader's"] = ("to_loader", "{:.2f}".format)
    rows[f"{reference}, {num_workers} processes"] = {"images_per_s": all_workers}
    return {"loaders": print_rows("loader", [*rows], rows.values(), columns)}


def _modes(options: DataOptions, resized: str) -> dict[str, DataOptions]:
    """The options of each row that is measured on one core; `resized` is the folder of a copy, or empty."""
    if options.cache_images != "none":
        uncached = replace(options, cache_images="none")
        return {
            AS_IS: replace(uncached, **NONE),
            ON_CPU: replace(uncached, **EVERY | {"prefetcher": False}),
            CACHED: options,
        }
    modes = {AS_IS: NONE} | {name: NONE | {part: True} for name, part in PARTS.items()} | {ALL: EVERY}
    if resized:
        modes[RESIZED] = EVERY | {"data_path": resized}
    return {name: replace(options, **mode) for name, mode in modes.items()}


def images_per_core(modes: dict[str, DataOptions], num_batches: int, rounds: int) -> dict[str, float]:
    """Images per second that one core reads in each mode (`AS_IS`: as DeiT does); medians of rounds in turns."""
    readers = {}
    for name, options in modes.items():
        if options.cache_images == "none":  # otherwise the workers only fill the cache
            options = replace(options, num_workers=0)
        batches = endless(train_loader(options, as_is=name == AS_IS))
        readers[name] = lambda batches=batches: read(batches, num_batches)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = interleave(readers, rounds, CPU)
    torch.set_num_threads(num_threads)
    return {name: num_batches * options.batch_size / seconds[name] for name, options in modes.items()}


def images_of_all_workers(options: DataOptions) -> tuple[float, int]:
    """Images per second that the loader processes of a run deliver together, over `SECONDS`; their number.

    The first batches are not counted: they were read while the processes started.
    """
    loader = train_loader(options)
    batches = endless(loader)
    read(batches, max(1, loader.num_workers) * (loader.prefetch_factor or 1))
    num_images, start = 0, time.perf_counter()
    while time.perf_counter() < start + SECONDS:
        num_images += read(batches, 1)
    return num_images / (time.perf_counter() - start), loader.num_workers


def train_loader(options: DataOptions, as_is: bool = False) -> DataLoader | CachedLoader:
    """The training loader of a run in one process, or one of the same batches that reads as DeiT does."""
    loader = build_data(options, World(0, 1, 0, 1, CPU)).train
    images = AsIs(loader.dataset.source, build_transform(options, is_training=True))
    return DataLoader(images, batch_sampler=loader.batch_sampler) if as_is else loader


def endless(loader: DataLoader | CachedLoader) -> Iterator:
    """Its batches, epoch after epoch."""
    for epoch in itertools.count():
        loader.batch_sampler.start(epoch)
        yield from loader


def read(batches: Iterator, count: int) -> int:
    """Read `count` batches; the number of their images."""
    return sum(len(next(batches)[0]) for _ in range(count))


class AsIs(Dataset):
    """Images as DeiT reads them: decoded by the data set itself, once for each augmentation, unseeded."""

    def __init__(self, source: Dataset, transform):
        self.source, self.transform = source, transform

    def __getitem__(self, sample: Sample):
        image, label = self.source[sample.index]
        return self.transform(image if image.mode == "RGB" else image.convert("RGB")), label


def make_photographs(root: Path):
    """A folder of random JPEG images, root/{train,val}/{cat,dog}/NUMBER.jpg, of the mean size of ImageNet's.

    Smooth colours under noise, 500 x 375 pixels and about 100 KB each. The `NUM_NAMES` training images are links to
    `NUM_PHOTOGRAPHS` files, so that an epoch takes longer than the measurement.
    """
    random = np.random.RandomState(0)
    for name in ("train/cat", "train/dog", "val/cat", "val/dog"):
        (root / name).mkdir(parents=True)
    for number in range(NUM_PHOTOGRAPHS):
        coarse = Image.fromarray(random.randint(0, 256, (12, 16, 3), dtype=np.uint8)).resize((500, 375), Image.BICUBIC)
        noise = random.randint(0, 50, (375, 500, 3))
        Image.fromarray((0.8 * np.asarray(coarse) + noise).astype(np.uint8)).save(root / f"{number}.jpg", quality=92)
    for number in range(NUM_NAMES):
        for split in ("train", "val") if number < 2 else ("train",):
            link = root / split / ("cat", "dog")[number % 2] / f"{number}.jpg"
            link.symlink_to((root / f"{number % NUM_PHOTOGRAPHS}.jpg").resolve())
