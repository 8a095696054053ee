"""Data sets, transforms, samplers and loaders."""

import difflib
import importlib.util
import json
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

import numpy as np
import timm.data
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Subset
from torchvision import transforms

from utils import World, cpu_count

BUILT_IN = ("IMNET", "CIFAR", "CIFAR10", "INAT", "INAT19", "DIGITS", "FAKE")
TIMM_PREFIXES = ("torch", "hfds", "hfids", "wds", "tfds")
FAKE_SIZES = {"train": 1024, "val": 256}


@dataclass
class Data:
    """The loaders of a run. `train` is None when a run only evaluates."""

    train: DataLoader | None
    val: DataLoader
    num_classes: int

    def set_epoch(self, epoch: int):
        """Give the epoch to what shuffles: the sampler, or a data set that streams."""
        shuffler = self.train.dataset if isinstance(self.train.dataset, IterableDataset) else self.train.sampler
        shuffler.set_epoch(epoch)

    @property
    def num_bad_images(self) -> int:
        return getattr(self.train.dataset, "num_bad", 0)


def build_data(args: Namespace, world: World) -> Data:
    """Data sets named by --data-set, with DeiT's augmentation, and their loaders.

    Raises:
        SystemExit: unknown name, missing path or split, an empty class, classes of train and val that differ.
    """
    train = None if args.eval else _build_source(args, is_training=True)
    val = _build_source(args, is_training=False)
    num_classes = _count_classes(args, train, val)
    train_loader = None if train is None else _train_loader(args, world, train)
    return Data(train_loader, _val_loader(args, world, val), num_classes)


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
    if small:
        size = (args.input_size, args.input_size)
        whole = transforms.Resize(size, interpolation=transforms.InterpolationMode.BICUBIC)
        transform.transforms[:1] = [whole, transforms.RandomCrop(size, padding=4)]
    return transform


class BadImageError(RuntimeError):
    """An image cannot be read and may not, or no longer, be replaced."""


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
        self._is_bad = torch.zeros(len(source), dtype=torch.uint8).share_memory_()  # one for all loader workers

    @property
    def num_bad(self) -> int:
        """Distinct unreadable images this process and its workers have met."""
        return int(self._is_bad.sum())

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index: int):
        for step in range(len(self)):
            candidate = (index + step) % len(self)
            if self._is_bad[candidate]:
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
        self._is_bad[index] = 1
        message = f"unreadable image {_image_name(self.source, index)}: {' '.join(str(error).split())}"
        if self.num_bad > self.max_bad:
            raise BadImageError(f"{message} (number {self.num_bad}; {self.max_bad} may be replaced)") from None
        print(f"{message}; replaced by the next one", file=sys.stderr, flush=True)


class Digits(Dataset):
    """The 1,797 scanned digits that ship with scikit-learn, 8 x 8 pixels; a fifth of each class is for validation."""

    classes = tuple("0123456789")

    def __init__(self, is_training: bool):
        scans, labels = load_digits(return_X_y=True)
        parts = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
        chosen = parts[0 if is_training else 1]
        self.scans = (scans[chosen].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        self.labels = labels[chosen]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index: int):
        return Image.fromarray(self.scans[index]), int(self.labels[index])


