"""Every data set, the transforms, the samplers, the evaluation shards, and images that cannot be read."""

import io
import itertools
import json
import math
import pickle
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision
from helpers import TINY, data_options, make_image_folder, photo, run_main, run_process, world
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import DistributedSampler
from torchvision.transforms import RandomHorizontalFlip

import datasets
from datasets import build_data
from pipeline.samplers import SeededRepeatAugSampler
from pipeline.sources import Digits
from pipeline.transforms import FastCrop, build_transform
from utils import BadImageError, World, reseed

PLAIN = ("--aa", "none", "--color-jitter", 0, "--hflip", 0, "--reprob", 0, "--no-repeated-aug")


def build(*words, rank=0, size=1):
    return build_data(data_options("--batch-size", 2, *words), world(rank, size))


def labels_of(loader):
    return torch.cat([labels for _, labels in loader]).tolist()


def images_of(loader):
    """Each image as a hashable."""
    return [image.numpy().tobytes() for images, _ in loader for image in images]


# Data sets


def test_image_folder_counts_its_classes(tmp_path):
    root = make_image_folder(tmp_path, classes=("ant", "bee", "cow"), n=2)
    data = build("--data-set", "IMNET", "--data-path", root)
    assert data.num_classes == 3
    assert len(data.train.dataset) == len(data.val.dataset) == 6
    assert labels_of(data.val) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    "flags", [("--train-dir", "learn", "--val-dir", "test"), ("--train-split=learn", "--val_split=test")]
)
def test_image_folder_with_other_folder_names(tmp_path, flags):
    make_image_folder(tmp_path, n=2, splits=("learn",))
    make_image_folder(tmp_path, n=3, splits=("test",))
    data = build("--data-set", "IMNET", "--data-path", tmp_path, *flags)
    assert (len(data.train.dataset), len(data.val.dataset)) == (4, 6)


def test_a_wider_head_than_the_data_needs(tmp_path):
    make_image_folder(tmp_path)
    assert build("--data-set", "IMNET", "--data-path", tmp_path, "--num-classes", 5).num_classes == 5
    with pytest.raises(SystemExit, match="--num-classes 1, but the data has 2"):
        build("--data-set", "IMNET", "--data-path", tmp_path, "--num-classes", 1)


def test_evaluation_builds_no_training_set(tmp_path):
    make_image_folder(tmp_path, splits=("val",))
    data = build("--data-set", "IMNET", "--data-path", tmp_path, "--eval", "--resume", "some.pth")
    assert data.train is None
    assert data.num_classes == 2


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


@pytest.mark.parametrize(
    ("name", "kind", "num_classes"),
    [
        ("CIFAR", torchvision.datasets.CIFAR100, 100),
        ("CIFAR10", torchvision.datasets.CIFAR10, 10),
        ("torch/cifar10", torchvision.datasets.CIFAR10, 10),
    ],
)
def test_cifar(tmp_path, monkeypatch, name, kind, num_classes):
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda path, md5=None: True)
    sizes = {file: 3 for file, _ in kind.train_list} | {file: 5 for file, _ in kind.test_list}
    written = write_cifar(tmp_path, kind, sizes)
    data = build("--data-set", name, "--data-path", tmp_path)
    assert data.num_classes == num_classes
    assert len(data.train.dataset) == 3 * len(kind.train_list)
    assert labels_of(data.val) == written[kind.test_list[0][0]]


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


@pytest.mark.parametrize(
    ("category", "classes"),
    [
        ("name", ["oak", "lynx", "wolf"]),
        ("genus", ["Quercus", "Lynx", "Canis"]),
        ("order", ["Fagales", "Carnivora"]),
        ("kingdom", ["Plantae", "Animalia"]),
        ("supercategory", ["Plantae", "Mammalia"]),
    ],
)
@pytest.mark.parametrize("flattened", [False, True], ids=["official", "flattened"])
@pytest.mark.parametrize(("name", "year"), [("INAT", 2018), ("INAT19", 2019)])
def test_inaturalist(tmp_path, name, year, flattened, category, classes):
    write_inat(tmp_path, year, flattened)
    data = build("--data-set", name, "--data-path", tmp_path, "--inat-category", category)
    rank_of = {entry["id"]: entry[category] for entry in INAT_CATEGORIES}
    assert data.train.dataset.source.classes == classes
    assert data.num_classes == len(classes)
    assert labels_of(data.val) == [classes.index(rank_of[category_id]) for category_id in reversed(INAT_VAL)]
    assert data.train.dataset.source[0][0].size == (40, 40)
    assert [label for _, label in data.train.dataset.source.samples] == [
        classes.index(rank_of[category_id]) for category_id in reversed(INAT_TRAIN)
    ]


