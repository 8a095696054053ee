"""Transforms, samplers and loaders over the data sets of sources.py."""

import itertools
import math
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import timm.data
import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Sampler, Subset
from torchvision import transforms

from images import ReadableImages, Sample
from interruption import ignore_in_worker
from randomness import reseed
from sources import build_source, count_classes
from utils import BadImageError, World, cpu_count


@dataclass
class Data:
    """The loaders of a run.

    Attributes:
        train: None when a run only evaluates.
        num_val: validation images of all processes together.
        num_steps: optimizer steps of an epoch.
        accum_steps: batches of a step.
        seed: of the order that a data set which streams is shuffled into.
    """

    train: DataLoader | None
    val: DataLoader
    num_classes: int
    num_val: int
    num_steps: int = 0
    accum_steps: int = 1
    seed: int = 0

    def batches(self, epoch: int, step: int) -> Iterable:
        """The training batches of an epoch from an optimizer step on.

        What was done is skipped unread; a data set that streams reads it again, with the same result where the number
        of its worker processes, at least one, is the same.
        """
        if isinstance(self.train.dataset, IterableDataset):
            self.train.dataset.set_epoch(epoch)
            self.train.dataset.reader.ds = None  # timm's pipeline, which would go on drawing from where it was
            reseed("order", self.seed, epoch)  # the loader draws its workers' seeds from it
            return itertools.islice(self.train, step * self.accum_steps, self.num_steps * self.accum_steps)
        self.train.batch_sampler.start(epoch, step * self.accum_steps)
        return self.train

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
        return math.ceil(self.num_val // world.size / self.val.batch_size)

    def first_val_images(self, count: int) -> torch.Tensor:
        """The first validation images [n, 3, S, S], the same in every process; no random number is drawn."""
        if isinstance(self.val.dataset, IterableDataset):
            with torch.random.fork_rng(devices=()):  # a loader draws a seed for its workers
                batches = itertools.takewhile(lambda seen: seen[0] * self.val.batch_size < count, enumerate(self.val))
                return torch.cat([images for _, (images, _) in batches])[:count]
        dataset = self.val.dataset.dataset if self.val_is_shared else self.val.dataset
        return torch.stack([dataset[i][0] for i in range(min(count, len(dataset)))])

    @property
    def val_is_shared(self) -> bool:
        """Whether the processes evaluate parts; otherwise each evaluates all of the validation set."""
        return isinstance(self.val.dataset, Subset)


def build_data(args: Namespace, world: World, val_transform: Callable | None = None) -> Data:
    """Data sets named by --data-set, with DeiT's augmentation, and their loaders.

    Args:
        val_transform: PIL image -> tensor, in place of `build_transform`'s.

    Raises:
        SystemExit: unknown name, missing path or split, an empty class, classes of train and val that differ.
    """
    train = None if args.eval else build_source(args, is_training=True)
    val = build_source(args, is_training=False)
    num_classes = count_classes(args, train, val)
    train_loader, num_steps = (None, 0) if train is None else _train_loader(args, world, train, num_classes)
    num_val = val.reader.num_samples if isinstance(val, IterableDataset) else len(val)
    val_loader = _val_loader(args, world, val, val_transform or build_transform(args, False), num_classes)
    return Data(train_loader, val_loader, num_classes, num_val, num_steps, args.accum_steps, args.seed)


def build_transform(args: Namespace, is_training: bool) -> Callable:
    """DeiT's transforms through timm: PIL image -> normalised tensor [3, S, S].

    Up to 32 px an image is resized whole, and in training padded by 4 px and cropped, as DeiT does for CIFAR.
    """
    small = args.input_size <= 32
    if not is_training:
        return timm.data.create_transform(
            input_size=args.input_size,
            interpolation="bicubic",
            crop_pct=1.0 if small else args.eval_crop_ratio,
            crop_mode="squash" if small else "center",
        )
    try:
        transform = timm.data.create_transform(
            input_size=args.input_size,
            is_training=True,
            scale=args.scale,
            ratio=args.ratio,
            hflip=args.hflip,
            color_jitter=args.color_jitter or None,
            auto_augment=args.aa,
            interpolation=args.train_interpolation,
            re_prob=args.reprob,
            re_mode=args.remode,
            re_count=args.recount,
        )
    except (AssertionError, ValueError, KeyError, IndexError, NotImplementedError):
        raise SystemExit(
            f"error: --aa {args.aa} is no auto-augment policy of timm, such as rand-m9-mstd0.5-inc1"
        ) from None
    if small:
        size = (args.input_size, args.input_size)
        whole = transforms.Resize(size, interpolation=transforms.InterpolationMode.BICUBIC)
        transform.transforms[:1] = [whole, transforms.RandomCrop(size, padding=4)]
    return transform


class SeededRepeatAugSampler(RepeatAugSampler):
    """timm's repeated augmentation with a seed; seed 0 draws the same order as DeiT."""

    def __init__(self, *args, seed: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.seed = seed

    def set_epoch(self, epoch: int):
        super().set_epoch(epoch + 1_000_003 * self.seed)


class ResumableBatches(Sampler):
    """Batches of `Sample`, from any of an epoch's batches on.

    Batch k of all ranks together holds the positions k * W * B to (k + 1) * W * B of the epoch's order, whatever the
    number W of ranks: a global batch holds the same samples when ranks, batch size or accumulated batches change in
    such a way that its size stays.

    Args:
        sampler: every `world.size`-th index of the epoch's order, from `world.rank` on, as timm's and torch's do.
        batch_size: samples of a batch.
        num_batches: of an epoch; what is left over is dropped.
        repeats: times that an index follows itself in the epoch's order.
    """

    def __init__(self, sampler: Sampler, batch_size: int, num_batches: int, repeats: int, world: World):
        self.sampler, self.batch_size, self.num_batches, self.repeats = sampler, batch_size, num_batches, repeats
        self.world = world
        self.epoch = self.first = 0

    def start(self, epoch: int, batch: int = 0):
        """Begin the next pass at a batch of an epoch."""
        self.epoch, self.first = epoch, batch
        self.sampler.set_epoch(epoch)

    def batches(self, first: int, end: int) -> Iterator[list[Sample]]:
        """The batches first to end - 1 of the epoch."""
        indices = list(self.sampler)
        for batch in range(first, end):
            places = range(batch * self.batch_size, (batch + 1) * self.batch_size)
            positions = (self.world.rank + place * self.world.size for place in places)
            yield [
                Sample(indices[place], self.epoch, position % self.repeats)
                for place, position in zip(places, positions, strict=True)
            ]

    def __iter__(self):
        return self.batches(self.first, self.num_batches)

    def __len__(self):
        return self.num_batches - self.first


def _train_loader(args: Namespace, world: World, source: Dataset, num_classes: int) -> tuple[DataLoader, int]:
    """The loader, and the optimizer steps of an epoch."""
    if isinstance(source, IterableDataset):
        loader = _stream_loader(args, world, source, build_transform(args, True), num_classes, is_training=True)
        return loader, len(loader) // args.accum_steps
    images = ReadableImages(source, build_transform(args, True), args.max_bad_images, args.seed)

    def sampler(ranks, rank):
        split = {"num_replicas": ranks, "rank": rank, "shuffle": True, "seed": args.seed}
        if args.repeated_aug:
            return SeededRepeatAugSampler(images, num_repeats=args.aug_repeats, **split)
        return DistributedSampler(images, **split)

    global_batch = args.batch_size * world.size * args.accum_steps
    num_steps = len(sampler(1, 0)) // global_batch
    if num_steps == 0:
        raise SystemExit(
            f"error: an epoch has {len(sampler(1, 0))} images, less than the {global_batch} of one step: "
            f"--batch-size {args.batch_size}, {world.size} processes, --accum-steps {args.accum_steps}"
        )
    repeats = args.aug_repeats if args.repeated_aug else 1
    mine = sampler(world.size, world.rank)
    batches = ResumableBatches(mine, args.batch_size, num_steps * args.accum_steps, repeats, world)
    return DataLoader(images, batch_sampler=batches, **_loader_options(args, world)), num_steps


def _val_loader(args: Namespace, world: World, source: Dataset, transform: Callable, num_classes: int) -> DataLoader:
    """Each rank's share without padding: images rank, rank + size, rank + 2 size, ..."""
    if isinstance(source, IterableDataset):
        return _stream_loader(args, world, source, transform, num_classes, is_training=False)
    images = ReadableImages(source, transform, max_bad=0)
    if args.dist_eval and world.size > 1:
        images = Subset(images, range(world.rank, len(images), world.size))
    return DataLoader(images, batch_size=int(1.5 * args.batch_size), **_loader_options(args, world))


def _stream_loader(
    args: Namespace, world: World, source: IterableDataset, transform: Callable, num_classes: int, is_training: bool
) -> DataLoader:
    """Training shards are shared among ranks and workers, one at least for each; every rank evaluates all of the rest.

    timm's reader would share validation shards too, but then counts images twice or never where shards are unequal.
    """
    options = _loader_options(args, world)
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


def _loader_options(args: Namespace, world: World) -> dict:
    num_workers = args.num_workers
    if num_workers is None:
        num_workers = min(10, max(1, cpu_count() // world.local_size))
    by_name = args.data_set.lower().startswith("hfds/") and num_workers > 0
    return {
        "num_workers": num_workers,
        "multiprocessing_context": "fork" if by_name else None,  # our classes have lost their module's name
        "pin_memory": args.pin_mem and world.device.type == "cuda",
        "persistent_workers": num_workers > 0,
        "worker_init_fn": ignore_in_worker,
        "timeout": args.loader_timeout if num_workers else 0,
    }
