"""The training and validation images of a run, as batches: epochs that resume, and what a run says about its data."""

import copy
import itertools
import math
import textwrap
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch.utils.data import DataLoader, IterableDataset, Subset, default_collate

from pipeline import holdout
from pipeline.cached_loader import CachedLoader
from pipeline.images import image_name
from pipeline.prefetch import Prefetcher
from utils import World, reseed


@dataclass
class Data:
    """The loaders of a run.

    Attributes:
        train: the training loader; its batches are read through `batches`. A `CachedLoader` returns them augmented and
            normalised, on the device. None when a run only evaluates.
        val: batches of normalised images; from a `Prefetcher` they are on the device.
        classes: their names in the order of the model's outputs; empty where the data does not know them.
        num_train: training images, each counted once.
        num_val: validation images of all processes together.
        num_val_classes: classes of the validation images, which in an evaluation may be some of the model's.
        has_labels: whether the labels of batches say anything.
        num_steps: optimizer steps of an epoch.
        accum_steps: batches of a step.
        seed: of the order of a stream.
        notes: what a user should know about the files.
        earlier_bad_images: names of unreadable training images that earlier processes of this run have met.
        prefetcher: sends the training batches to the device as bytes; None = the loader returns them normalised.
    """

    train: DataLoader | CachedLoader | None
    val: DataLoader | Prefetcher
    num_classes: int
    num_val: int
    classes: list[str] = field(default_factory=list)
    num_train: int = 0
    num_val_classes: int = 0
    has_labels: bool = True
    num_steps: int = 0
    accum_steps: int = 1
    seed: int = 0
    notes: list[str] = field(default_factory=list)
    earlier_bad_images: Collection[str] = ()
    prefetcher: Prefetcher | None = None

    def description(self) -> dict[str, object]:
        """What a checkpoint contains about its data."""
        sizes = {"train_images": self.num_train, "val_images": self.num_val, "steps": self.num_steps}
        return {"classes": self.classes, "num_classes": self.num_classes} | sizes

    @property
    def are_some_classes(self) -> bool:
        """Whether the validation images are of some of the model's classes, which then were matched by name."""
        return 0 < self.num_val_classes < self.num_classes

    def lines(self) -> list[str]:
        """What a run prints about its data: the classes, and notes."""
        names = ", ".join(self.classes[:3]) + (", ..." if len(self.classes) > 3 else "")
        line = f"{self.num_classes} classes: {names}" if names else f"{self.num_classes} classes without names"
        return [textwrap.shorten(line, 100, placeholder=" ..."), *self.notes]

    def batches(self, epoch: int, step: int) -> Iterable:
        """The training batches of an epoch from an optimizer step on.

        Earlier batches are skipped without being read. A stream reads them again, with the same result where the number
        of its worker processes, at least one, is the same.
        """
        first, end = step * self.accum_steps, self.num_steps * self.accum_steps
        if self.is_stream:
            self.train.dataset.set_epoch(epoch)
            self.train.dataset.reader.ds = None  # timm's pipeline would continue to draw from where it was
            reseed("order", self.seed, epoch)  # the loader draws its workers' seeds from it
            batches = itertools.islice(self.train, first, end)
        else:
            self.train.batch_sampler.start(epoch, first)
            batches = self.train
        return batches if self.prefetcher is None else self.prefetcher.with_batches(batches)

    def end_epochs_after(self, step: int):
        """End each epoch after this many optimizer steps, or sooner if it has fewer."""
        self.num_steps = min(step, self.num_steps)
        if not self.is_stream:
            self.train.batch_sampler.num_batches = self.num_steps * self.accum_steps

    def step_images(self, step: int) -> str:
        """Which images an optimizer step of this epoch reads on this process."""
        if self.is_stream:
            return "images of a stream"
        batches = self.train.batch_sampler.batches(step * self.accum_steps, (step + 1) * self.accum_steps)
        numbers = holdout.numbers(self.train.dataset.source)
        return f"images number {', '.join(str(numbers[sample.index]) for batch in batches for sample in batch)}"

    def bad_images(self, world: World) -> list[str]:
        """Names of the unreadable training images that the run has met so far; every process must call it.

        After a resume they are read again, as they may have been repaired.
        """
        if self.is_stream:
            return []
        images = self.train.dataset
        is_bad = world.sum(images.is_bad.to(world.device, torch.int32))
        names = {image_name(images.source, index, relative=True) for index in is_bad.nonzero().flatten().tolist()}
        return sorted(names.union(self.earlier_bad_images))

    def common_val_batches(self, world: World) -> int:
        """Validation batches that every process has; one process may have an image more than another."""
        return math.ceil(self.num_val // world.size / self.val.batch_sampler.batch_size)

    def first_val_batch(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first validation images [n, 3, S, S] and their labels [n], the same in every process.

        No random number is drawn.
        """
        if self.is_stream:
            with torch.random.fork_rng(devices=()):  # a loader draws a seed for its workers
                num_batches = math.ceil(count / self.val.batch_sampler.batch_size)
                parts = zip(*itertools.islice(self.val, num_batches), strict=True)
                images, labels = (torch.cat(of_batches)[:count] for of_batches in parts)
                return images, labels
        dataset = self.val.dataset.dataset if self.val_is_shared else self.val.dataset
        images, labels, *_ = default_collate([dataset[i] for i in range(min(count, len(dataset)))])
        if isinstance(self.val, Prefetcher):
            [(images, labels)] = copy.copy(self.val).with_batches([(images, labels)])
        return images, labels

    @property
    def val_numbers(self) -> Sequence[int]:
        """Numbers of the validation images, which for a part of the training images are those in all of them."""
        images = self.val.dataset.dataset if self.val_is_shared else self.val.dataset
        return holdout.numbers(images.source)

    def val_names(self) -> list[str]:
        """The path of each validation image in the folder of the data, or its number where it has none."""
        if self.is_stream:
            return [f"number {index}" for index in range(self.num_val)]
        images = self.val.dataset.dataset if self.val_is_shared else self.val.dataset
        return [image_name(images.source, index, relative=True) for index in range(len(images))]

    @property
    def is_stream(self) -> bool:
        """Whether images come one after the other, and not by their number."""
        return isinstance(self.val.dataset, IterableDataset)

    @property
    def val_is_shared(self) -> bool:
        """Whether each process evaluates a share of the validation set, in place of all of it."""
        return isinstance(self.val.dataset, Subset)