def test_digits_are_split_once_and_alike():
    train, val = Digits(is_training=True), Digits(is_training=False)
    assert len(train) + len(val) == 1797
    scans = np.concatenate([train.scans, val.scans])
    from sklearn.datasets import load_digits

    original = (load_digits().data * (255 / 16)).astype(np.uint8)
    assert sorted(scans.reshape(1797, 64).tolist()) == sorted(original.tolist())  # each scan is in one part
    shares = np.bincount(train.labels) / np.bincount(np.concatenate([train.labels, val.labels]))
    assert len(shares) == 10
    assert shares == pytest.approx(0.8, abs=0.01)
    assert np.array_equal(train.labels, Digits(is_training=True).labels)
    assert build("--data-set", "DIGITS").num_classes == 10


def test_fake_shares_no_image_between_train_and_val():
    data = build("--data-set", "FAKE", "--num-classes", 7)
    assert data.num_classes == 7
    assert build("--data-set", "FAKE").num_classes == 1000
    train, val = ({source[i][0].tobytes() for i in range(len(source))} for source in
                  (data.train.dataset.source, data.val.dataset.source))  # fmt: skip
    assert (len(train), len(val)) == (1024, 256)
    assert not train & val


@pytest.mark.parametrize("val_split", [(), ("--val-split", "val")], ids=["default", "val"])
def test_timm_image_folder(tmp_path, val_split):
    make_image_folder(tmp_path, classes=("ant", "bee", "cow"), n=2)
    data = build("--data-set", "torch/image_folder", "--data-path", tmp_path, *val_split)
    assert (data.num_classes, len(data.train.dataset)) == (3, 6)
    assert labels_of(data.val) == [0, 0, 1, 1, 2, 2]


def test_timm_image_folder_without_the_split_is_refused(tmp_path):
    """timm would take the whole folder for the missing part, and so evaluate on the training images."""
    make_image_folder(tmp_path, splits=(".",))
    with pytest.raises(SystemExit, match=rf"^error: .*{tmp_path}"):
        build("--data-set", "torch/image_folder", "--data-path", tmp_path)


def test_timm_torch_set_without_the_split_is_refused(tmp_path, monkeypatch):
    """timm takes every split but "train" for the test set."""
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda path, md5=None: True)
    kind = torchvision.datasets.CIFAR10
    write_cifar(tmp_path, kind, {file: 3 for file, _ in kind.train_list + kind.test_list})
    with pytest.raises(SystemExit, match=r"^error: .*trian"):
        build("--data-set", "torch/cifar10", "--data-path", tmp_path, "--train-split", "trian")


HUGGING_FACE = """
import faulthandler, json, sys
sys.path.insert(0, "tests")
from helpers import data_options, world
from datasets import build_data
from utils import BadImageError, World

good, bad, cache = sys.argv[1:]
faulthandler.dump_traceback_later(40, exit=True)  # a loader that waits for ever
words = ("--data-path", cache, "--batch-size", 2, "--data-set")
data = build_data(data_options(*words, "hfds/" + good), world())
samples, labels = next(iter(data.train))
print(json.dumps({
    "classes": data.num_classes, "train": len(data.train.dataset), "val": len(data.val.dataset),
    "labels": sorted(label for _, batch in data.val for label in batch.tolist()), "shape": list(samples.shape),
    "their package": hasattr(sys.modules["datasets"], "load_dataset"),
}))
data = build_data(data_options(*words, "hfds/" + bad, "--num-workers", 1), world())
print(json.dumps(sum(len(samples) for samples, _ in data.train)))
try:
    list(data.val)
except BadImageError as error:
    print(json.dumps(str(error).splitlines()[-1]))
try:
    build_data(data_options(*words, "hfds/" + good + "/missing"), world())
except SystemExit as error:
    print(json.dumps(str(error)))
"""


