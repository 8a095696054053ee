"""Flowers-102 and Stanford Cars, read from the files that their authors publish, in the folders of torchvision."""

from collections.abc import Sequence
from pathlib import Path

import torchvision


class Flowers102(torchvision.datasets.Flowers102):
    """torchvision's, with the split "trainval": the images of "train" and then those of "val".

    The published splits have 1,020, 1,020 and 6,149 images; DeiT trains on the first two.

    Args:
        root: of the folder `flowers-102`.
        split: "train", "val", "test" or "trainval".

    Raises:
        ValueError: another split, or a file that is not the published one.
        FileNotFoundError: a file is missing.

    Attributes:
        samples: (path, label) of each image.
    """

    SPLITS = ("train", "val", "test", "trainval")

    def __init__(self, root: str, split: str):
        _check(root, "flowers-102", ("jpg", "imagelabels.mat", "setid.mat"), split, self.SPLITS)
        self.samples = []
        for part in ("train", "val") if split == "trainval" else (split,):
            try:
                super().__init__(root, part)
            except Exception as error:  # scipy raises anything
                reason = error if not isinstance(error, RuntimeError) else "it is not the published file"  # by checksum
                raise ValueError(f"flowers-102/imagelabels.mat or setid.mat: {reason}") from None
            pairs = zip(self._image_files, self._labels, strict=True)
            self.samples += [(str(path), int(label)) for path, label in pairs]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index: int):
        path, label = self.samples[index]
        return self.loader(path), label


class StanfordCars(torchvision.datasets.StanfordCars):
    """torchvision's; the published splits have 8,144 and 8,041 images.

    Args:
        root: of the folder `stanford_cars`.
        split: "train" or "test".

    Raises:
        ValueError: another split, or a file without annotations.
        FileNotFoundError: a file is missing.

    Attributes:
        samples: (path, label) of each image.
    """

    SPLITS = ("train", "test")

    def __init__(self, root: str, split: str):
        annotations = "devkit/cars_train_annos.mat" if split == "train" else "cars_test_annos_withlabels.mat"
        names = ("devkit/cars_meta.mat", annotations, f"cars_{split}")
        _check(root, "stanford_cars", names, split, self.SPLITS)
        try:
            super().__init__(root, split)
        except Exception as error:  # scipy raises anything
            raise ValueError(f"stanford_cars/{annotations} or devkit/cars_meta.mat: {error}") from None
        self.samples = [(path, int(label)) for path, label in self._samples]


def _check(root: str, folder: str, names: Sequence[str], split: str, splits: Sequence[str]):
    """Raise for a split that there is not, or for the first file of `names` that is missing."""
    if split not in splits:
        raise ValueError(f"it has no split {split}; there are {', '.join(splits)}")
    for name in names:
        if not Path(root, folder, name).exists():
            raise FileNotFoundError(f"there is no {folder}/{name} in it")
