"""A validation part of the training images (--val-fraction): an evenly spread fraction of each class."""

from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset, Subset


class Part(Subset):
    """Some images of a data set, in its order.

    Args:
        dataset: the complete data set, map-style.
        indices: numbers of the images in it, increasing.
        note: what a user should know about its files.
    """

    def __init__(self, dataset: Dataset, indices: np.ndarray, note: str = ""):
        super().__init__(dataset, indices)
        self.note = note


def complete(source: Dataset) -> Dataset:
    """The data set that a part is of; any other data set is returned unchanged."""
    return source.dataset if isinstance(source, Part) else source


def located(source: Dataset, index: int) -> tuple[Dataset, int]:
    """The complete data set that has an image of `source`, and the number of the image in it."""
    return complete(source), int(numbers(source)[index])


def numbers(source: Dataset) -> Sequence[int]:
    """The numbers of a data set's images, for a part those in the complete data set."""
    return source.indices if isinstance(source, Part) else range(len(source))


def divide(source: Dataset, labels: Sequence[int], fraction: float, names: Sequence[str]) -> tuple[Part, Part]:
    """Divide a data set into a part to train on and a part to evaluate on, which no random number decides.

    Of n images of a class, the nearest integer to n * fraction are evaluated on, at equal distances in the order of the
    data set.

    Args:
        source: map-style data set.
        labels: of all its images.
        fraction: of each class that is evaluated on, above 0 and below 1.
        names: of the classes, for messages; empty = they have none.

    Raises:
        SystemExit: a class would have no image in one of the parts.
    """
    labels = np.asarray(labels)
    classes, sizes = np.unique(labels, return_counts=True)
    smallest = sizes.argmin()  # if it has an image in both parts, each class has
    size, count = sizes[smallest], round(sizes[smallest] * fraction)
    if count in (0, size):
        label = classes[smallest]
        name = names[label] if label < len(names) else label
        if size == 1:
            raise SystemExit(f"error: --val-fraction cannot divide class {name}, which has one training image")
        lacks, other = ("evaluate", "larger") if count == 0 else ("train", "smaller")
        raise SystemExit(
            f"error: --val-fraction {fraction:g} leaves class {name}, the smallest with {size} training images, none "
            f"to {lacks} on; take a {other} fraction"
        )
    is_val = np.zeros(len(labels), dtype=bool)
    for of_class in np.split(np.argsort(labels, kind="stable"), sizes.cumsum()[:-1]):
        size, count = len(of_class), round(len(of_class) * fraction)
        is_val[of_class[(2 * np.arange(count) + 1) * size // (2 * count)]] = True
    number = f"{is_val.sum():,} of {len(labels):,} training images"
    note = f"evaluation on {number}, a fraction of {fraction:g} of each class"
    train = Part(source, np.flatnonzero(~is_val), getattr(source, "note", ""))
    return train, Part(source, np.flatnonzero(is_val), note)


def val_name(val_split: str | None, val_fraction: float) -> str:
    """What reports call the images that a run was evaluated on."""
    return f"validation part {val_fraction:g}" if val_fraction else val_split or "validation"