def test_hugging_face_set(tmp_path):
    """In a process of its own, since Hugging Face's package and datasets.py share a name."""
    good = make_image_folder(tmp_path / "good", classes=("ant", "bee", "cow"), n=2, splits=("train", "validation"))
    bad = make_image_folder(tmp_path / "bad", n=2, splits=("train", "validation"))
    for split in ("train", "validation"):
        (bad / split / "cat" / "0.png").write_bytes(b"no image")
    process = run_process("-c", HUGGING_FACE, good, bad, tmp_path / "cache")
    assert process.returncode == 0, process.stderr
    whole, num_trained, bad_image, missing = map(json.loads, process.stdout.splitlines())
    counts = {"classes": 3, "train": 6, "val": 6, "labels": [0, 0, 1, 1, 2, 2]}
    assert whole == {**counts, "shape": [2, 3, 32, 32], "their package": True}
    assert num_trained == 4
    assert "train/cat/0.png" in process.stderr
    assert "validation/cat/0.png" in bad_image
    assert missing.startswith(f"error: --data-set hfds/{good}/missing") and "\n" not in missing


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


@pytest.mark.parametrize(("num_workers", "shards"), [(0, (4, 4)), (2, (4, 4)), (0, (8,)), (2, (8,))])
def test_webdataset(tmp_path, num_workers, shards):
    words = (*write_webdataset(tmp_path, train=shards, validation=(3, 2)), "--num-workers", num_workers)
    with pytest.raises(SystemExit, match="--num-classes"):
        build(*words)
    data = build(*words, "--num-classes", 3)
    batches = list(data.batches(0, 0))
    assert all(samples.shape == (2, 3, 32, 32) for samples, _ in batches)
    assert len(batches) == data.num_steps == 4
    torch.manual_seed(5)  # what was drawn before does not matter
    assert [labels.tolist() for _, labels in data.batches(0, 1)] == [labels.tolist() for _, labels in batches[1:]]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(data.batches(0, 2), batches[2:], strict=True))
    assert sorted(labels_of(data.val)) == [0, 0, 1, 1, 2]
    assert len(set(images_of(data.val))) == 5


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("count", [1, 3, 4, 9])
def test_first_images_of_a_webdataset(tmp_path, num_workers, count):
    words = (*write_webdataset(tmp_path, train=(4,), validation=(3, 2)), "--num-classes", 3)
    data = build(*words, "--num-workers", num_workers)
    every = torch.cat([samples for samples, _ in data.val])
    before = torch.get_rng_state()
    assert torch.equal(data.first_val_images(count), every[:count])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_evaluates_the_whole_webdataset(tmp_path, rank):
    words = write_webdataset(tmp_path, train=(4, 4), validation=(3, 2))
    data = build(*words, "--num-classes", 3, rank=rank, size=2)
    assert not data.val_is_shared
    assert data.num_val == len(set(images_of(data.val))) == len(images_of(data.val)) == 5


def test_webdataset_without_a_shard_or_with_an_unknown_label_is_refused(tmp_path):
    words = write_webdataset(tmp_path, train=(4, 4), validation=(3,))
    with pytest.raises(BadImageError, match="labelled 2, but --num-classes is 2"):
        list(build(*words, "--num-classes", 2).val)
    (tmp_path / "train-1.tar").unlink()
    with pytest.raises(SystemExit, match=r"lacks the shard train-1\.tar"):
        build(*words, "--num-classes", 3)


def test_unreadable_image_of_a_webdataset(tmp_path, monkeypatch):
    """timm would leave it out, and the accuracy would be that of the other images."""
    words = write_webdataset(tmp_path, train=(4,), validation=(3,))
    good = photo(0).tobytes()
    save = Image.Image.save
    broken = lambda image, file, kind: file.write(b"x") if image.tobytes() == good else save(image, file, kind)  # noqa: E731
    monkeypatch.setattr(Image.Image, "save", broken)
    write_shards(tmp_path, "validation", (3,))
    with pytest.raises(SystemExit, match="error: 1 of 3 validation images are unreadable"):
        run_main(*TINY, *words, "--num-classes", 3, "--batch-size", 2)


# Transforms


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("is_training", [True, False])
def test_transform_shape_and_normalisation(size, is_training):
    options = data_options("--input-size", size, *PLAIN)
    grey = Image.new("RGB", (90, 70), (128, 64, 32))
    out = build_transform(options, is_training)(grey)
    assert out.shape == (3, size, size)
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    inside = (out * std + mean)[:, 4:-4, 4:-4] if size <= 32 else out * std + mean
    torch.testing.assert_close(inside, torch.tensor([128, 64, 32])[:, None, None].expand_as(inside) / 255)


