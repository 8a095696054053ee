"""The registry of evaluation sets: what `--eval-sets NAME=PATH` can name, and how each of them is read.

To add a set, write a function here that reads its folder and decorate it with `evaluation_set`. Its docstring says what
PATH must hold. The help of `--eval-sets` and the table of the documentation follow from the entry in `EVALUATION_SETS`.
Nothing is downloaded.
"""

import functools
import pkgutil
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from timm.data import ImageNetInfo, RealLabelsImagenet

from pipeline.evaluation_set_images import SetImages, listed, read_classes, read_corruptions

CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
"""The corruptions of ImageNet-C whose errors make its mean corruption error."""

EXTRA_CORRUPTIONS = ("gaussian_blur", "saturate", "spatter", "speckle_noise")
"""Those that are published beside them, for validation."""

NUM_VALIDATION = 50_000
"""Validation images of ImageNet-1k."""


@dataclass(frozen=True)
class EvaluationSet:
    """A set that `--eval-sets` can name.

    Attributes:
        name: the NAME of NAME=PATH.
        title: what it is, in a few words.
        doc: the docstring of the function that reads it: what PATH must hold.
        read: PATH -> images. Raises ValueError for a folder that is not the set's. None = it has no PATH: it is the
            validation set of --data-set.
        num_images: as published; 0 = any number.
        classes: returns the published classes; empty = any.
        only_its_classes: whether the model's outputs for other classes are left out before the largest is taken.
        whole_image: whether images are evaluated without a crop, as they have been published cropped.
        labels: paths of images -> the synsets that are right for each; None = the class of its folder alone is right.
        has_corruptions: whether it has a corruption error.
    """

    name: str
    title: str
    doc: str
    read: Callable[[Path], SetImages] | None
    num_images: int = 0
    classes: Callable[[], Sequence[str]] = tuple
    only_its_classes: bool = False
    whole_image: bool = False
    labels: Callable[[Sequence[str]], list[list[str]]] | None = None
    has_corruptions: bool = False


EVALUATION_SETS: dict[str, EvaluationSet] = {}
"""{value of NAME: entry}"""


def evaluation_set(name: str, title: str, **settings):
    """Decorator: enter a function that reads a set; `settings` are fields of `EvaluationSet`."""

    def enter(function: Callable) -> Callable:
        assert name not in EVALUATION_SETS, f"{name} is entered twice"
        doc = " ".join(function.__doc__.split())
        EVALUATION_SETS[name] = EvaluationSet(name, title, doc, function, **settings)
        return function

    return enter


@functools.cache
def imagenet_classes() -> tuple[str, ...]:
    """The synsets of ImageNet-1k in the order of the outputs of published models, which is theirs as text."""
    return tuple(ImageNetInfo().label_names())


@functools.cache
def descriptions() -> dict[str, str]:
    """{synset of ImageNet-1k: words for it, such as "tench, Tinca tinca"}"""
    return ImageNetInfo().label_descriptions(as_dict=True)


@functools.cache
def _imagenet_a_classes() -> tuple[str, ...]:
    return tuple(pkgutil.get_data("timm.data", "_info/imagenet_a_synsets.txt").decode().split())


@functools.cache
def _imagenet_r_classes() -> tuple[str, ...]:
    return tuple(pkgutil.get_data("timm.data", "_info/imagenet_r_synsets.txt").decode().split())


def markdown_table() -> str:
    """The documentation's table of sets, one row per entry of `EVALUATION_SETS`."""
    rows = ["| NAME | images | PATH |", "|---|---|---|"]
    return "\n".join([*rows, *(f"| `{each.name}` | {each.title} | {each.doc} |" for each in EVALUATION_SETS.values())])


def paths_needed() -> dict[str, bool]:
    """{NAME: whether it needs a PATH}"""
    return {name: entry.read is not None for name, entry in EVALUATION_SETS.items()}


def sets_help() -> str:
    """The help of `--eval-sets`."""
    return ", ".join(f"{each.name} ({each.title})" for each in EVALUATION_SETS.values())


def _synsets(of: Callable[[], Sequence[str]], title: str) -> Callable[[list[str]], list[str]]:
    """Folder names -> the same; ValueError if they are not classes of a set."""

    def check(folders: list[str]) -> list[str]:
        known = {*of()}
        if other := [name for name in folders if name not in known]:
            verb = "is not" if len(other) == 1 else "are not"
            is_none = len(other) == len(folders) > 1
            only = f"none of the {len(folders)} folders is" if is_none else f"{listed(other)} {verb}"
            found = f" (found: {listed(folders)})" if is_none else ""
            raise ValueError(f"{only} among the {len(known)} synsets of {title}, such as {of()[0]}{found}")
        return folders

    return check


