"""`benchmark.py loader`: how fast images are read, and how long a run waits for them."""

import contextlib
import io
import itertools
import json
import tempfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch

import main
from datasets import build_data
from tables import markdown_table
from utils import World

from .measure import interleave

AS_IS, FASTEST = "as is", "decode once, bytes"
MODES = {
    AS_IS: {"decode_once": False, "prefetcher": False},
    "decode once": {"decode_once": True, "prefetcher": False},
    "bytes": {"decode_once": False, "prefetcher": True},
    FASTEST: {"decode_once": True, "prefetcher": True},
}
"""{name: flags}; with bytes, normalisation and random erasing are left to the device."""


def compare_loaders(own: Namespace, args: Namespace, world: World) -> dict:
    """Images that one core reads per second in each mode, and how long short real runs wait for data.

    Args:
        own: `rounds`; `steps`, the batches of a round (None = 8); `resized`, a folder or empty.
        args: main.py's flags.
    """
    modes = MODES | ({f"resized, {FASTEST}": MODES[FASTEST] | {"data_path": own.resized}} if own.resized else {})
    flags = {name: Namespace(**vars(args) | mode) for name, mode in modes.items()}
    num_batches = own.steps or 8
    readers = {name: reader(mode, world, num_batches) for name, mode in flags.items()}
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = interleave(readers, own.rounds, torch.device("cpu"))
    torch.set_num_threads(num_threads)
    loaders = {
        name: {"images_per_s": num_batches * args.batch_size / value, "to_as_is": seconds[AS_IS] / value}
        for name, value in seconds.items()
    }
    for name in (AS_IS, [*flags][-1]):
        loaders[name] |= short_run(flags[name], world)
    print(f"{args.data_path or args.data_set}, batch {args.batch_size}, medians of {own.rounds} rounds, one core")
    columns = {
        "loader": [*loaders],
        "images/s per core": [f"{loader['images_per_s']:.1f}" for loader in loaders.values()],
        "times as is": [f"{loader['to_as_is']:.2f}" for loader in loaders.values()],
        f"training {args.model}, images/s": [f"{loader.get('run_images_per_s', ''):.4}" for loader in loaders.values()],
        "of its time waiting for data": [
            f"{100 * loader['data_wait']:.1f} %" if "data_wait" in loader else "" for loader in loaders.values()
        ],
    }
    print(markdown_table(columns))
    return {"loaders": loaders}


def reader(args: Namespace, world: World, num_batches: int) -> Callable[[], None]:
    """Reads the next batches, in this process, each time it is called."""
    data = build_data(Namespace(**vars(args) | {"num_workers": 0}), world)

    def all_batches():
        for epoch in itertools.count():
            data.train.batch_sampler.start(epoch)
            yield from data.train

    batches = all_batches()
    return lambda: [next(batches) for _ in range(num_batches)] and None


def short_run(args: Namespace, world: World) -> dict[str, float]:
    """An epoch of real training with the default workers: its speed, and the share of its time spent waiting."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        run = {"epochs": 1, "warmup_epochs": 0, "output_dir": folder, "tensorboard": False, "log_interval": 0}
        main.main(Namespace(**vars(args) | run), world)
        record = json.loads((Path(folder) / "log.txt").read_text())
    return {"run_images_per_s": record["train_images_per_s"], "data_wait": record["train_data_wait"]}