def test_small_images_are_resized_whole_padded_and_cropped():
    """A frame survives the resize at evaluation; in training up to 4 px of black come in from a side."""
    framed = Image.new("RGB", (64, 48), (255, 255, 255))
    framed.paste((255, 0, 0), (8, 8, 56, 40))
    out = build_transform(data_options(*PLAIN), is_training=False)(framed)
    assert out[2, 0].min() > 2 and out[2, -1].min() > 2 and out[2, :, 0].min() > 2 and out[2, :, -1].min() > 2
    torch.manual_seed(0)
    transform = build_transform(data_options(*PLAIN), is_training=True)
    crops = torch.stack([transform(framed) for _ in range(50)])
    black = (crops[:, 0] < -2).float()  # red is bright everywhere but in the padding
    assert (black[:, 16].sum(1).max(), black[:, :, 16].sum(1).max()) == (4, 4)
    assert len({crop.numpy().tobytes() for crop in crops}) > 20


def test_large_images_are_cropped_at_random_with_the_flags_of_it():
    words = ("--input-size", 64, "--scale", 0.5, 0.75, "--ratio", 0.9, 1.1, "--train-interpolation", "bilinear")
    crop = build_transform(data_options(*words), is_training=True).transforms[0]
    assert isinstance(crop, FastCrop)
    assert tuple(crop.scale) == (0.5, 0.75)
    assert tuple(crop.ratio) == (0.9, 1.1)
    assert str(crop.interpolation).endswith("BILINEAR")


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "random"])
def test_fast_crops_are_pillows_up_to_rounding(interpolation):
    """Enlarged and reduced, of an image seen before and of another one, and the image stays as it is."""
    words = ("--input-size", 64, "--train-interpolation", interpolation)
    fast, pillows = (
        build_transform(data_options(*words, flag), is_training=True).transforms[0]
        for flag in ("--fast-crop", "--no-fast-crop")
    )
    images = [photo(seed, size) for seed, size in enumerate((48, 120, 260))]
    before = [image.tobytes() for image in images]
    differences = []
    for seed in range(30):
        image = images[seed // 2 % 3]
        crops = []
        for crop in (fast, pillows):
            reseed("augmentation", seed)
            crops.append(np.asarray(crop(image)).astype(int))
        assert crops[0].shape == (64, 64, 3)
        differences.append(np.abs(crops[0] - crops[1]))
    assert [image.tobytes() for image in images] == before
    assert np.max(differences) <= 2
    assert np.mean(np.not_equal(differences, 0)) < 0.02


def test_fast_crops_take_a_pixel_at_least():
    crop = build_transform(data_options("--input-size", 64), is_training=True).transforms[0]
    for seed in range(60):
        for size in ((1, 1), (1, 2), (3, 1), (1, 9)):
            reseed("augmentation", seed)
            assert crop(Image.new("RGB", size, (9, 8, 7))).getcolors() == [(64 * 64, (9, 8, 7))]


def test_centre_crop_of_evaluation():
    options = data_options("--input-size", 64, "--eval-crop-ratio", 0.5)
    resize, crop = build_transform(options, is_training=False).transforms[:2]
    assert resize.size == 128
    assert tuple(crop.size) == (64, 64)


def steps_of(*words):
    """{class name: transform} of the training transform."""
    return {type(step).__name__: step for step in build_transform(data_options(*words), is_training=True).transforms}


@pytest.mark.parametrize("size", [32, 64])
def test_augmentation_flags_reach_timm(size):
    steps = steps_of("--input-size", size, "--hflip", 0.3, "--reprob", 0.4, "--remode", "const", "--recount", 2)
    assert steps["RandomHorizontalFlip"].p == 0.3
    erasing = steps["RandomErasing"]
    assert (erasing.probability, erasing.mode, erasing.max_count) == (0.4, "const", 2)
    assert [op.magnitude for op in steps["RandAugment"].ops] == [9] * 15
    assert "ColorJitter" not in steps
    assert "AutoAugment" in steps_of("--input-size", size, "--aa", "original")
    assert steps_of("--input-size", size, "--aa", "none", "--color-jitter", 0.2)["ColorJitter"].brightness == (0.8, 1.2)
    assert not {"RandAugment", "ColorJitter", "RandomHorizontalFlip", "RandomErasing"} & steps_of(*PLAIN).keys()


def test_hflip_of_one_always_flips():
    flip = [
        step
        for step in build_transform(data_options("--hflip", 1), True).transforms
        if isinstance(step, RandomHorizontalFlip)
    ]
    image = photo(0)
    assert np.array_equal(np.asarray(flip[0](image)), np.asarray(image)[:, ::-1])


@pytest.mark.parametrize("size", [32, 64])
def test_default_augmentation_runs(size):
    """Pillow 13 breaks timm's rand-m9-mstd0.5-inc1 in one image of 600; hence the pin."""
    torch.manual_seed(0)
    transform = build_transform(data_options("--input-size", size), is_training=True)
    for seed in range(300):
        assert transform(photo(seed)).isfinite().all()


# Loaders


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(
    ("device", "cores", "ranks", "num_workers"),
    [("cpu", 48, 4, 12), ("cpu", 48, 1, 48), ("cpu", 7, 2, 3), ("cpu", 2, 4, 1), ("cuda", 16, 1, 14),
     ("cuda", 50, 4, 12), ("cuda", 2, 1, 1)],
)  # fmt: skip
def test_workers_share_the_cores(monkeypatch, device, cores, ranks, num_workers):
    """Evaluation has half as many; on a GPU machine two cores stay free."""
    monkeypatch.setattr(datasets, "cpu_count", lambda: cores)
    options = replace(data_options(), num_workers=None, prefetcher=False)
    data = build_data(options, World(0, ranks, 0, ranks, torch.device(device)))
    assert (data.train.num_workers, data.val.num_workers) == (num_workers, math.ceil(num_workers / 2))
    assert build("--num-workers", 5, size=ranks).train.num_workers == 5


# Samplers


def draw(sampler, epoch):
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize("length", [10, 300, 1000])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_repeated_augmentation_of_seed_0_is_timms(length, size):
    for rank in range(size):
        split = {"num_replicas": size, "rank": rank, "num_repeats": 3}
        ours, timms = SeededRepeatAugSampler(range(length), seed=0, **split), RepeatAugSampler(range(length), **split)
        for epoch in (0, 5):
            assert draw(ours, epoch) == draw(timms, epoch)
        assert len(ours) == len(timms) == len(list(ours)) > 0


def test_repeated_augmentation_differs_by_seed_and_epoch():
    split = {"num_replicas": 1, "rank": 0}
    first, second = (SeededRepeatAugSampler(range(300), seed=seed, **split) for seed in (1, 2))
    draws = [draw(sampler, epoch) for sampler in (first, second) for epoch in (0, 1)]
    assert len({tuple(order) for order in draws}) == 4
    assert draw(first, 0) == draws[0]


def test_ranks_see_each_image_as_often_as_repeated():
    """DeiT's manner: the copies of an image lie side by side, so that three ranks get one each."""
    draws = [draw(SeededRepeatAugSampler(range(60), num_replicas=3, rank=rank, seed=4), 0) for rank in range(3)]
    assert draws[0] == draws[1] == draws[2]
    draws = [draw(SeededRepeatAugSampler(range(60), num_replicas=2, rank=rank, seed=4), 0) for rank in range(2)]
    everything = sorted(draws[0] + draws[1])
    assert len(everything) == 60
    assert max(everything.count(image) for image in everything) == 3


def samples_of(data, epoch, step=0):
    """The samples of all batches from a step on."""
    data.batches(epoch, step)
    return [sample for batch in data.train.batch_sampler for sample in batch]


@pytest.mark.parametrize("flags", [("--repeated-aug", "--aug-repeats", 2), ("--no-repeated-aug",)])
def test_the_order_of_a_run_follows_seed_and_epoch(flags):
    orders = {}
    for seed in (0, 7):
        data = build("--data-set", "DIGITS", "--seed", seed, *flags)
        for epoch in (0, 1, 0):
            order = [(sample.index, sample.repeat) for sample in samples_of(data, epoch)]
            orders.setdefault((seed, epoch), []).append(tuple(order))
    assert all(len(set(draws)) == 1 for draws in orders.values())
    assert len({draws[0] for draws in orders.values()}) == 4
    if "--aug-repeats" in flags:
        (first, a), (second, b), (third, c) = orders[0, 0][0][:3]
        assert first == second != third and (a, b, c) == (0, 1, 0)
    else:
        assert {repeat for _, repeat in orders[0, 0][0]} == {0}


@pytest.mark.parametrize("repeats", [("--no-repeated-aug",), (), ("--aug-repeats", 2)])
@pytest.mark.parametrize("length", [1437, 100])
@pytest.mark.parametrize("dealt", ["--no-repeats-together", "--repeats-together"])
def test_a_global_batch_holds_the_same_samples_on_any_number_of_ranks(repeats, length, dealt, tmp_path):
    words = ("--data-set", "DIGITS", *repeats)
    if length == 100:
        words = ("--data-set", "IMNET", "--data-path", make_image_folder(tmp_path, n=50), *repeats)
    words += (dealt,)
    steps = {}
    for ranks, batch, accumulated in ((1, 24, 1), (1, 12, 2), (2, 12, 1), (3, 8, 1), (2, 4, 3), (3, 4, 2)):
        flags = (*words, "--batch-size", batch, "--accum-steps", accumulated)
        parts = [build(*flags, rank=rank, size=ranks) for rank in range(ranks)]
        assert len({data.num_steps for data in parts}) == 1
        shares = [samples_of(data, 3) for data in parts]
        size = batch * accumulated
        assert all(len(share) == size * parts[0].num_steps for share in shares)
        steps[ranks, batch, accumulated] = [
            sorted(sample for share in shares for sample in share[i * size : (i + 1) * size])
            for i in range(parts[0].num_steps)
        ]
    assert len(steps[1, 24, 1]) == {1437: 59 if repeats == ("--no-repeated-aug",) else 53, 100: 4}[length]
    assert all(of_ranks == steps[1, 24, 1] for of_ranks in steps.values())


@pytest.mark.parametrize("repeats", [1, 2, 3])
@pytest.mark.parametrize("length", [1437, 100])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_draw_what_timms_and_torchs_samplers_give_them(repeats, length, size, tmp_path):
    words = ["--data-set", "DIGITS", "--batch-size", 6, "--seed", 5]
    if length == 100:
        words += ["--data-set", "IMNET", "--data-path", make_image_folder(tmp_path, n=50)]
    words += ["--aug-repeats", repeats] if repeats > 1 else ["--no-repeated-aug"]
    for rank in range(size):
        data = build(*words, rank=rank, size=size)
        split = {"num_replicas": size, "rank": rank, "seed": 5}
        if repeats > 1:
            sampler = SeededRepeatAugSampler(data.train.dataset, num_repeats=repeats, **split)
        else:
            sampler = DistributedSampler(data.train.dataset, **split)
        drawn = [sample.index for sample in samples_of(data, 4)]
        assert len(drawn) == data.num_steps * 6
        assert drawn == draw(sampler, 4)[: len(drawn)]


def test_repeats_together_are_on_one_rank_side_by_side():
    words = ("--data-set", "DIGITS", "--batch-size", 6, "--aug-repeats", 3, "--repeats-together")
    order = samples_of(build(*words, "--batch-size", 12), 1)
    for rank in range(2):
        mine = samples_of(build(*words, rank=rank, size=2), 1)
        assert mine == [sample for batch in range(len(mine) // 6) for sample in order[batch * 12 + rank * 6 :][:6]]
        assert all(len({sample.index for sample in mine[i : i + 3]}) == 1 for i in range(0, len(mine), 3))
        assert [sample.repeat for sample in mine] == [0, 1, 2] * (len(mine) // 3)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_decoding_once_changes_no_pixel(num_workers, tmp_path):
    words = ("--data-set", "IMNET", "--data-path", make_image_folder(tmp_path, n=40), "--input-size", 48)
    words += ("--batch-size", 8, "--num-workers", num_workers)
    once, each = (build(*words, flag) for flag in ("--decode-once", "--no-decode-once"))
    assert (once.train.dataset.decode_once, each.train.dataset.decode_once) == (True, False)
    for ours, theirs in zip(once.batches(1, 0), each.batches(1, 0), strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def test_an_epoch_can_be_entered_at_any_step():
    data = build("--data-set", "DIGITS", "--batch-size", 8, "--accum-steps", 3)
    every = samples_of(data, 2)
    for step in (0, 1, 20, data.num_steps):
        assert samples_of(data, 2, step) == every[step * 24 :]
    data.batches(2, 7)
    assert data.step_images(1) == f"images number {', '.join(str(sample.index) for sample in every[24:48])}"


def test_less_than_one_step_of_images_is_refused(tmp_path):
    words = ("--data-set", "IMNET", "--data-path", make_image_folder(tmp_path, n=5), "--no-repeated-aug")
    with pytest.raises(SystemExit, match="has 10 images, less than the 12 of one step"):
        build(*words, "--batch-size", 2, "--accum-steps", 3, size=2)


def test_plain_sampler_shows_ranks_disjoint_images():
    orders = [samples_of(build("--data-set", "DIGITS", "--no-repeated-aug", rank=r, size=3), 0) for r in range(3)]
    assert len(set().union(*orders)) == sum(map(len, orders)) == 1437 // 6 * 6


# Evaluation shards


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("n", [1, 5, 7])
def test_ranks_share_the_evaluation_exactly(tmp_path, size, n):
    make_image_folder(tmp_path, n=n, splits=("val",))
    words = ("--data-set", "IMNET", "--data-path", tmp_path, "--eval", "--resume", "some.pth")
    everything = sorted(images_of(build(*words).val))
    assert len(set(everything)) == 2 * n
    shares = [images_of(build(*words, rank=rank, size=size).val) for rank in range(size)]
    assert sorted(itertools.chain(*shares)) == everything
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert sorted(images_of(build(*words, "--no-dist-eval", rank=size - 1, size=size).val)) == everything


# Images that cannot be read

DAMAGE = {
    "truncated.png": lambda photo_bytes: photo_bytes[: len(photo_bytes) // 2],
    "zero.png": lambda photo_bytes: b"",
    "text.jpg": lambda photo_bytes: b"this is no picture",
}


def damaged_folder(root, names, split="train"):
    """An image folder whose class "cat" also holds files that are no images."""
    make_image_folder(root, n=4)
    whole = (root / "train" / "cat" / "0.png").read_bytes()
    paths = [root / split / "cat" / f"x-{name}" for name in names]
    for path, name in zip(paths, names, strict=True):
        path.write_bytes(DAMAGE[name](whole))
    return paths


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_training_images_are_replaced_named_and_counted_once(tmp_path, capfd, num_workers):
    bad = damaged_folder(tmp_path, [*DAMAGE])
    words = ("--data-set", "IMNET", "--data-path", tmp_path, "--no-repeated-aug", "--num-workers", num_workers)
    data = build(*words)
    for epoch in range(3):
        assert len(list(data.batches(epoch, 0))) == data.num_steps == 5
    assert len(data.bad_images(world())) == 3
    lines = capfd.readouterr().err.splitlines()
    assert all(line.startswith("unreadable image") and "replaced" in line for line in lines)
    for path in bad:
        met = [line for line in lines if str(path) in line]
        assert 1 <= len(met) <= max(1, num_workers)  # workers may meet it at the same time


@pytest.mark.parametrize("num_workers", [0, 2])
def test_budget_of_unreadable_images(tmp_path, num_workers):
    damaged_folder(tmp_path, [*DAMAGE])
    words = ("--data-set", "IMNET", "--data-path", tmp_path, "--no-repeated-aug", "--num-workers", num_workers)
    with pytest.raises(BadImageError, match=r"unreadable image .*x-.*number 3; 2 may be replaced"):
        list(build(*words, "--max-bad-images", 2).train)
    assert len(list(build(*words, "--max-bad-images", 3).train)) == 5


@pytest.mark.parametrize("name", DAMAGE)
def test_an_unreadable_validation_image_stops(tmp_path, name):
    [path] = damaged_folder(tmp_path, [name], split="val")
    data = build("--data-set", "IMNET", "--data-path", tmp_path)
    with pytest.raises(BadImageError, match=str(path)):
        list(data.val)


def test_a_set_without_a_readable_image_stops(tmp_path):
    make_image_folder(tmp_path, n=1)
    for path in tmp_path.glob("train/*/*.png"):
        path.write_bytes(b"")
    data = build("--data-set", "IMNET", "--data-path", tmp_path)
    with pytest.raises(BadImageError, match="none of the 2 images can be read"):
        list(data.train)