class INaturalist(Dataset):
    """iNaturalist 2018 or 2019 as the competition's archives and annotation files lie after unpacking.

    Needs `<split><year>.json`, `train<year>.json` (which orders the classes, as in DeiT) and `categories.json` in
    `root`, and the images at the annotations' paths or, as DeiT has them, without the super-category folder.

    Args:
        root: folder of the files.
        split: "train" or "val".
        year: 2018 or 2019.
        category: the taxonomic rank that serves as the label, e.g. "name" for the species.
    """

    def __init__(self, root: Path, split: str, year: int, category: str):
        rank_of = {entry["id"]: entry[category] for entry in json.loads((root / "categories.json").read_text())}
        train = json.loads((root / f"train{year}.json").read_text())
        chosen = train if split == "train" else json.loads((root / f"{split}{year}.json").read_text())
        self.classes = list(dict.fromkeys(rank_of[entry["category_id"]] for entry in train["annotations"]))
        index_of = {name: index for index, name in enumerate(self.classes)}
        category_of = {entry["image_id"]: entry["category_id"] for entry in chosen["annotations"]}
        paths = [Path(image["file_name"]) for image in chosen["images"]]
        if paths and not (root / paths[0]).exists():
            paths = [Path(path.parts[0], *path.parts[2:]) for path in paths]
        labels = [index_of[rank_of[category_of[image["id"]]]] for image in chosen["images"]]
        self.samples = [(str(root / path), label) for path, label in zip(paths, labels, strict=True)]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index: int):
        path, label = self.samples[index]
        return torchvision.datasets.folder.pil_loader(path), label


class SeededRepeatAugSampler(RepeatAugSampler):
    """timm's repeated augmentation with a seed; seed 0 draws the same order as DeiT."""

    def __init__(self, *args, seed: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.seed = seed

    def set_epoch(self, epoch: int):
        super().set_epoch(epoch + 1_000_003 * self.seed)


def _build_source(args: Namespace, is_training: bool) -> Dataset:
    """The bare data set, without transforms unless it streams."""
    split = args.train_split if is_training else args.val_split or "val"
    name = args.data_set
    if name == "DIGITS":
        return Digits(is_training)
    if name == "FAKE":
        shape = (3, args.input_size, args.input_size)
        size = FAKE_SIZES["train" if is_training else "val"]
        offset = 0 if is_training else FAKE_SIZES["train"]  # no image in both
        return torchvision.datasets.FakeData(size, shape, args.num_classes or 1000, random_offset=offset)
    from_timm = name.split("/")[0].lower() in TIMM_PREFIXES and "/" in name
    if not from_timm and name not in BUILT_IN:
        known = [*BUILT_IN, *(f"{prefix}/" for prefix in TIMM_PREFIXES)]
        near = difflib.get_close_matches(name.upper(), BUILT_IN, n=2) or known
        raise SystemExit(f"error: --data-set {name} is unknown; did you mean {', '.join(near)}?")
    if not args.data_path and not name.startswith("hf"):
        raise SystemExit(f"error: --data-set {name} needs --data-path, the folder that holds it")
    if args.data_path and not name.startswith("hf") and not Path(args.data_path).is_dir():
        raise SystemExit(f"error: --data-path {args.data_path} is not a folder")
    try:
        if from_timm:
            return _timm_source(args, is_training)
        root = Path(args.data_path)
        if name == "IMNET":
            return _image_folder(root, split)
        if name in ("CIFAR", "CIFAR10"):
            kind = torchvision.datasets.CIFAR100 if name == "CIFAR" else torchvision.datasets.CIFAR10
            return kind(args.data_path, train=is_training)
        year = 2018 if name == "INAT" else 2019
        return INaturalist(root, split, year, args.inat_category)
    except Exception as error:  # the libraries raise anything from AssertionError to HTTP errors
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SystemExit(
            f"error: --data-set {name} cannot be read from {args.data_path or 'the hub'}: {reason}"
        ) from None


def _image_folder(root: Path, split: str) -> Dataset:
    if not (root / split).is_dir():
        found = ", ".join(sorted(entry.name for entry in root.iterdir() if entry.is_dir())) or "no folder"
        raise SystemExit(
            f"error: --data-path {root} has no folder {split!r} (found: {found}); see --train-split, --val-split"
        )
    return torchvision.datasets.ImageFolder(str(root / split))


def _timm_source(args: Namespace, is_training: bool) -> Dataset:
    prefix = args.data_set.split("/")[0].lower()
    if prefix in ("hfds", "hfids"):
        _give_name_to_hugging_face()
    streams = prefix in ("hfids", "wds", "tfds")
    source = timm.data.create_dataset(
        args.data_set,
        root=args.data_path or None,
        split=args.train_split if is_training else args.val_split or "validation",
        is_training=is_training,
        batch_size=args.batch_size,
        **({"seed": args.seed} if streams else {}),
    )
    if streams:
        source.transform = build_transform(args, is_training)
    return source


def _give_name_to_hugging_face():
    """Let `import datasets`, inside timm, find Hugging Face's package and not this module of the same name.

    Who imported this module before keeps it.
    """
    here = Path(__file__).parent.resolve()
    elsewhere = [entry for entry in sys.path if Path(entry).resolve() != here]
    spec = PathFinder.find_spec("datasets", elsewhere)
    if spec is None:
        raise ModuleNotFoundError("Hugging Face's package is not installed; pip install datasets")
    if getattr(sys.modules.get("datasets"), "__file__", None) == spec.origin:
        return
    package = importlib.util.module_from_spec(spec)
    sys.modules["datasets"] = package
    spec.loader.exec_module(package)


def _count_classes(args: Namespace, train: Dataset | None, val: Dataset) -> int:
    """Classes counted from the data, compared between train and val and with --num-classes."""
    names = _class_names(val)
    if train is not None and (trained := _class_names(train)) != names:
        raise SystemExit(
            f"error: the classes of {args.data_path} differ: only in train: {_some(set(trained) - set(names))}; "
            f"only in val: {_some(set(names) - set(trained))}"
        )
    if not names:
        if args.num_classes is None:
            raise SystemExit(f"error: --data-set {args.data_set} does not say its classes; give --num-classes")
        return args.num_classes
    if args.num_classes is not None and args.num_classes < len(names):
        raise SystemExit(f"error: --num-classes {args.num_classes}, but the data has {len(names)} classes")
    return args.num_classes or len(names)


def _some(names: set[str]) -> str:
    """The first three names, for a message."""
    return ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "") or "none"


