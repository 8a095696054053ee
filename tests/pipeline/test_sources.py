"""Every data set of `--data-set`: its images, labels, classes and splits, and the registry of data sets."""

import faulthandler
import sys

import forking
import numpy as np
import pytest
import sklearn.datasets
import torchvision
from data_files import (
    CAR_LABELS,
    CAR_NAMES,
    FLOWER_LABELS,
    FLOWER_SPLITS,
    FLOWERS,
    INAT_CATEGORIES,
    INAT_TRAIN,
    INAT_VAL,
    build,
    labels_of,
    write_cars,
    write_cifar,
    write_flowers,
    write_inat,
)
from helpers import make_image_folder, parse, photo

from pipeline import sources
from pipeline.sources import Digits
from training.flag_warnings import without_effect
from training.provenance import digest
from utils import BadImageError

# The registry


def test_an_entry_is_all_that_a_data_set_needs(monkeypatch):
    """It can be named in any case after a prefix, its flags are checked, and help and documentation name it."""
    monkeypatch.setattr(sources, "SOURCES", dict(sources.SOURCES))

    @sources.data_set("BIRDS", "ten birds", flags=("data_path",), class_names=lambda birds: ["wren", "owl"])
    def birds(options, is_training):
        """The folder `birds`,
        as it is published."""
        return [(photo(number), number % 2) for number in range(20 if is_training else 10)]

    assert "BIRDS (ten birds)" in sources.sources_help()
    assert "| `BIRDS` | ten birds | The folder `birds`, as it is published. |" in sources.markdown_table()
    for name in ("BIRD", "birds"):
        with pytest.raises(SystemExit, match=f"error: --data-set {name} is unknown; did you mean BIRDS"):
            build("--data-set", name)
    with pytest.raises(SystemExit, match="--data-set BIRDS needs --data-path"):
        build("--data-set", "BIRDS")
    flags = parse("--data-set", "BIRDS", "--val-split", "test")
    assert "--val-split has no effect: --data-set is BIRDS" in without_effect(flags)
    data = build("--data-set", "BIRDS", "--data-path", ".")
    assert (data.num_classes, len(data.train.dataset), labels_of(data.val)) == (2, 20, [0, 1] * 5)


ALL = "there are IMNET, UNLABELLED, CIFAR, CIFAR10, FLOWERS, CARS, INAT, INAT19, DIGITS, FAKE, torch/, hfds/, wds/"


@pytest.mark.parametrize(
    ("name", "hint"),
    [("imagenet", "did you mean IMNET?"), ("cifar100", "did you mean CIFAR10 or CIFAR?"), ("timm/any", ALL)],
)
def test_an_unknown_name_is_refused_with_near_ones(name, hint):
    with pytest.raises(SystemExit) as caught:
        build("--data-set", name)
    assert caught.value.code == f"error: --data-set {name} is unknown; {hint}"


def test_prefixes_may_be_written_in_capitals(tmp_path):
    make_image_folder(tmp_path)
    assert build("--data-set", "TORCH/image_folder", "--data-path", tmp_path).num_classes == 2


# Image folders


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


@pytest.mark.parametrize("val_split", [(), ("--val-split", "val")], ids=["default", "val"])
def test_timm_image_folder(tmp_path, val_split):
    make_image_folder(tmp_path, classes=("ant", "bee", "cow"), n=2)
    data = build("--data-set", "torch/image_folder", "--data-path", tmp_path, *val_split)
    assert (data.num_classes, len(data.train.dataset)) == (3, 6)
    assert labels_of(data.val) == [0, 0, 1, 1, 2, 2]


def test_timm_image_folder_without_the_split_is_refused(tmp_path):
    """timm would read the folder itself in place of the missing split, and so evaluate on the training images."""
    make_image_folder(tmp_path, splits=(".",))
    with pytest.raises(SystemExit, match=rf"^error: .*{tmp_path}"):
        build("--data-set", "torch/image_folder", "--data-path", tmp_path)


# Other data sets


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