def _numbers_or_synsets(folders: list[str]) -> list[str]:
    """0, 1, ..., 999 -> the synset with this number; names of synsets stay."""
    if not all(name.isdecimal() for name in folders):
        return _synsets(imagenet_classes, "ImageNet-1k")(folders)
    if other := [name for name in folders if int(name) >= len(imagenet_classes()) or name != str(int(name))]:
        raise ValueError(f"folder {listed(other)} is no number of a class, 0 to {len(imagenet_classes()) - 1}")
    return [imagenet_classes()[int(name)] for name in folders]


def real_labels(paths: Sequence[str]) -> list[list[str]]:
    """The synsets that ReaL has for each validation image, by the number in its name; empty where it has none.

    Raises:
        ValueError: a name has no such number.
    """
    of_number = [*RealLabelsImagenet(range(NUM_VALIDATION)).real_labels.values()]
    labels = []
    for path in paths:
        number = re.fullmatch(r"ILSVRC2012_val_(\d{8})", Path(path).stem)
        if not number or not 1 <= int(number[1]) <= NUM_VALIDATION:
            raise ValueError(f"ReaL has labels for ILSVRC2012_val_00000001 to _{NUM_VALIDATION:08d}, not for {path}")
        labels.append([imagenet_classes()[index] for index in of_number[int(number[1]) - 1]])
    return labels


# The sets

VAL = EvaluationSet("val", "without PATH: the validation images of --data-set", "None: see `--data-set`.", None)
EVALUATION_SETS[VAL.name] = VAL


@evaluation_set("imagenet", "validation images of ImageNet-1k", num_images=NUM_VALIDATION, classes=imagenet_classes)
def _imagenet(path: Path) -> SetImages:
    """Files `SYNSET/IMAGE`: the `val` folder of ImageNet."""
    return read_classes(path, _synsets(imagenet_classes, "ImageNet-1k"))


@evaluation_set("imagenet-real", "the same, with the ReaL labels that timm has", num_images=NUM_VALIDATION,
                classes=imagenet_classes, labels=real_labels)  # fmt: skip
def _imagenet_real(path: Path) -> SetImages:
    """Files `SYNSET/ILSVRC2012_val_NUMBER.*`: the `val` folder of ImageNet. Images for which ReaL has no label are
    left out."""
    return read_classes(path, _synsets(imagenet_classes, "ImageNet-1k"))


@evaluation_set("imagenet-v2", "ImageNet-V2, any of its three variants", num_images=10_000, classes=imagenet_classes)
def _imagenet_v2(path: Path) -> SetImages:
    """Files `NUMBER/IMAGE` with the numbers 0 to 999 of the classes, as published, or `SYNSET/IMAGE`."""
    return read_classes(path, _numbers_or_synsets)


@evaluation_set("imagenet-a", "ImageNet-A", num_images=7_500, classes=_imagenet_a_classes, only_its_classes=True)
def _imagenet_a(path: Path) -> SetImages:
    """Files `SYNSET/IMAGE` of 200 classes. Only the outputs of these classes are compared."""
    return read_classes(path, _synsets(_imagenet_a_classes, "ImageNet-A"))


@evaluation_set("imagenet-r", "ImageNet-R", num_images=30_000, classes=_imagenet_r_classes, only_its_classes=True)
def _imagenet_r(path: Path) -> SetImages:
    """Files `SYNSET/IMAGE` of 200 classes. Only the outputs of these classes are compared."""
    return read_classes(path, _synsets(_imagenet_r_classes, "ImageNet-R"))


@evaluation_set("imagenet-sketch", "ImageNet-Sketch", num_images=50_889, classes=imagenet_classes)
def _imagenet_sketch(path: Path) -> SetImages:
    """Files `SYNSET/IMAGE`: the folder `sketch`."""
    return read_classes(path, _synsets(imagenet_classes, "ImageNet-1k"))


@evaluation_set("imagenet-c", "ImageNet-C, with the mean corruption error", num_images=75 * NUM_VALIDATION,
                classes=imagenet_classes, whole_image=True, has_corruptions=True)  # fmt: skip
def _imagenet_c(path: Path) -> SetImages:
    """Files `CORRUPTION/SEVERITY/SYNSET/IMAGE` of 15 corruptions and severities 1 to 5, also in folders such as
    `noise/CORRUPTION`. The images, of 224 px, are not cropped."""
    return read_corruptions(path, CORRUPTIONS, EXTRA_CORRUPTIONS, _synsets(imagenet_classes, "ImageNet-1k"))


@evaluation_set("folder", "any images of classes that the model has")
def _folder(path: Path) -> SetImages:
    """Files `CLASS/IMAGE`. Every class must be one of the model's, by its name; the model may have others."""
    return read_classes(path)
