"""iNaturalist 2018 and 2019, read from the files of the competitions."""

import json
from pathlib import Path

from torch.utils.data import Dataset

from pipeline.images import read_rgb


class INaturalist(Dataset):
    """iNaturalist 2018 or 2019 as the competition's archives and annotation files are after unpacking.

    `root` holds `<split><year>.json`, `train<year>.json` (which orders the classes, as in DeiT), `categories.json`, and
    the images at the paths of the annotations or, as DeiT has them, without the super-category folder.

    Args:
        root: folder of the files.
        split: "train" or "val".
        year: 2018 or 2019.
        category: the taxonomic rank that serves as the label, e.g. "name" for the species.

    Raises:
        ValueError: the split has classes that the training split lacks.
    """

    def __init__(self, root: Path, split: str, year: int, category: str):
        rank_of = {entry["id"]: entry[category] for entry in json.loads((root / "categories.json").read_text())}
        train = json.loads((root / f"train{year}.json").read_text())
        chosen = train if split == "train" else json.loads((root / f"{split}{year}.json").read_text())
        self.classes = list(dict.fromkeys(rank_of[entry["category_id"]] for entry in train["annotations"]))
        index_of = {name: index for index, name in enumerate(self.classes)}
        category_of = {entry["image_id"]: entry["category_id"] for entry in chosen["annotations"]}
        unknown = {rank_of[category] for category in category_of.values()} - index_of.keys()
        if unknown:
            raise ValueError(
                f"{split}{year}.json has classes that train{year}.json lacks: {', '.join(sorted(unknown)[:3])}"
            )
        paths = [Path(image["file_name"]) for image in chosen["images"]]
        if paths and not (root / paths[0]).exists():
            paths = [Path(path.parts[0], *path.parts[2:]) for path in paths]
        labels = [index_of[rank_of[category_of[image["id"]]]] for image in chosen["images"]]
        self.root = str(root)
        self.samples = [(str(root / path), label) for path, label in zip(paths, labels, strict=True)]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index: int):
        path, label = self.samples[index]
        return read_rgb(open(path, "rb")), label
