"""The registry of data sets: what `--data-set` can name, and how each of them is opened; `opening.py` opens them.

To add a data set, write a function here that opens it and decorate it with `data_set`. Its docstring says what
`--data-path` must hold. The help of `--data-set`, the checks of its flags, the suggestions for an unknown name and the
table of the documentation follow from the entry in `SOURCES`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import timm.data
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10, CIFAR100, FakeData
from torchvision.datasets.folder import is_image_file

from diversity.spelling import did_you_mean
from pipeline import timm_sets
from pipeline.digits import Digits
from pipeline.fine_grained import Flowers102, StanfordCars
from pipeline.image_folder import ImageFolder, UnlabelledFolder, is_hidden
from pipeline.inaturalist import INaturalist

SOURCE_FLAGS = ("data_path", "train_split", "val_split", "inat_category")


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """Which data set is read. Each field is the flag of its name, which `main.py --help` explains."""

    data_set: str
    data_path: str
    train_split: str
    val_split: str | None
    val_fraction: float
    num_classes: int | None
    inat_category: str
    input_size: int
    batch_size: int
    seed: int

    def split(self, is_training: bool, default_val: str = "val") -> str:
        """The name of the split to read."""
        return self.train_split if is_training else self.val_split or default_val


def _classes_of(dataset: Dataset) -> list[str]:
    """Of a data set of timm or torchvision."""
    reader = getattr(dataset, "reader", None)
    return list(map(str, getattr(dataset, "classes", None) or getattr(reader, "class_to_idx", None) or []))


@dataclass(frozen=True)
class Source:
    """A data set that `--data-set` can name.

    Attributes:
        name: the value of `--data-set`; a name that ends in "/" is a prefix, followed by timm's name for a data set.
        title: what it is, in a few words.
        doc: the docstring of the function that opens it: what `--data-path` must hold, and its splits.
        open: options, whether to open the training split -> data set of (PIL image, label), without transforms.
        flags: those of `SOURCE_FLAGS` that it reads.
        path_is_optional: whether `--data-path` may be empty, or a folder that does not exist yet.
        is_stream: whether its images can only be read one after the other, from shards.
        has_labels: whether its labels say anything; without labels it is for measurements alone.
        start_method: multiprocessing's, for its loader processes; None = the system's usual one.
        class_names: opened data set -> names of its classes in the order of the labels; empty = it does not know them.
    """

    name: str
    title: str
    doc: str
    open: Callable[[SourceOptions, bool], Dataset]
    flags: tuple[str, ...] = ("data_path", "train_split", "val_split")
    path_is_optional: bool = False
    is_stream: bool = False
    has_labels: bool = True
    start_method: str | None = None
    class_names: Callable[[Dataset], list[str]] = _classes_of


SOURCES: dict[str, Source] = {}


def data_set(name: str, title: str, **settings):
    """Enter the decorated function into `SOURCES`; `settings` are further attributes of `Source`."""

    def enter(function: Callable[[SourceOptions, bool], Dataset]):
        assert name not in SOURCES, f"{name} is entered twice"
        SOURCES[name] = Source(name, title, " ".join(function.__doc__.split()), function, **settings)
        return function

    return enter


def find_source(name: str) -> Source:
    """The entry for a value of `--data-set`.

    Raises:
        SystemExit: there is none.
    """
    prefix, slash, _ = name.partition("/")
    key = f"{prefix.lower()}/" if slash else name
    if key not in SOURCES:
        hint = did_you_mean(name.upper(), SOURCES, f"; there are {', '.join(SOURCES)}")
        raise SystemExit(f"error: --data-set {name} is unknown{hint}")
    return SOURCES[key]


def sources_help() -> str:
    """The help of `--data-set`."""
    return ", ".join(f"{_with_rest(source, '...')} ({source.title})" for source in SOURCES.values())


def markdown_table() -> str:
    """The documentation's table of data sets, one row per entry of `SOURCES`."""
    rows = ["| `--data-set` | images | `--data-path` |", "|---|---|---|"]
    rows += [f"| `{_with_rest(source, 'NAME')}` | {source.title} | {source.doc} |" for source in SOURCES.values()]
    return "\n".join(rows)


def _with_rest(source: Source, rest: str) -> str:
    return source.name + (rest if source.name.endswith("/") else "")


# The data sets


@data_set("IMNET", "ImageNet or any image folder")
def _image_folder(options: SourceOptions, is_training: bool) -> Dataset:
    """Files `train/CLASS/IMAGE` and `val/CLASS/IMAGE`; `--train-split` and `--val-split` name other folders."""
    root, split = Path(options.data_path), options.split(is_training)
    if not (root / split).is_dir():
        folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not is_hidden(entry.name))
        found = ", ".join(folders) or "no folder"
        has_images = any(is_image_file(entry.name) for entry in root.iterdir())
        other = "; for images without labels see --data-set UNLABELLED" if has_images else ""
        raise SystemExit(
            f"error: --data-path {root} has no folder {split!r} (found: {found}); see --train-split, --val-split{other}"
        )
    return ImageFolder(root / split)


