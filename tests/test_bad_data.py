"""Data sets that are missing, incomplete or damaged: a run ends in one line that names the flag and the path."""

import pytest
from helpers import FOLDER, TINY, make_image_folder, run_main


def test_data_path_is_missing_or_no_folder(refused, tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "missing", tmp_path / "file"):
        for name in ("IMNET", "CIFAR", "CIFAR10", "INAT", "INAT19", "torch/cifar10", "wds/shards"):
            assert f"--data-path {path}" in refused("--data-set", name, "--data-path", path)


@pytest.mark.parametrize("name", ["CIFAR", "CIFAR10", "INAT", "INAT19", "torch/cifar10", "wds/shards"])
def test_data_path_holds_something_else(refused, tmp_path, name):
    line = refused("--data-set", name, "--data-path", tmp_path)
    assert f"--data-set {name}" in line and str(tmp_path) in line


@pytest.mark.parametrize("missing", ["train", "val"])
def test_image_folder_without_a_part(refused, tmp_path, missing):
    make_image_folder(tmp_path, splits=({"train", "val"} - {missing}))
    line = refused(*FOLDER, tmp_path)
    assert f"--data-path {tmp_path}" in line and repr(missing) in line
    assert "'other'" in refused(*FOLDER, tmp_path, f"--{missing}-dir", "other", f"--{missing}-split", "other")


@pytest.mark.parametrize("extra", ["train", "val"])
def test_different_classes_in_train_and_val(refused, tmp_path, extra):
    make_image_folder(tmp_path)
    make_image_folder(tmp_path, classes=("fish",), splits=(extra,))
    line = refused(*FOLDER, tmp_path)
    assert str(tmp_path) in line and f"only in {extra}: fish" in line


def test_different_classes_of_the_same_number(refused, tmp_path):
    make_image_folder(tmp_path, classes=("cat", "dog"), splits=("train",))
    make_image_folder(tmp_path, classes=("cat", "fish"), splits=("val",))
    line = refused(*FOLDER, tmp_path)
    assert "only in train: dog" in line and "only in val: fish" in line


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_empty_class(refused, tmp_path, split):
    make_image_folder(tmp_path)
    (tmp_path / split / "empty").mkdir()
    assert "empty" in refused(*FOLDER, tmp_path)


def test_no_class_at_all(refused, tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    assert str(tmp_path) in refused(*FOLDER, tmp_path)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_unreadable_images(refused, tmp_path, num_workers):
    make_image_folder(tmp_path)
    for number in range(3):
        (tmp_path / "train" / "cat" / f"{number}.png").write_bytes(b"")
    words = (*FOLDER, tmp_path, "--num-workers", num_workers, "--max-bad-images")
    line = refused(*words, 2)
    assert line.startswith(f"error: unreadable image {tmp_path}/train/cat/") and "2 may be replaced" in line
    run_main(*TINY, *words, 3)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_unreadable_validation_image(refused, tmp_path, num_workers):
    make_image_folder(tmp_path)
    path = tmp_path / "val" / "dog" / "2.png"
    path.write_bytes(path.read_bytes()[:400])
    assert refused(*FOLDER, tmp_path, "--num-workers", num_workers).startswith(f"error: unreadable image {path}")
