"""What `--data-set` names: the built-in data sets, image folders, and timm's by name."""

import difflib
import importlib.util
import json
import sys
from argparse import Namespace
from importlib.machinery import PathFinder
from pathlib import Path

import numpy as np
import timm.data
import torchvision
from PIL import Image
from torch.utils.data import Dataset

from models.weights import refusal

BUILT_IN = ("IMNET", "CIFAR", "CIFAR10", "INAT", "INAT19", "DIGITS", "FAKE")
TIMM_PREFIXES = ("torch", "hfds", "wds")
FAKE_SIZES = {"train": 1024, "val": 256}


def build_source(args: Namespace, is_training: bool) -> Dataset:
    """The data set that --data-set names, without transforms: items are (PIL image, label).

    Raises:
        SystemExit: an unknown name, or files that are missing or cannot be read.
    """
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
    if not name.lower().startswith("hfds/"):  # whose --data-path is a cache that need not exist
        if not args.data_path:
            raise SystemExit(f"error: --data-set {name} needs --data-path, the folder that holds it")
        if not Path(args.data_path).is_dir():
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
        refused = refusal(error)
        reason = f"a file {refused}" if refused else " ".join(str(error).split()) or type(error).__name__
        raise SystemExit(
            f"error: --data-set {name} cannot be read from {args.data_path or 'the hub'}: {reason}"
        ) from None


def count_classes(args: Namespace, train: Dataset | None, val: Dataset) -> int:
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


def image_name(source: Dataset, index: int) -> str:
    """Path of an image, or its number where it has none."""
    if hasattr(source, "samples"):
        return source.samples[index][0]
    if isinstance(source, timm.data.ImageDataset):
        return str(source.filename(index))
    return f"number {index}"


class Digits(Dataset):
    """The 1,797 scanned digits that ship with scikit-learn, 8 x 8 pixels; a fifth of each class is for validation."""

    classes = tuple("0123456789")

    def __init__(self, is_training: bool):
        from sklearn.datasets import load_digits  # here, as scikit-learn takes a second to import
        from sklearn.model_selection import train_test_split

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
        unknown = {rank_of[category] for category in category_of.values()} - index_of.keys()
        if unknown:
            raise ValueError(f"{split}{year}.json has classes that train{year}.json lacks: {_some(unknown)}")
        labels = [index_of[rank_of[category_of[image["id"]]]] for image in chosen["images"]]
        self.samples = [(str(root / path), label) for path, label in zip(paths, labels, strict=True)]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index: int):
        path, label = self.samples[index]
        return torchvision.datasets.folder.pil_loader(path), label


def _image_folder(root: Path, split: str) -> Dataset:
    if not (root / split).is_dir():
        found = ", ".join(sorted(entry.name for entry in root.iterdir() if entry.is_dir())) or "no folder"
        raise SystemExit(
            f"error: --data-path {root} has no folder {split!r} (found: {found}); see --train-split, --val-split"
        )
    return torchvision.datasets.ImageFolder(str(root / split))


def _timm_source(args: Namespace, is_training: bool) -> Dataset:
    prefix, _, name = args.data_set.partition("/")
    prefix = prefix.lower()
    split = args.train_split if is_training else args.val_split or "validation"
    if prefix == "hfds":
        _give_name_to_hugging_face()
    if prefix == "torch":
        _require_torch_split(name.lower(), args.data_path, split, is_training)
    options = {"seed": args.seed} if prefix == "wds" else {}
    return timm.data.create_dataset(
        args.data_set,
        root=args.data_path or None,
        split=split,
        is_training=is_training,
        batch_size=args.batch_size,
        **options,
    )


def _require_torch_split(name: str, root: str, split: str, is_training: bool):
    """Refuse what timm would misread: an unknown split as the test set, a folder without sub-folders as any split."""
    train, test = ("train", "training"), ("val", "valid", "validation", "eval", "evaluation", "test")
    synonyms = next((names for names in (train, test) if split in names), (split,))
    if name in ("image_folder", "folder"):
        if not any((Path(root) / folder).is_dir() for folder in synonyms):
            raise FileNotFoundError(f"it has no folder {' or '.join(synonyms)}")
    elif name in ("cifar10", "cifar100", "mnist", "qmnist", "kmnist", "fashion_mnist"):
        allowed = train if is_training else test
        if split not in allowed:
            flag = "--train-split" if is_training else "--val-split"
            raise ValueError(f"{flag} {split} is not one of {', '.join(allowed)}")


def _give_name_to_hugging_face():
    """Let `import datasets`, inside timm, find Hugging Face's package and not this module of the same name.

    Who imported this module before keeps it.
    """
    here = Path(__file__).parents[1].resolve()
    elsewhere = [entry for entry in sys.path if Path(entry).resolve() != here]
    spec = PathFinder.find_spec("datasets", elsewhere)
    if spec is None:
        raise ModuleNotFoundError("Hugging Face's package is not installed; pip install datasets")
    if getattr(sys.modules.get("datasets"), "__file__", None) == spec.origin:
        return
    package = importlib.util.module_from_spec(spec)
    sys.modules["datasets"] = package
    spec.loader.exec_module(package)


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
