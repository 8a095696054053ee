"""Transforms, samplers and loaders over the data sets of sources.py."""

import itertools
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import timm.data
import torch
from PIL import Image
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Subset
from torchvision import transforms

from sources import build_source, count_classes, image_name
from utils import BadImageError, World, cpu_count


@dataclass
class Data:
    """The loaders of a run.

    Attributes:
        train: None when a run only evaluates.
        num_val: validation images of all processes together.
    """

    train: DataLoader | None
    val: DataLoader
    num_classes: int
    num_val: int

    def set_epoch(self, epoch: int):
        """Give the epoch to what shuffles: the sampler, or a data set that streams."""
        shuffler = self.train.dataset if isinstance(self.train.dataset, IterableDataset) else self.train.sampler
        shuffler.set_epoch(epoch)

    def num_bad_images(self, world: World) -> int:
        """Distinct unreadable training images that any process has met; every process must call it."""
        if isinstance(self.train.dataset, IterableDataset):
            return 0
        is_bad = self.train.dataset.is_bad.to(world.device, torch.int32)
        return int(world.sum(is_bad).count_nonzero())

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
    train_loader = None if train is None else _train_loader(args, world, train, num_classes)
    num_val = val.reader.num_samples if isinstance(val, IterableDataset) else len(val)
    val_loader = _val_loader(args, world, val, val_transform or build_transform(args, False), num_classes)
    return Data(train_loader, val_loader, num_classes, num_val)


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


class ReadableImages(Dataset):
    """The images of a source with transforms applied; an unreadable one is logged, counted and replaced by the next.

    Args:
        source: map-style data set of (PIL image, label), without transforms.
        transform: PIL image -> tensor.
        max_bad: distinct unreadable images that are replaced; the next one raises `BadImageError`.
    """

    def __init__(self, source: Dataset, transform: Callable, max_bad: int):
        self.source = source
        self.transform = transform
        self.max_bad = max_bad
        self.is_bad = torch.zeros(len(source), dtype=torch.uint8).share_memory_()  # one for all loader workers

    @property
    def num_bad(self) -> int:
        """Distinct unreadable images this process and its workers have met."""
        return int(self.is_bad.count_nonzero())

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index: int):
        for step in range(len(self)):
            candidate = (index + step) % len(self)
            if self.is_bad[candidate]:
                continue
            try:
                image, label = self._read(candidate)
            except Exception as error:  # decoders raise anything
                self._report(candidate, error)
                continue
            return self.transform(image), label
        raise BadImageError(f"none of the {len(self)} images can be read")

    def _read(self, index: int) -> tuple[Image.Image, int]:
        if isinstance(self.source, timm.data.ImageDataset):  # would skip unreadable images in silence
            file, label = self.source.reader[index]
            with file:
                return Image.open(file).convert("RGB"), label
        image, label = self.source[index]
        return image.convert("RGB"), label

    def _report(self, index: int, error: Exception):
        self.is_bad[index] = 1
        message = f"unreadable image {image_name(self.source, index)}: {' '.join(str(error).split())}"
        if self.num_bad > self.max_bad:
            raise BadImageError(f"{message} (number {self.num_bad}; {self.max_bad} may be replaced)") from None
        print(f"{message}; replaced by the next one", file=sys.stderr, flush=True)


class SeededRepeatAugSampler(RepeatAugSampler):
    """timm's repeated augmentation with a seed; seed 0 draws the same order as DeiT."""

    def __init__(self, *args, seed: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.seed = seed

    def set_epoch(self, epoch: int):
        super().set_epoch(epoch + 1_000_003 * self.seed)


def _train_loader(args: Namespace, world: World, source: Dataset, num_classes: int) -> DataLoader:
    if isinstance(source, IterableDataset):
        return _stream_loader(args, world, source, build_transform(args, True), num_classes, is_training=True)
    images = ReadableImages(source, build_transform(args, True), args.max_bad_images)
    split = {"num_replicas": world.size, "rank": world.rank, "shuffle": True, "seed": args.seed}
    if args.repeated_aug:
        sampler = SeededRepeatAugSampler(images, num_repeats=args.aug_repeats, **split)
    else:
        sampler = DistributedSampler(images, **split)
    if len(sampler) < args.batch_size:
        raise SystemExit(
            f"error: the training set gives {len(sampler)} images to each process, "
            f"less than one --batch-size {args.batch_size}"
        )
    options = _loader_options(args, world)
    return DataLoader(images, batch_size=args.batch_size, sampler=sampler, drop_last=True, **options)


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
    }