def _class_names(source: Dataset) -> list[str]:
    """The classes a data set names, in label order; empty where it does not say."""
    if isinstance(source, torchvision.datasets.FakeData):
        return [str(label) for label in range(source.num_classes)]
    reader = getattr(source, "reader", None)
    names = getattr(source, "classes", None) or getattr(reader, "class_to_idx", None) or []
    return [str(name) for name in names]


def _train_loader(args: Namespace, world: World, source: Dataset) -> DataLoader:
    options = _loader_options(args, world)
    if isinstance(source, IterableDataset):
        source.set_loader_cfg(num_workers=options["num_workers"])
        return DataLoader(source, batch_size=args.batch_size, drop_last=True, **options)
    images = ReadableImages(source, build_transform(args, is_training=True), args.max_bad_images)
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
    return DataLoader(images, batch_size=args.batch_size, sampler=sampler, drop_last=True, **options)


def _val_loader(args: Namespace, world: World, source: Dataset) -> DataLoader:
    """Each rank's share without padding: images rank, rank + size, rank + 2 size, ..."""
    options = {**_loader_options(args, world), "batch_size": int(1.5 * args.batch_size), "shuffle": False}
    if isinstance(source, IterableDataset):
        source.set_loader_cfg(num_workers=options["num_workers"])
        return DataLoader(source, **options)
    images = ReadableImages(source, build_transform(args, is_training=False), max_bad=0)
    if args.dist_eval and world.size > 1:
        images = Subset(images, range(world.rank, len(images), world.size))
    return DataLoader(images, **options)


def _loader_options(args: Namespace, world: World) -> dict:
    num_workers = args.num_workers
    if num_workers is None:
        num_workers = min(10, max(1, cpu_count() // world.local_size))
    return {
        "num_workers": num_workers,
        "pin_memory": args.pin_mem and world.device.type == "cuda",
        "persistent_workers": num_workers > 0,
    }


def _image_name(source: Dataset, index: int) -> str:
    """Path of an image, or its number where it has none."""
    for attribute in ("samples", "imgs"):
        if hasattr(source, attribute):
            return getattr(source, attribute)[index][0]
    if isinstance(source, timm.data.ImageDataset):
        return str(source.filename(index))
    return f"number {index}"
