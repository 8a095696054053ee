"""Labelled images in a random order, spread over the classes, without augmentation."""

from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset

from pipeline.holdout import complete, numbers


def known_labels(source: Dataset) -> list[int] | None:
    """The labels of a data set, if it knows them without reading its images."""
    whole = complete(source)
    reader = getattr(whole, "reader", whole)
    labels = getattr(whole, "targets", getattr(whole, "labels", None))
    if labels is None and hasattr(reader, "samples"):  # of folders: (path, label)
        labels = [label for _, label in reader.samples]
    elif labels is None and hasattr(reader, "iter_targets"):  # of Hugging Face
        labels = [*reader.iter_targets()]
    labels = np.asarray([] if labels is None else labels)
    if labels.shape != (len(whole),) or labels.dtype.kind not in "iu":
        return None
    return labels[numbers(source)].tolist()


def spread_sample(labels: Sequence[int] | None, num_images: int, count: int, seed: int) -> list[int]:
    """Numbers of images in a random order.

    Args:
        labels: of all images; None where they are not known.
        num_images: how many there are.
        count: how many are chosen, all if there are fewer; 0 = all.
        seed: of the choice and its order.

    Returns:
        `count` numbers. With labels, no class has two images more than another that has images left.
    """
    generator = np.random.default_rng(seed)
    order = generator.permutation(num_images)
    if labels is not None:
        seen, ranks = {}, []
        for label in np.asarray(labels)[order].tolist():
            seen[label] = seen.get(label, 0) + 1
            ranks.append(seen[label])
        order = order[np.argsort(ranks, kind="stable")]  # the first image of each class, then the second ones, ...
    return generator.permutation(order[: count or num_images]).tolist()
