"""--val-fraction: the parts of the training images, of every data set, and what reads them."""

import collections
import math

import data_files
import numpy as np
import pytest
import torch
import torchvision
from data_files import build, labels_of, write_cifar, write_inat
from helpers import data_options, make_image_folder, one_line
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from pipeline.holdout import Part, divide, numbers
from pipeline.images import ReadableImages, image_name
from pipeline.labelled import known_labels
from pipeline.opening import build_source
from training.provenance import digest
from utils import BadImageError

LABELS = np.random.RandomState(0).permutation([0] * 50 + [1] * 30 + [2] * 3 + [5] * 17).tolist()


@pytest.mark.parametrize("fraction", [0.2, 0.3, 0.5, 0.8])
def test_parts_of_a_class_are_evenly_spread(fraction):
    train, val = divide(LABELS, LABELS, fraction, [])
    expected = []
    for label in set(LABELS):
        places = [place for place, of_image in enumerate(LABELS) if of_image == label]
        count = round(len(places) * fraction)
        for number in range(count):
            expected.append(places[math.floor((number + 0.5) * len(places) / count)])
    assert [*val.indices] == sorted(expected)
    assert sorted([*train.indices, *val.indices]) == [*range(100)]
    assert [val[i] for i in range(len(val))] == [LABELS[i] for i in val.indices]


@pytest.mark.parametrize(
    ("labels", "fraction", "line"),
    [
        ([0, 0, 0, 0, 1], 0.5, "--val-fraction cannot divide class bee, which has one training image"),
        ([0] * 30 + [1] * 4, 0.1, "--val-fraction 0.1 leaves class bee, the smallest with 4 training images, none to "
         "evaluate on; take a larger fraction"),
        ([0] * 30 + [7] * 4, 0.9, "--val-fraction 0.9 leaves class 7, the smallest with 4 training images, none to "
         "train on; take a smaller fraction"),
    ],
)  # fmt: skip
def test_a_class_that_would_be_missing_from_a_part_is_an_error(labels, fraction, line):
    with pytest.raises(SystemExit) as caught:
        divide(labels, labels, fraction, ["ant", "bee"])
    assert caught.value.code == f"error: {line}"


# Every data set


@pytest.fixture(params=["IMNET", "torch/image_folder", "CIFAR10", "torch/cifar10", "INAT", "DIGITS"])
def words(request, tmp_path, monkeypatch, few_digits):
    """The flags of a data set, of whose classes each has at least two training images."""
    name = request.param
    if name in ("IMNET", "torch/image_folder"):
        make_image_folder(tmp_path, classes=("ant", "bee", "cow"), n=6)
        (tmp_path / "train" / "ant" / "notes.txt").touch()
    elif name == "INAT":
        monkeypatch.setattr(data_files, "INAT_TRAIN", (20, 10, 30, 10) * 3)
        write_inat(tmp_path, 2018, flattened=False)
    elif name != "DIGITS":
        kind = torchvision.datasets.CIFAR10
        monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda path, md5=None: True)
        write_cifar(tmp_path, kind, {file: 30 for file, _ in kind.train_list + kind.test_list})
    return ("--data-set", name, *(() if name == "DIGITS" else ("--data-path", tmp_path)))


def read(source):
    """The bytes and the label of each image."""
    read = ReadableImages(source, lambda image: image.tobytes(), max_bad=0)
    return [read[i] for i in range(len(read))]


def test_every_data_set_is_divided(words):
    everything = read(build_source(data_options(*words), is_training=True))
    data, plain = build(*words, "--val-fraction", 0.3, "--seed", 5), build(*words)
    train, val = data.train.dataset.source, data.val.dataset.source
    assert (data.num_train, data.num_val) == (len(train), len(val)) and data.num_train + data.num_val == len(everything)
    assert (data.num_classes, data.classes) == (plain.num_classes, plain.classes)
    for part in (train, val):
        assert read(part) == [everything[number] for number in numbers(part)]
        assert known_labels(part) == [label for _, label in read(part)]
    sizes = [collections.Counter(label for _, label in images) for images in (everything, read(val))]
    assert sizes[1] == {label: round(0.3 * size) for label, size in sizes[0].items()}
    assert labels_of(data.val) == known_labels(val)
    assert not {*numbers(train)} & {*numbers(val)}
    assert [*data.val_numbers] == [*numbers(val)]
    assert f"evaluation on {len(val)} of {len(everything)} training images" in "\n".join(data.lines())
    assert sum("(.txt 1)" in line for line in data.lines()) == (words[1] in ("IMNET", "torch/image_folder"))