@data_set("UNLABELLED", "images without labels, for analyze.py alone", flags=("data_path",), has_labels=False,
          class_names=lambda folder: [])  # fmt: skip
def _unlabelled(options: SourceOptions, is_training: bool) -> Dataset:
    """The folder of the images; images in folders of it are used too."""
    return UnlabelledFolder(Path(options.data_path))


@data_set("CIFAR", "CIFAR-100", flags=("data_path",))
def _cifar100(options: SourceOptions, is_training: bool) -> Dataset:
    """The unpacked folder `cifar-100-python`."""
    return CIFAR100(options.data_path, train=is_training)


@data_set("CIFAR10", "CIFAR-10", flags=("data_path",))
def _cifar10(options: SourceOptions, is_training: bool) -> Dataset:
    """The unpacked folder `cifar-10-batches-py`."""
    return CIFAR10(options.data_path, train=is_training)


@data_set("FLOWERS", "Oxford Flowers-102")
def _flowers(options: SourceOptions, is_training: bool) -> Dataset:
    """The folder `flowers-102` with `jpg`, `imagelabels.mat` and `setid.mat`. Splits: `train`, `val`, `test`, and
    `trainval`, the first two together."""
    return Flowers102(options.data_path, options.split(is_training))


@data_set("CARS", "Stanford Cars")
def _cars(options: SourceOptions, is_training: bool) -> Dataset:
    """The folder `stanford_cars` with `cars_train`, `cars_test`, `devkit` and `cars_test_annos_withlabels.mat`. Splits:
    `train` and `test`, which is the default of `--val-split`."""
    return StanfordCars(options.data_path, options.split(is_training, "test"))


@data_set("INAT", "iNaturalist 2018", flags=SOURCE_FLAGS)
def _inaturalist_2018(options: SourceOptions, is_training: bool) -> Dataset:
    """Files `train2018.json`, `val2018.json`, `categories.json` and images; `--inat-category` selects the label."""
    return INaturalist(Path(options.data_path), options.split(is_training), 2018, options.inat_category)


@data_set("INAT19", "iNaturalist 2019", flags=SOURCE_FLAGS)
def _inaturalist_2019(options: SourceOptions, is_training: bool) -> Dataset:
    """Files `train2019.json`, `val2019.json`, `categories.json` and images; `--inat-category` selects the label."""
    return INaturalist(Path(options.data_path), options.split(is_training), 2019, options.inat_category)


@data_set("DIGITS", "1,797 scanned digits", flags=())
def _digits(options: SourceOptions, is_training: bool) -> Dataset:
    """Not needed: scikit-learn has the images, of 8 x 8 pixels. A fifth of each class is for validation."""
    return Digits(is_training)


@data_set("FAKE", "random images, to test a machine", flags=(), class_names=lambda d: [*map(str, range(d.num_classes))])
def _fake(options: SourceOptions, is_training: bool) -> Dataset:
    """Not needed: 1,024 images to train on and 256 to evaluate, of `--num-classes` classes (1,000 by default)."""
    shape = (3, options.input_size, options.input_size)
    size, first = (1024, 0) if is_training else (256, 1024)  # no image is in both
    return FakeData(size, shape, options.num_classes or 1000, random_offset=first)


@data_set("torch/", "data sets of torchvision that timm opens")
def _torchvision(options: SourceOptions, is_training: bool) -> Dataset:
    """What torchvision's class needs, e.g. `torch/image_folder` or `torch/cifar10`; nothing is downloaded."""
    split = options.split(is_training, "validation")
    folder = timm_sets.require_torch_split(options.data_set, options.data_path, split, is_training)
    return ImageFolder(folder) if folder else _open_by_timm(options, is_training)


# A process that does not fork would import this project's datasets.py in place of Hugging Face's package.
@data_set("hfds/", "data sets of Hugging Face", path_is_optional=True, start_method="fork")
def _hugging_face(options: SourceOptions, is_training: bool) -> Dataset:
    """The cache of Hugging Face's package `datasets`; it may be left out."""
    timm_sets.import_hugging_face()
    return _open_by_timm(options, is_training)


@data_set("wds/", "WebDataset shards, read as a stream", is_stream=True)
def _webdataset(options: SourceOptions, is_training: bool) -> Dataset:
    """Tar files and an `info.json` that lists them, as for timm; `--num-classes` is needed."""
    return _open_by_timm(options, is_training, seed=options.seed)


def _open_by_timm(options: SourceOptions, is_training: bool, **settings) -> Dataset:
    return timm.data.create_dataset(
        options.data_set,
        root=options.data_path or None,
        split=options.split(is_training, "validation"),
        is_training=is_training,
        batch_size=options.batch_size,
        **settings,
    )
