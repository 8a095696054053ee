"""Data sets on disk for tests, and their loaders."""

import io
import json
import pickle
import tarfile

import numpy as np
import scipy.io
import torch
import torchvision
from helpers import data_options, photo, world

from datasets import build_data


def build(*words, rank=0, size=1):
    return build_data(data_options("--batch-size", 2, *words), world(rank, size))


def labels_of(loader):
    return torch.cat([labels for _, labels in loader]).tolist()


def images_of(loader):
    """Each image as a hashable."""
    return [image.numpy().tobytes() for images, _ in loader for image in images]


def write_cifar(root, kind, sizes):
    """torchvision's pickled files of CIFAR-10 or -100; returns {file: labels}."""
    folder = root / kind.base_folder
    folder.mkdir()
    key = "labels" if kind is torchvision.datasets.CIFAR10 else "fine_labels"
    num_classes = 10 if key == "labels" else 100
    written = {}
    for seed, (file, _) in enumerate(kind.train_list + kind.test_list):
        generator = np.random.RandomState(seed)
        pixels = generator.randint(0, 256, (sizes[file], 3072), dtype=np.uint8)
        written[file] = generator.randint(0, num_classes, sizes[file]).tolist()
        (folder / file).write_bytes(pickle.dumps({"data": pixels, key: written[file]}))
    names = [f"class {index}" for index in range(num_classes)]
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: names}))
    return written


FLOWERS = {"trnid": [6, 2, 5], "valid": [1, 4, 7], "tstid": [8, 3]}  # numbers of images, from 1
FLOWER_LABELS = [102, 7, 7, 1, 102, 50, 3, 50]  # of image 1, 2, ..., from 1
FLOWER_SPLITS = {"train": "trnid", "val": "valid", "test": "tstid"}


def write_flowers(root, size=40):
    """Flowers-102 as it is published, with few images."""
    folder = root / "flowers-102"
    (folder / "jpg").mkdir(parents=True)
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": [FLOWER_LABELS]})
    scipy.io.savemat(folder / "setid.mat", {name: [ids] for name, ids in FLOWERS.items()})
    for number in range(1, len(FLOWER_LABELS) + 1):
        photo(number, size).save(folder / "jpg" / f"image_{number:05}.jpg")


CAR_NAMES = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Acura TL Sedan 2012"]
CAR_LABELS = {"train": [3, 1, 2, 1], "test": [2, 3]}  # from 1


def write_cars(root, size=40):
    """Stanford Cars as it is published, in torchvision's folders, with few images."""
    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    scipy.io.savemat(folder / "devkit" / "cars_meta.mat", {"class_names": np.array([CAR_NAMES], dtype=object)})
    fields = ["bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname"]
    for split, labels in CAR_LABELS.items():
        (folder / f"cars_{split}").mkdir()
        rows = [(1, 1, 9, 9, label, f"{number:05}.jpg") for number, label in enumerate(labels, 1)]
        annotations = np.array([rows], dtype=[(name, object) for name in fields])
        path = "devkit/cars_train_annos.mat" if split == "train" else "cars_test_annos_withlabels.mat"
        scipy.io.savemat(folder / path, {"annotations": annotations})
        for number in range(1, len(labels) + 1):
            photo(number + 100 * (split == "test"), size).save(folder / f"cars_{split}" / f"{number:05}.jpg")


# In the order of the training annotations: 20, 10, 30.
INAT_CATEGORIES = [
    {"id": id, "name": name, "genus": genus, "order": order, "kingdom": kingdom, "supercategory": supercategory}
    for id, name, genus, order, kingdom, supercategory in (
        (10, "lynx", "Lynx", "Carnivora", "Animalia", "Mammalia"),
        (20, "oak", "Quercus", "Fagales", "Plantae", "Plantae"),
        (30, "wolf", "Canis", "Carnivora", "Animalia", "Mammalia"),
    )
]
INAT_TRAIN, INAT_VAL = (20, 10, 30, 10), (30, 20)


def write_inat(root, year, flattened):
    rank = {entry["id"]: entry for entry in INAT_CATEGORIES}
    (root / "categories.json").write_text(json.dumps(INAT_CATEGORIES))
    for split, ids in (("train", INAT_TRAIN), ("val", INAT_VAL)):
        images, annotations = [], []
        for number, category in enumerate(ids):
            folder = f"train_val{year}"
            file_name = f"{folder}/{rank[category]['supercategory']}/{category}/{split}{number}.jpg"
            path = root / (f"{folder}/{category}/{split}{number}.jpg" if flattened else file_name)
            path.parent.mkdir(parents=True, exist_ok=True)
            photo(number).save(path)
            images.append({"id": 100 + number, "file_name": file_name})
            annotations.append({"image_id": 100 + number, "category_id": category})
        images.reverse()  # only the ids say which annotation belongs to which image
        (root / f"{split}{year}.json").write_text(json.dumps({"images": images, "annotations": annotations}))


def write_shards(root, split, shards, num_classes=3):
    """WebDataset tars of PNGs with `.cls` labels 0, 1, 2, 0, ...; returns the split's entry of info.json."""
    number, names, lengths = 0, [], []
    for shard, length in enumerate(shards):
        names.append(f"{split}-{shard}.tar")
        with tarfile.open(root / names[-1], "w") as tar:
            for _ in range(length):
                png = io.BytesIO()
                photo(number).save(png, "png")
                for suffix, content in (("png", png.getvalue()), ("cls", str(number % num_classes).encode())):
                    entry = tarfile.TarInfo(f"{split}{number:04}.{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
                number += 1
        lengths.append(length)
    return {"name": split, "num_samples": number, "filenames": names, "shard_lengths": lengths}


def write_webdataset(root, **shards):
    splits = {split: write_shards(root, split, lengths) for split, lengths in shards.items()}
    (root / "info.json").write_text(json.dumps({"splits": splits}))
    return "--data-set", "wds/any", "--data-path", root