def test_timm_torch_set_without_the_split_is_refused(tmp_path, monkeypatch):
    """timm takes every split but "train" for the test set."""
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda path, md5=None: True)
    kind = torchvision.datasets.CIFAR10
    write_cifar(tmp_path, kind, {file: 3 for file, _ in kind.train_list + kind.test_list})
    with pytest.raises(SystemExit, match=r"^error: .*trian"):
        build("--data-set", "torch/cifar10", "--data-path", tmp_path, "--train-split", "trian")


@pytest.fixture
def any_checksum(monkeypatch):
    """torchvision takes files of flowers whose checksums are not those of the published files."""
    monkeypatch.setattr(torchvision.datasets.flowers102, "check_integrity", lambda path, md5=None: True)


def pixels(image):
    return np.asarray(image.convert("RGB"), dtype=float)


@pytest.mark.parametrize(
    ("flags", "train", "val"),
    [
        ((), ["train"], ["val"]),
        (("--train-split", "trainval", "--val-split", "test"), ["train", "val"], ["test"]),
        (("--val-split", "trainval"), ["train"], ["train", "val"]),
    ],
)
def test_flowers(tmp_path, any_checksum, flags, train, val):
    write_flowers(tmp_path)
    data = build("--data-set", "FLOWERS", "--data-path", tmp_path, *flags)
    ids = {part: [number for name in names for number in FLOWERS[FLOWER_SPLITS[name]]]
           for part, names in (("train", train), ("val", val))}  # fmt: skip
    assert data.num_classes == 102 and data.classes[0] == "pink primrose" and data.classes[101] == "blackberry lily"
    source = data.train.dataset.source
    assert [label + 1 for _, label in source.samples] == [FLOWER_LABELS[number - 1] for number in ids["train"]]
    assert labels_of(data.val) == [FLOWER_LABELS[number - 1] - 1 for number in ids["val"]]
    for index, number in enumerate(ids["train"]):
        image, label = source[index]
        assert abs(pixels(image) - pixels(photo(number))).mean() < 12  # JPEG; other photographs differ by 60
        assert label == FLOWER_LABELS[number - 1] - 1


def test_cars(tmp_path):
    write_cars(tmp_path)
    data = build("--data-set", "CARS", "--data-path", tmp_path)
    assert data.classes == CAR_NAMES
    source = data.train.dataset.source
    assert [label + 1 for _, label in source.samples] == CAR_LABELS["train"]
    assert [label + 1 for label in labels_of(data.val)] == CAR_LABELS["test"]
    assert all(abs(pixels(source[n - 1][0]) - pixels(photo(n))).mean() < 12 for n in (1, 4))
    part = build("--data-set", "CARS", "--data-path", tmp_path, "--train-split", "test", "--val-split", "train")
    assert len(part.train.dataset) == 2 and len(labels_of(part.val)) == 4


