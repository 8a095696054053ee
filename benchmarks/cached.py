"""`benchmark.py cached`: how fast cached images become batches on the device, and how long a step waits for them."""

from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import torch

from pipeline.batch_transform import BatchTransform
from pipeline.cached_loader import CachedLoader
from pipeline.image_cache import CachedImages, side_of
from pipeline.images import Sample
from pipeline.transforms import TransformOptions
from reports.tables import print_rows
from training.build import options_of
from utils import World

from . import training_steps
from .measure import interleave, now
from .training_steps import with_flags

PLAIN_POLICY = {"aa": None, "color_jitter": 0.0}
COLUMNS = {
    "images/s": ("images_per_s", "{:,.0f}".format),
    "ms per batch": ("ms", "{:.2f}".format),
    "data wait": ("data_wait", "{:.1%}".format),
    "time / one batch": ("to_one_batch", "{:.3f}".format),
}
"""{heading: (key, format)}; "data wait" is the fraction of a step's time in which the host waits for a batch."""


def compare_cached(own: Namespace, args: Namespace, world: World) -> dict:
    """Batches alone, with the policy of --aa and without one; and steps on one batch, then on batches of cached images.

    The cache has random images and is where --cache-images says, by default on the device. A round is an epoch of 48
    steps on a GPU, of 4 elsewhere.
    """
    device, place = world.device, "memory" if args.cache_images == "memory" else "device"
    num_steps = own.steps or (48 if device.type == "cuda" else 4)
    policies = {f"--aa {args.aa}": args, "--aa none --color-jitter 0": with_flags(args, **PLAIN_POLICY)}
    loaders = {f"batches, {name}": cached_loader(flags, world, place, num_steps) for name, flags in policies.items()}
    with_policy = next(iter(loaders.values()))
    on_one_batch = training_steps.diversified(args, world)
    on_cached = training_steps.diversified(args, world, lambda num_steps: with_policy)
    waits = []

    def step_on_cached():
        waits.append(on_cached(num_steps)["data_wait"])

    functions = {name: lambda loader=loader: read(loader, device) for name, loader in loaders.items()}
    functions |= {"step on one batch": lambda: on_one_batch(num_steps), "step on cached images": step_on_cached}
    seconds = {name: value / num_steps for name, value in interleave(functions, own.rounds, device).items()}
    size = f"{args.input_size} px, batch {args.batch_size}, random images in {place} memory"
    print(f"{args.model}, {size}, medians of {own.rounds} rounds\n")
    rows = {name: {"images_per_s": args.batch_size / value, "ms": 1000 * value} for name, value in seconds.items()}
    ratio = seconds["step on cached images"] / seconds["step on one batch"]
    rows["step on cached images"] |= {"data_wait": float(np.median(waits[1:])), "to_one_batch": ratio}
    return {"cached": print_rows("what", [*rows], rows.values(), COLUMNS)}


def cached_loader(args: Namespace, world: World, place: str, num_batches: int) -> CachedLoader:
    """The loader of a run on random images, with the same batches in every epoch."""
    options, device = options_of(TransformOptions, args), world.device
    side, count = side_of(args.cache_size, args.input_size), num_batches * args.batch_size
    images = torch.randint(256, (count, 3, side, side), dtype=torch.uint8)
    labels = torch.randint(training_steps.NUM_CLASSES, (count,))
    reader = SimpleNamespace(source=None, is_bad=None)
    sizes = np.full((count, 2), side)
    pin = device.type == "cuda"
    dataset = CachedImages(images.to(device) if place == "device" else images, labels, sizes, reader, pin)
    samples = [Sample(index, epoch=0, repeat=0) for index in torch.randperm(count).tolist()]
    batches = [samples[start : start + args.batch_size] for start in range(0, count, args.batch_size)]
    return CachedLoader(dataset, batches, BatchTransform(options, args.seed, count, side), device)


def read(loader: CachedLoader, device: torch.device):
    """Make all batches."""
    for _ in loader:
        pass
    now(device)
