"""Folders of images: one for each class, or one without labels."""

import collections
import os
from pathlib import Path

import torchvision
from torchvision.datasets.folder import is_image_file


class ImageFolder(torchvision.datasets.ImageFolder):
    """torchvision's, without hidden classes and files: those whose name, or a folder's above them, begins with a dot.

    Such are `._cat.jpg` and `.DS_Store` of macOS, and `.ipynb_checkpoints`.

    Attributes:
        left_out: {extension: number of files that are no images by their name}.
    """

    def __init__(self, root: str | Path, allow_empty: bool = False):
        self.left_out = collections.Counter()
        self._start = len(str(root))
        try:
            super().__init__(str(root), is_valid_file=self._is_image, allow_empty=allow_empty)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}{self.note}") from None

    @property
    def note(self) -> str:
        """A line about the files that were left out; empty if there are none."""
        if not self.left_out:
            return ""
        kinds = ", ".join(f"{extension} {number:,}" for extension, number in self.left_out.most_common(5))
        more = ", ..." if len(self.left_out) > 5 else ""
        return f"files left out for their extension in {self.root}: {self.left_out.total():,} ({kinds}{more})"

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        names = sorted(entry.name for entry in os.scandir(directory) if entry.is_dir() and not is_hidden(entry.name))
        if not names:
            raise FileNotFoundError(f"there is no class folder in {directory}")
        return names, {name: index for index, name in enumerate(names)}

    def _is_image(self, path: str) -> bool:
        if is_hidden(path[self._start :]):
            return False
        is_image = is_image_file(path)
        if not is_image:
            self.left_out[os.path.splitext(path)[1].lower() or "no extension"] += 1
        return is_image


class UnlabelledFolder(ImageFolder):
    """All images in a folder and the folders in it, in the order of their paths; the label 0 of each says nothing."""

    def __init__(self, root: str | Path):
        super().__init__(root, allow_empty=True)
        if not self.samples:
            raise FileNotFoundError(f"there is no image in it. {self.note}")

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        return [""], {"": 0}


def is_hidden(name: str) -> bool:
    """Whether a relative path, or one of the folders in it, begins with a dot."""
    return name.startswith(".") or f"{os.sep}." in name
