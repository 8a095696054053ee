"""`--check-data`: every image is read once, and those that cannot be read are listed."""

import dataclasses
import sys

from torch.utils.data import Dataset, IterableDataset
from tqdm import tqdm

from datasets import DataOptions, loader_settings
from pipeline.classes import find_classes
from pipeline.images import ReadableImages
from pipeline.opening import build_sources
from pipeline.workers import StoppableLoader
from utils import World

BATCH = 32  # images that a loader process reads before it reports


class Problems(Dataset):
    """For each image a line that says why it cannot be read; empty for one that can."""

    def __init__(self, images: ReadableImages):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index: int) -> str:
        return self.images.problem(index)


def check_data(options: DataOptions, world: World):
    """Read all images of both splits once, with the loader processes of a run, and print which cannot be read.

    An evaluation has only the validation split. With several ranks the main process does it alone.

    Raises:
        SystemExit: some cannot be read, the classes of the splits differ, or the data set is a stream.
    """
    if not world.is_main:
        return
    train, val = build_sources(options, is_training=not options.eval)
    if isinstance(val, IterableDataset):
        raise SystemExit(f"error: --check-data reads images by their number; --data-set {options.data_set} is a stream")
    num_classes, _ = find_classes(options, train, val)
    settings = loader_settings(options, dataclasses.replace(world, local_size=1), is_training=True)
    settings |= {"pin_memory": False, "persistent_workers": False}
    total = num_bad = 0
    for name, source in {"training": train, "validation": val}.items():
        if source is None:
            continue
        problems = Problems(ReadableImages(source, transform=None, max_bad=0))
        loader = StoppableLoader(problems, batch_size=BATCH, collate_fn=list, **settings)
        count, bar = 0, tqdm(desc=name, total=len(problems), unit=" images", disable=not sys.stderr.isatty())
        for lines in loader:
            bar.update(len(lines))
            for line in filter(None, lines):
                count += 1
                bar.write(line)
        bar.close()
        print(f"{len(problems):,} {name} images, {count:,} of them unreadable")
        if note := getattr(source, "note", ""):
            print(note)
        total, num_bad = total + len(problems), num_bad + count
    print(f"{num_classes:,} classes")
    if num_bad:
        raise SystemExit(f"error: {num_bad:,} of {total:,} images cannot be read; repair or remove them")
