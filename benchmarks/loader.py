"""`benchmark.py loader`: how fast images are read, and how long a run waits for them."""

import contextlib
import io
import itertools
import json
import multiprocessing
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import main
from datasets import Data, DataOptions, build_data
from pipeline.images import Sample
from pipeline.transforms import build_transform
from reports.tables import markdown_table
from training.build import options_of
from utils import World, init_world, keep_freed_memory

from .measure import interleave

AS_IS, ALL, RESIZED = "DeiT's", "all three", "all three, resized copy"
PARTS = {"decode once": "decode_once", "fast crop": "fast_crop", "bytes": "prefetcher"}
"""{name: flag}; with bytes, normalisation and random erasing are left to the device."""


class AsIs(Dataset):
    """Images as DeiT reads them: decoded by the data set itself and augmented, each for itself, unseeded."""

    def __init__(self, source: Dataset, transform: Callable):
        self.source, self.transform = source, transform

    def __getitem__(self, sample: Sample):
        image, label = self.source[sample.index]
        return self.transform(image), label


def compare_loaders(own: Namespace, args: Namespace, world: World) -> dict:
    """Images that one core reads per second in each mode, and how long short real runs wait for data.

    Args:
        own: `rounds`; `steps`, the batches of a round (None = 8); `resized`, a folder or empty.
        args: main.py's flags.
    """
    none, every = dict.fromkeys(PARTS.values(), False), dict.fromkeys(PARTS.values(), True)
    modes = {AS_IS: none} | {name: none | {flag: True} for name, flag in PARTS.items()} | {ALL: every}
    if own.resized:
        modes[RESIZED] = every | {"data_path": own.resized}
    flags = {name: Namespace(**vars(args) | mode) for name, mode in modes.items()}
    speeds = images_per_core(flags, own.steps or 8, own.rounds)
    loaders = {name: {"images_per_s": speed, "to_deits": speed / speeds[AS_IS]} for name, speed in speeds.items()}
    runs = {}
    for name, mode in (("no part", none), ("every part", every)):
        with new_process() as pool:
            runs[name] = pool.submit(short_run, Namespace(**vars(args) | mode)).result()
    print(f"{args.data_path or args.data_set}, batch {args.batch_size}, medians of {own.rounds} rounds, one core")
    columns = {
        "loader": [*loaders],
        "images/s per core": [f"{loader['images_per_s']:.1f}" for loader in loaders.values()],
        "times DeiT's": [f"{loader['to_deits']:.2f}" for loader in loaders.values()],
    }
    print(markdown_table(columns))
    for name, run in runs.items():
        waited = f"{100 * run['data_wait']:.1f} % of the time waiting for data"
        print(f"third epoch of {args.model} with {name}: {run['images_per_s']:.1f} images/s, {waited}")
    return {"loaders": loaders, "runs": runs}


def images_per_core(
    flags: dict[str, Namespace], num_batches: int, rounds: int, start_method: str = "spawn"
) -> dict[str, float]:
    """Images per second that a process on one core reads with each of these flags; medians of `rounds` in turns.

    Args:
        flags: main.py's, by name; those of the name `AS_IS` are read as DeiT does.
        num_batches: of a round.
        start_method: multiprocessing's.
    """
    with contextlib.ExitStack() as stack:
        pools = {name: stack.enter_context(new_process(start_method)) for name in flags}
        started = [pool.submit(_start_reading, flags[name], name == AS_IS) for name, pool in pools.items()]
        for start in started:
            start.result()
        readers = {name: lambda pool=pool: pool.submit(_read, num_batches).result() for name, pool in pools.items()}
        seconds = interleave(readers, rounds, torch.device("cpu"))
    return {name: num_batches * flags[name].batch_size / value for name, value in seconds.items()}


_reading: Iterator  # batches without end, in a process of `images_per_core`


def _start_reading(args: Namespace, as_is: bool):
    """Make `_reading`, in a process of one thread."""
    global _reading
    torch.set_num_threads(1)
    options = replace(options_of(DataOptions, args), num_workers=0)
    data = build_data(options, World(0, 1, 0, 1, torch.device("cpu")))
    loader = data.train
    if as_is:
        transform = build_transform(options, is_training=True)
        loader = DataLoader(AsIs(loader.dataset.source, transform), batch_sampler=loader.batch_sampler)
    else:
        keep_freed_memory()  # as main.py does
    _reading = _all_batches(data, loader)


def _all_batches(data: Data, loader: DataLoader) -> Iterator:
    for epoch in itertools.count():
        data.train.batch_sampler.start(epoch)
        yield from loader


def _read(num_batches: int):
    for _ in range(num_batches):
        next(_reading)


def new_process(start_method: str = "spawn") -> ProcessPoolExecutor:
    """A process that runs what it is given, and that shares nothing with this one unless it is forked."""
    return ProcessPoolExecutor(1, multiprocessing.get_context(start_method))


def images_of_all_workers(args: Namespace, seconds: float) -> float:
    """Images per second that the loader processes of a run deliver together, as many as --num-workers says.

    The first batches are not counted: they were read while the processes started.
    """
    data = build_data(options_of(DataOptions, args), World(0, 1, 0, 1, torch.device("cpu")))
    batches = _all_batches(data, data.train)
    for _ in range(max(1, data.train.num_workers) * (data.train.prefetch_factor or 1)):
        next(batches)
    images, start = 0, time.perf_counter()
    while time.perf_counter() < start + seconds:
        images += len(next(batches)[0])
    return images / (time.perf_counter() - start)


def make_photographs(root: Path, num_photographs: int, num_names: int):
    """A folder of random JPEG images, root/{train,val}/{cat,dog}/NUMBER.jpg, of the mean size of ImageNet's.

    Smooth colours under noise, 500 x 375 pixels and about 100 KB each.

    Args:
        num_photographs: images that differ.
        num_names: training images; those beyond the first `num_photographs` are links to them.
    """
    random = np.random.RandomState(0)
    for name in ("train/cat", "train/dog", "val/cat", "val/dog"):
        (root / name).mkdir(parents=True)
    for number in range(num_photographs):
        coarse = Image.fromarray(random.randint(0, 256, (12, 16, 3), dtype=np.uint8)).resize((500, 375), Image.BICUBIC)
        noise = random.randint(0, 50, (375, 500, 3))
        pixels = (0.8 * np.asarray(coarse) + noise).astype(np.uint8)
        Image.fromarray(pixels).save(root / f"{number}.jpg", quality=92)
    for number in range(num_names):
        name, photograph = f"{('cat', 'dog')[number % 2]}/{number}.jpg", root / f"{number % num_photographs}.jpg"
        (root / "train" / name).symlink_to(photograph.resolve())
        if number < 2:
            (root / "val" / name).symlink_to(photograph.resolve())


def short_run(args: Namespace) -> dict[str, float]:
    """The third epoch of real training with the default workers: its speed, and the share of its time spent waiting."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        run = {"epochs": 3, "warmup_epochs": 0, "output_dir": folder, "tensorboard": False, "log_interval": 0}
        main.main(Namespace(**vars(args) | run), init_world(args.device))
        record = json.loads((Path(folder) / "log.txt").read_text().splitlines()[-1])
    return {"images_per_s": record["train_images_per_s"], "data_wait": record["train_data_wait"]}
