"""Transforms, samplers and loaders over the data sets of sources.py."""

import itertools
import math
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Subset,
    default_collate,
)

from pipeline.batch_augmentation import Normalize
from pipeline.images import ReadableImages
from pipeline.prefetch import Prefetcher
from pipeline.samplers import ResumableBatches, SeededRepeatAugSampler
from pipeline.sources import build_source, count_classes
from pipeline.transforms import build_transform
from pipeline.workers import ignore_in_worker
from utils import BadImageError, World, cpu_count, reseed


@dataclass
class Data:
    """The loaders of a run.

    Attributes:
        train: the training loader, whose batches are read through `batches`; None when a run only evaluates.
        val: batches of normalised images; where it prefetches, they are on the device.
        num_val: validation images of all processes together.
        num_steps: optimizer steps of an epoch.
        accum_steps: batches of a step.
        seed: of the order that a data set which streams is shuffled into.
        prefetcher: sends the training batches to the device as bytes; None = they stay, normalised, where they are
            read.
    """

    train: DataLoader | None
    val: DataLoader | Prefetcher
    num_classes: int
    num_val: int
    num_steps: int = 0
    accum_steps: int = 1
    seed: int = 0
    prefetcher: Prefetcher | None = None

    def batches(self, epoch: int, step: int) -> Iterable:
        """The training batches of an epoch from an optimizer step on.

        What was done is skipped unread; a data set that streams reads it again, with the same result where the number
        of its worker processes, at least one, is the same.
        """
        first, end = step * self.accum_steps, self.num_steps * self.accum_steps
        if isinstance(self.train.dataset, IterableDataset):
            self.train.dataset.set_epoch(epoch)
            self.train.dataset.reader.ds = None  # timm's pipeline, which would go on drawing from where it was
            reseed("order", self.seed, epoch)  # the loader draws its workers' seeds from it
            batches = itertools.islice(self.train, first, end)
        else:
            self.train.batch_sampler.start(epoch, first)
            batches = self.train
        return batches if self.prefetcher is None else self.prefetcher.over(batches)

    def step_images(self, step: int) -> str:
        """Which images an optimizer step of this epoch is made of on this process."""
        if isinstance(self.train.dataset, IterableDataset):
            return "images of a stream"
        batches = self.train.batch_sampler.batches(step * self.accum_steps, (step + 1) * self.accum_steps)
        return f"images number {', '.join(str(sample.index) for batch in batches for sample in batch)}"

    def bad_images(self, world: World) -> list[int]:
        """Unreadable training images that any process has met; every process must call it."""
        if isinstance(self.train.dataset, IterableDataset):
            return []
        is_bad = self.train.dataset.is_bad.to(world.device, torch.int32)
        return world.sum(is_bad).nonzero().flatten().tolist()

    def mark_bad_images(self, indices: list[int]):
        """Tell the training set what `bad_images` has found in an earlier process."""
        if not isinstance(self.train.dataset, IterableDataset):
            self.train.dataset.mark_bad(indices)

    def common_val_batches(self, world: World) -> int:
        """Validation batches that every process has; shares differ by an image."""
        return math.ceil(self.num_val // world.size / self.val.batch_sampler.batch_size)

    def first_val_images(self, count: int) -> torch.Tensor:
        """The first validation images [n, 3, S, S], the same in every process; no random number is drawn."""
        if isinstance(self.val.dataset, IterableDataset):
            with torch.random.fork_rng(devices=()):  # a loader draws a seed for its workers
                num_batches = math.ceil(count / self.val.batch_sampler.batch_size)
                return torch.cat([images for images, _ in itertools.islice(self.val, num_batches)])[:count]
        dataset = self.val.dataset.dataset if self.val_is_shared else self.val.dataset
        batch = default_collate([dataset[i] for i in range(min(count, len(dataset)))])
        if isinstance(self.val, Prefetcher):
            [batch] = Prefetcher([batch], self.val.device, self.val.transform)
        return batch[0]

    @property
    def val_is_shared(self) -> bool:
        """Whether the processes evaluate parts; otherwise each evaluates all of the validation set."""
        return isinstance(self.val.dataset, Subset)


def build_data(args: Namespace, world: World, val_transform: Callable | None = None) -> Data:
    """Data sets named by --data-set, with DeiT's augmentation, and their loaders.

    Args:
        val_transform: PIL image -> normalised tensor, in place of `build_transform`'s.

    Raises:
        SystemExit: unknown name, missing path or split, an empty class, classes of train and val that differ.
    """
    train = None if args.eval else build_source(args, is_training=True)
    val = build_source(args, is_training=False)
    num_classes = count_classes(args, train, val)
    prefetches = world.device.type == "cuda" if args.prefetcher is None else args.prefetcher
    transform = val_transform or build_transform(args, False, as_bytes=prefetches)
    val_loader = _val_loader(args, world, val, transform, num_classes)
    if prefetches and val_transform is None:
        val_loader = Prefetcher(val_loader, world.device, Normalize().to(world.device))
    num_val = val.reader.num_samples if isinstance(val, IterableDataset) else len(val)
    data = Data(None, val_loader, num_classes, num_val, accum_steps=args.accum_steps, seed=args.seed)
    if train is not None:
        transform = build_transform(args, True, as_bytes=prefetches)
        data.train, data.num_steps = _train_loader(args, world, train, transform, num_classes)
        data.prefetcher = Prefetcher(data.train, world.device) if prefetches else None
    return data


def _train_loader(
    args: Namespace, world: World, source: Dataset, transform: Callable, num_classes: int
) -> tuple[DataLoader, int]:
    """The loader, and the optimizer steps of an epoch."""
    if isinstance(source, IterableDataset):
        loader = _stream_loader(args, world, source, transform, num_classes, is_training=True)
        return loader, len(loader) // args.accum_steps
    images = ReadableImages(source, transform, args.max_bad_images, args.seed, decode_once=args.decode_once)
    of_all_ranks = {"num_replicas": 1, "rank": 0, "shuffle": True, "seed": args.seed}
    repeats = args.aug_repeats if args.repeated_aug else 1
    if args.repeated_aug:
        sampler = SeededRepeatAugSampler(images, num_repeats=repeats, **of_all_ranks)
    else:
        sampler = DistributedSampler(images, **of_all_ranks)
    global_batch = args.batch_size * world.size * args.accum_steps
    num_steps = len(sampler) // global_batch
    if num_steps == 0:
        raise SystemExit(
            f"error: an epoch has {len(sampler)} images, less than the {global_batch} of one step: "
            f"--batch-size {args.batch_size}, {world.size} processes, --accum-steps {args.accum_steps}"
        )
    batches = ResumableBatches(
        sampler, args.batch_size, num_steps * args.accum_steps, repeats, world, in_runs=args.repeats_together
    )
    return DataLoader(images, batch_sampler=batches, **_loader_options(args, world)), num_steps


def _val_loader(args: Namespace, world: World, source: Dataset, transform: Callable, num_classes: int) -> DataLoader:
    """Each rank's share without padding: images rank, rank + size, rank + 2 size, ..."""
    if isinstance(source, IterableDataset):
        return _stream_loader(args, world, source, transform, num_classes, is_training=False)
    images = ReadableImages(source, transform, max_bad=0)
    if args.dist_eval and world.size > 1:
        images = Subset(images, range(world.rank, len(images), world.size))
    return DataLoader(images, batch_size=int(1.5 * args.batch_size), **_loader_options(args, world, is_training=False))


def _stream_loader(
    args: Namespace, world: World, source: IterableDataset, transform: Callable, num_classes: int, is_training: bool
) -> DataLoader:
    """Training shards are shared among ranks and workers, one at least for each; every rank evaluates all of the rest.

    timm's reader would share validation shards too, but then counts images twice or never where shards are unequal.
    """
    options = _loader_options(args, world, is_training)
    reader = source.reader
    missing = [name for name in reader.split_info.filenames if not (Path(args.data_path) / name).is_file()]
    if missing:
        raise SystemExit(
            f"error: --data-path {args.data_path} lacks the shard {missing[0]} of --data-set {args.data_set}"
        )
    if not is_training:
        reader.dist_rank, reader.dist_num_replicas = 0, 1
    shards = len(reader.split_info.filenames) // reader.dist_num_replicas
    if shards == 0:
        raise SystemExit(f"error: --data-set {args.data_set} has fewer training shards than the {world.size} processes")
    if options["num_workers"] > shards:
        options |= {"num_workers": shards}
    source.transform = transform
    source.target_transform = partial(_known_label, num_classes=num_classes)
    source.set_loader_cfg(num_workers=options["num_workers"])
    options |= {"persistent_workers": False}  # each epoch begins with new ones, seeded by it
    return DataLoader(source, batch_size=args.batch_size, drop_last=is_training, **options)


def _known_label(label: int, num_classes: int) -> int:
    if not 0 <= label < num_classes:
        raise BadImageError(f"an image is labelled {label}, but --num-classes is {num_classes}")
    return label


def _loader_options(args: Namespace, world: World, is_training: bool = True) -> dict:
    num_workers = args.num_workers
    if num_workers is None:
        spare = 2 if world.device.type == "cuda" else 0  # for the processes that feed the GPUs
        num_workers = max(1, (cpu_count() - spare) // world.local_size)
    if not is_training:
        num_workers = math.ceil(num_workers / 2)  # those of training wait meanwhile, and stay
    by_name = args.data_set.lower().startswith("hfds/") and num_workers > 0
    return {
        "num_workers": num_workers,
        "multiprocessing_context": "fork" if by_name else None,  # our classes have lost their module's name
        "pin_memory": args.pin_mem and world.device.type == "cuda",
        "persistent_workers": num_workers > 0,
        "worker_init_fn": ignore_in_worker,
        "timeout": args.loader_timeout if num_workers else 0,
    }
