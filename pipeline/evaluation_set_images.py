"""The images of an evaluation set, read from the folders in which it is published."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch.utils.data import Dataset
from torchvision.datasets.folder import is_image_file

from pipeline.image_folder import ImageFolder, is_hidden

SEVERITIES = ("1", "2", "3", "4", "5")
"""Names of the folders in a corruption's folder of ImageNet-C."""


@dataclass
class SetImages(Dataset):
    """Image files with labels. `ReadableImages` reads them.

    Attributes:
        root: the folder of the set.
        samples: (path, label) of each image.
        classes: names of the labels.
        parts: {"corruption/severity": its images}; empty for a set without parts.
        note: what a user should know about the files.
    """

    root: str
    samples: list[tuple[str, int]]
    classes: list[str]
    parts: dict[str, slice] = field(default_factory=dict)
    note: str = ""

    def __len__(self):
        return len(self.samples)

    def names(self) -> list[str]:
        """The path of each image in the folder of the set."""
        return [Path(path).relative_to(self.root).as_posix() for path, _ in self.samples]


def folders_in(folder: Path) -> list[str]:
    """Names of the folders in a folder, without hidden ones.

    Raises:
        ValueError: there is no such folder.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not is_hidden(entry.name))


def read_classes(root: Path, rename: Callable[[list[str]], list[str]] = lambda names: names) -> SetImages:
    """The images of `root/CLASS/IMAGE`.

    Args:
        root: the folder of the class folders.
        rename: names of the class folders -> names of their classes; raises ValueError for names that are none.

    Raises:
        ValueError: no such folder, no class folder, one without images, or names that are no classes.
    """
    found = folders_in(root)
    if not found:
        has_images = any(is_image_file(entry.name) for entry in root.iterdir())
        raise ValueError(f"{root} has {'images' if has_images else 'nothing'} in place of a folder for each class")
    classes = rename(found)
    folder = ImageFolder(root, allow_empty=True)
    labels = {label for _, label in folder.samples}
    if empty := [name for label, name in enumerate(folder.classes) if label not in labels]:
        note = f"; {folder.note}" if folder.note else ""
        raise ValueError(f"{listed(empty)} in {root} has no image{note}")
    return SetImages(str(root), folder.samples, classes, note=folder.note)


def read_corruptions(
    root: Path, corruptions: Sequence[str], left_out: Sequence[str], rename: Callable[[list[str]], list[str]]
) -> SetImages:
    """The images of `root/CORRUPTION/SEVERITY/CLASS/IMAGE`, or of `root/GROUP/CORRUPTION/...`, as ImageNet-C has them.

    Args:
        root: the folder of the corruptions.
        corruptions: those that are read, in this order.
        left_out: names of further ones, which a note reports.
        rename: as for `read_classes`.

    Raises:
        ValueError: no corruption is there, or one has another folder than its severities, or other classes.
    """
    places = _corruption_folders(root, {*corruptions, *left_out})
    if not {*corruptions} & {*places}:
        found = listed(folders_in(root)) or "no folder"
        raise ValueError(f"{root} has no folder of a corruption, such as {corruptions[0]}/1 (found: {found})")
    images = SetImages(str(root), [], [])
    for corruption in filter(places.get, corruptions):
        severities = folders_in(places[corruption])
        if other := {*severities} - {*SEVERITIES}:
            raise ValueError(f"{places[corruption]} has {listed(sorted(other))} in place of severities 1 to 5")
        for severity in severities:
            part = read_classes(places[corruption] / severity, rename)
            images.classes = images.classes or part.classes
            if part.classes != images.classes:
                differ = sorted({*part.classes} ^ {*images.classes})
                raise ValueError(f"{part.root} has other classes than the first severity: {listed(differ)}")
            images.parts[f"{corruption}/{severity}"] = slice(len(images), len(images) + len(part))
            images.samples += part.samples
    expected = [f"{corruption}/{severity}" for corruption in corruptions for severity in SEVERITIES]
    missing = [name for name in expected if name not in images.parts]
    others = [name for name in left_out if name in places]
    notes = [f"{len(missing)} of {len(expected)} severities are missing: {listed(missing)}"] if missing else []
    notes += [f"left out, as they are not in its mean: {', '.join(others)}"] if others else []
    images.note = "; ".join(notes)
    return images


def _corruption_folders(root: Path, known: Collection[str]) -> dict[str, Path]:
    """{corruption: its folder}, of known ones in `root` and in the other folders there."""
    places = {}
    for name in folders_in(root):
        inner = [] if name in known else [root / name / each for each in folders_in(root / name)]
        for place in (root / name, *inner):
            if place.name in places:
                raise ValueError(f"{place.name} is at {places[place.name]} and at {place}; leave one of them")
            if place.name in known:
                places[place.name] = place
    return places


def listed(names: list[str], count: int = 3) -> str:
    """The first names, for a message."""
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
