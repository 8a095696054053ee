"""The classes of an evaluation set are matched by name with the outputs of a model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from pipeline.evaluation_set_images import SetImages, listed
from pipeline.evaluation_sets import EVALUATION_SETS, EvaluationSet, imagenet_classes
from pipeline.run_data import Data


@dataclass
class OpenSet:
    """A set that is ready to be evaluated.

    Attributes:
        entry: of the registry.
        label: what tables and files call it.
        path: its folder.
        images: their labels are numbers in `classes`.
        classes: names of the outputs that are compared.
        outputs: their numbers among the outputs of the model; None = all, in this order.
        num_classes: classes that have images.
        right: numbers in `classes` that are right for each image; None = its label alone.
        lines: what a user should know about it.
        data: its batches, if they are there; its `images` then have no files.
    """

    entry: EvaluationSet
    label: str
    path: str
    images: SetImages
    classes: list[str]
    outputs: list[int] | None
    num_classes: int
    right: list[list[int]] | None
    lines: list[str]
    data: Data | None = None

    def names(self) -> list[str]:
        """The path of each image in the folder of the set; its number where it has no file."""
        return self.images.names() if self.data is None else self.data.val_names()


@dataclass
class OpenSets:
    """The sets of an evaluation.

    Attributes:
        sets: in the order of the command line.
        num_classes: outputs of the model.
        notes: lines about the names of its outputs.
    """

    sets: list[OpenSet]
    num_classes: int
    notes: list[str]

    def lines(self) -> list[str]:
        """What an evaluation prints before it begins."""
        return [*self.notes, *(line for each in self.sets for line in each.lines)]


class Outputs(NamedTuple):
    """Names of a model's outputs, and lines about where they are from."""

    names: list[str]
    notes: list[str]


def name_outputs(classes: Sequence[str], num_classes: int | None, file: str) -> Outputs:
    """Name the outputs of a model: as its file does, otherwise as ImageNet-1k does.

    Args:
        classes: names that the file of the weights contains.
        num_classes: the value of --num-classes; without names, None means 1000.
        file: of the weights.

    Raises:
        SystemExit: there are no names, and the outputs are not as many as those of ImageNet-1k.
    """
    if classes:  # a model may have more outputs than its data had classes
        unused = (f"output {number}" for number in range(len(classes), num_classes or 0))
        return Outputs([*classes, *unused], [])
    if num_classes not in (None, len(imagenet_classes())):
        raise SystemExit(
            f"error: --eval-sets matches classes by name, but {file} does not name its {num_classes} classes; it needs "
            "a checkpoint of this program, or a model of the 1000 classes of ImageNet-1k"
        )
    line = "does not name its classes, so its outputs are taken for the 1000 synsets of ImageNet-1k, in their order"
    return Outputs([*imagenet_classes()], [f"{file} {line}"])


def open_sets(words: Sequence[str], outputs: Outputs, build_val: Callable[[Sequence[str]], Data]) -> OpenSets:
    """Find the images of each set, and match their classes with those of a model.

    Args:
        words: NAME=PATH of each set; the second set of a name is called NAME-2.
        build_val: names of the outputs -> the validation images of --data-set, which the set `val` is.

    Raises:
        SystemExit: a folder is not that of its set, or has no class of the model.
    """
    sets = []
    for word in words:
        name, _, path = word.partition("=")
        if EVALUATION_SETS[name].read is None:
            sets.append(_of_data(EVALUATION_SETS[name], build_val(outputs.names)))
            continue
        number = 1 + sum(each.entry.name == name for each in sets)
        try:
            sets.append(_open(EVALUATION_SETS[name], name if number == 1 else f"{name}-{number}", path, outputs))
        except ValueError as error:
            raise SystemExit(f"error: --eval-sets {word}: {error}") from None
        except OSError as error:
            raise SystemExit(f"error: --eval-sets {word}: {error.filename} cannot be read: {error.strerror}") from None
    return OpenSets(sets, len(outputs.names), outputs.notes)


def _open(entry: EvaluationSet, label: str, path: str, named: Outputs) -> OpenSet:
    outputs, why = named.names, "".join(f"; {note}" for note in named.notes)
    images = entry.read(Path(path))
    published = {*entry.classes()}
    compared = [name for name in outputs if name in published] if entry.only_its_classes else outputs
    number = {name: index for index, name in enumerate(compared)}
    unknown = [name for name in images.classes if name not in number]
    if len(unknown) == len(images.classes):
        raise ValueError(f"none of its classes, {listed(unknown)}, is one of the model's: {listed(outputs)}{why}")
    if unknown and not published:
        raise ValueError(f"{listed(unknown)} is no class of the model, which has {listed(outputs)}{why}")
    if entry.labels and (lacks := published - {*outputs}):
        raise ValueError(f"the model lacks {len(lacks)} of the {len(published)} classes that labels are of")
    chosen = _of_classes(images, number)
    right = entry.labels and [[number[name] for name in names] for names in entry.labels(chosen.names())]
    num_classes = len({label for _, label in chosen.samples})
    of_model = [outputs.index(name) for name in compared] if entry.only_its_classes else None
    lines = [f"{label}: {line}" for line in _facts(entry, chosen, right, num_classes, len(compared), path)]
    if entry.num_images and len(images) != entry.num_images:
        text = f"the folder has {len(images):,} images, and {entry.num_images:,} are published"
        lines.append(f"warning: {label}: {text}")
    if unknown:
        text = f"{len(images) - len(chosen):,} images of {len(unknown)} classes that the model does not have"
        lines.append(f"warning: {label}: {text} are left out: {listed(unknown)}")
    return OpenSet(entry, label, path, chosen, compared, of_model, num_classes, right, lines)


def _of_data(entry: EvaluationSet, data: Data) -> OpenSet:
    classes = data.classes or [*map(str, range(data.num_classes))]
    line = f"{data.num_val:,} validation images, {data.num_val_classes} of {len(classes)} compared classes"
    lines = [f"{entry.name}: {text}" for text in (line, *data.notes)]
    images = SetImages("", [], classes)
    return OpenSet(entry, entry.name, "", images, classes, None, data.num_val_classes, None, lines, data)


def _facts(
    entry: EvaluationSet, images: SetImages, right: Sequence | None, num_classes: int, num_compared: int, path: str
) -> list[str]:
    """What is evaluated, and how."""
    labelled = f", {sum(map(bool, right)):,} of them with ReaL labels" if right else ""
    facts = [f"{len(images):,} images of {path}, {num_classes} of {num_compared} compared classes{labelled}"]
    if entry.only_its_classes:
        facts.append(f"only the {num_compared} outputs for its classes are compared")
    if entry.whole_image:
        facts.append("images are not cropped, whatever --eval-crop-ratio is")
    return [*facts, *filter(None, [images.note])]


def _of_classes(images: SetImages, number: dict[str, int]) -> SetImages:
    """The images of known classes, with the numbers of these as labels."""
    numbers = [number.get(name) for name in images.classes]
    is_kept = [numbers[label] is not None for _, label in images.samples]
    samples = [(path, numbers[label]) for path, label in images.samples if numbers[label] is not None]
    parts, end = {}, 0
    for name, part in images.parts.items():
        start, end = end, end + sum(is_kept[part])
        parts[name] = slice(start, end)
    return replace(images, samples=samples, classes=[*number], parts=parts)