@pytest.mark.parametrize(("name", "write"), [("FLOWERS", write_flowers), ("CARS", write_cars)])
def test_flowers_and_cars_are_refused_with_what_is_missing(tmp_path, any_checksum, name, write):
    words = ("--data-set", name, "--data-path", tmp_path)
    folder = {"FLOWERS": "flowers-102", "CARS": "stanford_cars"}[name]
    with pytest.raises(SystemExit, match=rf"^error: --data-set {name} cannot be read .*there is no {folder}/"):
        build(*words)
    write(tmp_path)
    with pytest.raises(SystemExit, match=r"^error: .*it has no split trian; there are train, "):
        build(*words, "--train-split", "trian")
    for number, path in enumerate(sorted((tmp_path / folder).rglob("*.mat"))):
        content = path.read_bytes()
        for damaged in (b"no mat file", content[: len(content) // 2]):
            path.write_bytes(damaged)
            with pytest.raises(SystemExit, match=rf"^error: --data-set {name} cannot be read from .*: \S") as caught:
                build(*words)
            assert "\n" not in str(caught.value), number
        path.unlink()
        with pytest.raises(SystemExit, match=f"there is no {folder}/.*{path.name} in it"):
            build(*words)
        path.write_bytes(content)


def test_flowers_that_are_not_the_published_ones_are_refused(tmp_path):
    write_flowers(tmp_path)
    with pytest.raises(SystemExit, match=r"imagelabels\.mat or setid\.mat: it is not the published file"):
        build("--data-set", "FLOWERS", "--data-path", tmp_path)


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


def test_digits_are_always_split_in_the_same_way():
    train, val = Digits(is_training=True), Digits(is_training=False)
    assert len(train) + len(val) == 1797
    scans = np.concatenate([train.scans, val.scans])
    original = (sklearn.datasets.load_digits().data * (255 / 16)).astype(np.uint8)
    assert sorted(scans.reshape(1797, 64).tolist()) == sorted(original.tolist())  # each scan is in one split
    fractions = np.bincount(train.labels) / np.bincount(np.concatenate([train.labels, val.labels]))
    assert len(fractions) == 10
    assert fractions == pytest.approx(0.8, abs=0.01)
    assert np.array_equal(train.labels, Digits(is_training=True).labels)
    assert build("--data-set", "DIGITS").num_classes == 10


def test_fake_shares_no_image_between_train_and_val():
    data = build("--data-set", "FAKE", "--num-classes", 7, "--input-size", 8)
    assert data.num_classes == 7
    assert build("--data-set", "FAKE").num_classes == 1000
    train, val = ({source[i][0].tobytes() for i in range(len(source))} for source in
                  (data.train.dataset.source, data.val.dataset.source))  # fmt: skip
    assert (len(train), len(val)) == (1024, 256)
    assert not train & val


def read_hugging_face_sets(pipe, good, bad, cache):
    """What is found in two data sets, sent through `pipe`."""
    faulthandler.dump_traceback_later(40, exit=True)  # a loader that waits for ever
    words = ("--data-path", cache, "--data-set")
    data = build(*words, f"hfds/{good}")
    samples, _ = next(iter(data.train))
    pipe.send({
        "classes": data.num_classes, "train": len(data.train.dataset), "val": len(data.val.dataset),
        "labels": sorted(labels_of(data.val)), "shape": list(samples.shape),
        "their package": hasattr(sys.modules["datasets"], "load_dataset"),
        "digest": len(digest(data.val.dataset.source, f"hfds/{good}", str(cache))),
    })  # fmt: skip
    data = build(*words, f"hfds/{good}", "--val-fraction", 0.5)
    pipe.send((labels_of(data.val), [*data.val_numbers], sum(len(labels) for _, labels in data.train), data.classes))
    data = build(*words, f"hfds/{bad}", "--num-workers", 1)
    pipe.send(sum(len(samples) for samples, _ in data.train))
    try:
        list(data.val)
    except BadImageError as error:
        pipe.send(str(error).splitlines()[-1])
    try:
        build(*words, f"hfds/{good}/missing")
    except SystemExit as error:
        pipe.send(str(error))


def test_hugging_face_set(tmp_path, monkeypatch, capfd):
    """In a forked process, since Hugging Face's package and datasets.py have the same name."""
    good = make_image_folder(tmp_path / "good", classes=("ant", "bee", "cow"), n=2, splits=("train", "validation"))
    bad = make_image_folder(tmp_path / "bad", n=2, splits=("train", "validation"))
    for split in ("train", "validation"):
        (bad / split / "cat" / "0.png").write_bytes(b"no image")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    process, pipe = forking.start(read_hugging_face_sets, good, bad, tmp_path / "cache")
    found, part, num_trained, bad_image, missing = (forking.receive(pipe, 40) for _ in range(5))
    assert forking.exit_code(process) == 0
    counts = {"classes": 3, "train": 6, "val": 6, "labels": [0, 0, 1, 1, 2, 2]}
    assert found == {**counts, "shape": [2, 3, 32, 32], "their package": True, "digest": 16}
    assert part == ([0, 1, 2], [1, 3, 5], 2, ["ant", "bee", "cow"])  # a class has two training images
    assert num_trained == 4
    assert "train/cat/0.png" in capfd.readouterr().err
    assert "validation/cat/0.png" in bad_image
    assert missing.startswith(f"error: --data-set hfds/{good}/missing") and "\n" not in missing
