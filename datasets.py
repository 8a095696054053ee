"""The loaders of a run: what --data-set names, transformed, sampled, batched and sent to the device."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Subset

from pipeline.batch_augmentation import Normalize
from pipeline.batch_transform import BatchTransform
from pipeline.cached_loader import CachedLoader
from pipeline.classes import find_classes, match_outputs
from pipeline.evaluation_set_images import SetImages
from pipeline.image_cache import CachedImages, FloatPath, Squeeze, cache_images, require_memory, side_of
from pipeline.images import ReadableImages
from pipeline.opening import build_sources
from pipeline.prefetch import Prefetcher
from pipeline.run_data import Data
from pipeline.samplers import ResumableBatches, SeededRepeatAugSampler
from pipeline.sources import SourceOptions, find_source
from pipeline.transforms import TransformOptions, build_transform
from pipeline.workers import StoppableLoader
from utils import BadImageError, World, cpu_count


@dataclass(frozen=True, kw_only=True)
class DataOptions(SourceOptions, TransformOptions):
    """What `build_data` needs. Each field is the flag of its name, which `main.py --help` explains.

    The exception is `decode_once`, whether copies of an image in one batch are decoded once; it is for comparisons.
    """

    eval: bool
    accum_steps: int
    max_bad_images: int
    num_workers: int | None
    loader_timeout: int
    pin_mem: bool
    dist_eval: bool
    prefetcher: bool | None
    repeated_aug: bool
    aug_repeats: int
    repeats_together: bool
    cache_images: str
    cache_size: int | None
    decode_once: bool = True

    @property
    def is_cached(self) -> bool:
        """Whether images are kept in memory; an evaluation reads each of them once."""
        return self.cache_images != "none" and not self.eval

    @property
    def cache_side(self) -> int:
        """The side in pixels of a cached training image."""
        return side_of(self.cache_size, self.input_size)


def build_data(options: DataOptions, world: World, classes: Sequence[str] = (), needs_labels: bool = True) -> Data:
    """The data sets that `options` name, with DeiT's augmentation, and their loaders.

    Args:
        classes: names of the classes in the order of a model's outputs, to which labels are mapped by name; empty = in
            the order of the data.
        needs_labels: whether data without labels is refused.

    Raises:
        SystemExit: unknown name, missing path or split, an empty class, classes of train and val that differ, classes
            that the model does not have, no labels, a cache that does not fit in memory.
    """
    train, val = build_sources(options, is_training=not options.eval)
    num_classes, names = find_classes(options, train, val, needs_labels)
    num_val_classes = len(names) or num_classes
    is_guessed = options.eval and needs_labels  # the images are labelled by the order of their classes otherwise
    labels, names, notes = match_outputs(names, classes, train is not None, options.num_classes if is_guessed else None)
    num_classes = options.num_classes or len(names) or num_classes
    prefetches = options.prefetcher
    if prefetches is None or options.is_cached:
        prefetches = world.device.type == "cuda"
    for source in (train, val):
        if isinstance(source, IterableDataset):
            source.target_transform = partial(_known_label, num_classes=num_classes, labels=labels)
    notes += [source.note for source in (train, val) if getattr(source, "note", "")]
    if options.is_cached:
        sizes = (len(train), options.cache_side), (len(val), options.input_size)
        notes.append(require_memory(options.cache_images, world, *sizes))
    train_loader = None if train is None else _train_loader(options, world, train, labels, prefetches)
    val_loader = _val_loader(options, world, val, labels, prefetches)
    num_val = val.reader.num_samples if isinstance(val, IterableDataset) else len(val)
    data = Data(train_loader, val_loader, num_classes, num_val, names, accum_steps=options.accum_steps)
    data.num_val_classes, data.seed, data.notes = num_val_classes, options.seed, notes
    data.has_labels = find_source(options.data_set).has_labels
    if train is not None:
        data.num_train = train.reader.num_samples if isinstance(train, IterableDataset) else len(train)
        data.num_steps = len(train_loader) // options.accum_steps
        data.prefetcher = Prefetcher(train_loader, world.device) if prefetches and not options.is_cached else None
    return data


def build_set(options: DataOptions, world: World, images: SetImages, whole_image: bool = False) -> Data:
    """The images of an evaluation set, in batches as `build_data` returns validation images.

    Args:
        whole_image: whether images are not cropped, whatever the options say.
    """
    crop = {"eval_crop_ratio": 1.0} if whole_image else {}
    options = replace(options, data_set="IMNET", eval=True, **crop)
    prefetches = world.device.type == "cuda" if options.prefetcher is None else options.prefetcher
    loader = _val_loader(options, world, images, [], prefetches)
    return Data(None, loader, len(images.classes), len(images), images.classes, seed=options.seed)


def _train_loader(
    options: DataOptions, world: World, source: Dataset, labels: Sequence[int], prefetches: bool
) -> DataLoader | CachedLoader:
    side = options.cache_side
    transform = build_transform(options, is_training=True, as_bytes=prefetches)
    if options.is_cached:
        transform = Squeeze(side, options.interpolation)
    if isinstance(source, IterableDataset):
        return _stream_loader(options, world, source, transform, is_training=True)
    settings = {"decode_once": options.decode_once, "labels": labels}
    images = ReadableImages(source, transform, options.max_bad_images, options.seed, **settings)
    of_all_ranks = {"num_replicas": 1, "rank": 0, "shuffle": True, "seed": options.seed}
    repeats = options.aug_repeats if options.repeated_aug else 1
    if options.repeated_aug:
        sampler = SeededRepeatAugSampler(images, num_repeats=repeats, **of_all_ranks)
    else:
        sampler = DistributedSampler(images, **of_all_ranks)
    global_batch = options.batch_size * world.size * options.accum_steps
    num_steps = len(sampler) // global_batch
    if num_steps == 0:
        raise SystemExit(
            f"error: an epoch has {len(sampler)} images, less than the {global_batch} of one step: "
            f"--batch-size {options.batch_size}, {world.size} processes, --accum-steps {options.accum_steps}"
        )
    num_batches = num_steps * options.accum_steps
    batches = ResumableBatches(sampler, options.batch_size, num_batches, repeats, world, options.repeats_together)
    if options.is_cached:
        augment = BatchTransform(options, options.seed, len(images), side)  # it refuses before images are read
        return CachedLoader(_cached(options, world, images, (3, side, side)), batches, augment, world.device)
    return StoppableLoader(images, batch_sampler=batches, **loader_settings(options, world, is_training=True))


def _val_loader(
    options: DataOptions, world: World, source: Dataset, labels: Sequence[int], prefetches: bool
) -> DataLoader | Prefetcher:
    """The share of each rank without padding: images rank, rank + size, rank + 2 size, ..."""
    transform = build_transform(options, is_training=False, as_bytes=prefetches or options.is_cached)
    batch_size, settings = int(1.5 * options.batch_size), loader_settings(options, world, is_training=False)
    if isinstance(source, IterableDataset):
        loader = _stream_loader(options, world, source, transform, is_training=False)
    else:
        images = ReadableImages(source, transform, max_bad=0, labels=labels)
        if options.is_cached:
            images = _cached(options, world, images, (options.input_size, options.input_size, 3))
            settings = {"collate_fn": _as_it_is}
        if options.dist_eval and world.size > 1:
            images = Subset(images, range(world.rank, len(images), world.size))
        loader = StoppableLoader(images, batch_size=batch_size, **settings)
    if not (prefetches or options.is_cached):
        return loader
    kind = Normalize if prefetches else FloatPath
    normalize = kind(options.mean, options.std).to(world.device)
    are_there = options.is_cached and options.cache_images == "device"
    return Prefetcher(loader, world.device, normalize, has_stream=not are_there)


def _cached(options: DataOptions, world: World, images: ReadableImages, shape: tuple[int, ...]) -> CachedImages:
    settings = loader_settings(options, world, is_training=True) | {"pin_memory": False, "persistent_workers": False}
    pin = options.pin_mem and world.device.type == "cuda"
    return cache_images(images, shape, world, options.cache_images, settings, pin)


def _as_it_is(batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return batch


def _stream_loader(
    options: DataOptions, world: World, source: IterableDataset, transform: Callable, is_training: bool
) -> DataLoader:
    """Training shards are divided among ranks and workers, at least one for each; every rank evaluates all images.

    timm's reader would divide validation shards too, but counts images twice or never where shards are unequal.
    """
    name, reader = options.data_set, source.reader
    missing = [file for file in reader.split_info.filenames if not (Path(options.data_path) / file).is_file()]
    if missing:
        raise SystemExit(f"error: --data-path {options.data_path} lacks the shard {missing[0]} of --data-set {name}")
    if not is_training:
        reader.dist_rank, reader.dist_num_replicas = 0, 1
    num_shards = len(reader.split_info.filenames) // reader.dist_num_replicas
    if num_shards == 0:
        raise SystemExit(f"error: --data-set {name} has fewer training shards than the {world.size} processes")
    settings = loader_settings(options, world, is_training)
    settings["num_workers"] = min(settings["num_workers"], num_shards)
    settings["persistent_workers"] = False  # each epoch starts new ones, seeded by it
    source.transform = transform
    source.set_loader_cfg(num_workers=settings["num_workers"])
    loader = StoppableLoader(source, batch_size=options.batch_size, drop_last=is_training, **settings)
    if is_training and len(loader) < options.accum_steps:
        raise SystemExit(
            f"error: an epoch has {len(source)} images per process, less than the "
            f"{options.batch_size * options.accum_steps} of one step: --batch-size {options.batch_size}, "
            f"--accum-steps {options.accum_steps}"
        )
    return loader


def _known_label(label: int, num_classes: int, labels: Sequence[int]) -> int:
    label = labels[label] if 0 <= label < len(labels) else label
    if not 0 <= label < num_classes:
        raise BadImageError(f"an image is labelled {label}, but --num-classes is {num_classes}")
    return label


def loader_settings(options: DataOptions, world: World, is_training: bool) -> dict:
    """Arguments of `DataLoader` about its processes."""
    num_workers = options.num_workers
    if num_workers is None:
        spare = 2 if world.device.type == "cuda" else 0  # for the processes that feed the GPUs
        num_workers = max(1, (cpu_count() - spare) // world.local_size)
    if not is_training:
        num_workers = math.ceil(num_workers / 2)  # the workers of the training loader wait meanwhile
    return {
        "num_workers": num_workers,
        "multiprocessing_context": find_source(options.data_set).start_method if num_workers else None,
        "pin_memory": options.pin_mem and world.device.type == "cuda",
        "persistent_workers": num_workers > 0,
        "timeout": options.loader_timeout if num_workers else 0,
    }