def test_parts_have_their_own_digests(words):
    def digest_of(part, *flags):
        source = build_source(data_options(*words, *flags), part == "train")
        return digest(source, words[1], str(words[-1]))

    same = [digest_of("val", "--val-fraction", 0.3, "--seed", seed) for seed in (0, 1)]
    assert same[0] == same[1]
    others = [digest_of(part, "--val-fraction", fraction) for part in ("train", "val") for fraction in (0.3, 0.5)]
    assert len({*others, digest_of("train"), digest_of("val")}) == 6 and same[0] in others


def test_parts_of_one_size_without_files_have_other_digests():
    whole = torchvision.datasets.FakeData(8, (3, 4, 4), 2)
    halves = divide(whole, [0, 1] * 4, 0.5, [])
    assert [len(half) for half in halves] == [4, 4]
    four = torchvision.datasets.FakeData(4, (3, 4, 4), 2)
    assert len({digest(source, "FAKE", "") for source in (*halves, four)}) == 3


def test_what_evaluates_alone_reads_the_same_part(words):
    trained = build(*words, "--val-fraction", 0.3)
    evaluated = build(*words, "--val-fraction", 0.3, "--eval", "--resume", "a.pth")
    assert evaluated.train is None and [*evaluated.val_numbers] == [*trained.val_numbers]


def test_data_that_does_not_know_its_labels_is_refused():
    with pytest.raises(SystemExit) as caught:
        build("--data-set", "FAKE", "--val-fraction", 0.1)
    one_line(caught, "--data-set FAKE", "--val-fraction 0")


def test_images_without_labels_are_not_divided(tmp_path):
    make_image_folder(tmp_path, splits=("",), n=2)
    options = data_options("--data-set", "UNLABELLED", "--data-path", tmp_path, "--val-fraction", 0.1)
    assert len(build_source(options, is_training=False)) == 4


# Training on them


@pytest.fixture
def greys(tmp_path):
    """A folder of two classes of 10 training images; each has its own grey, its number in the training set."""
    for number in range(20):
        path = tmp_path / "train" / f"class{number // 10}" / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (number,) * 3).save(path)
    return ("--data-set", "IMNET", "--data-path", tmp_path, "--val-fraction", 0.3)


PLAIN = ("--aa", "none", "--color-jitter", 0, "--reprob", 0)


def greys_of(batches):
    """The greys of the images of batches, in order."""
    mean, std = IMAGENET_DEFAULT_MEAN[0], IMAGENET_DEFAULT_STD[0]
    return [round(255 * float(image[0, 16, 16] * std + mean)) for images, _ in batches for image in images]


@pytest.mark.parametrize(
    ("flags", "size"),
    [(("--repeated-aug",), 1), (("--repeated-aug",), 2), (("--no-repeated-aug",), 1), (("--no-repeated-aug",), 2),
     (("--no-repeated-aug", "--cache-images", "memory"), 1)],
)  # fmt: skip
def test_no_validation_image_is_trained_on(greys, flags, size):
    seen, evaluated = set(), []
    for rank in range(size):
        data = build(*greys, *PLAIN, *flags, rank=rank, size=size)
        for epoch in range(3):
            seen |= {*greys_of(data.batches(epoch, 0))}
        evaluated += greys_of(data.val)
        assert {int(word) for word in data.step_images(0).split("number ")[1].split(", ")} <= seen
    assert sorted(evaluated) == [1, 5, 8, 11, 15, 18]
    trained = {*range(20)} - {*evaluated}
    assert seen == trained if "--no-repeated-aug" in flags else len(seen) > 4 and seen <= trained


def test_unreadable_images_are_replaced_by_images_of_their_part(greys):
    root = greys[3]
    (root / "train/class0/00.png").write_bytes(b"")  # 01.png is a validation image
    data = build(*greys, *PLAIN, "--no-repeated-aug")
    read = data.train.dataset
    image, label = read[0]
    assert greys_of([(image[None], None)]) == [2] and label == 0
    assert [image_name(read.source, i, relative=True) for i in read.is_bad.nonzero()[0]] == ["class0/00.png"]
    (root / "train/class1/11.png").write_bytes(b"")
    with pytest.raises(BadImageError, match=f"unreadable image {root}/train/class1/11.png"):
        list(data.val)


def test_an_image_without_a_file_has_its_number_in_the_complete_set():
    part = Part(torchvision.datasets.FakeData(8, (3, 4, 4), 2), np.array([3, 6]))
    assert image_name(part, 1) == "number 6"
    assert torch.equal(torch.as_tensor(part.indices), torch.tensor([3, 6]))
