"""Unreadable training images over the processes of a run: remembered by name, and read again after a resume."""

import pytest
import torch
from cutting import content, records
from helpers import TINY, make_image_folder, photo, run_main

from training import checkpoint

RUN = (*TINY, "--data-set", "IMNET", "--batch-size", 2, "--no-repeated-aug", "--sched", "constant")
ALL = ["cat/1.png", "dog/0.png"]


@pytest.fixture
def images(tmp_path):
    """8 training images, two of which cannot be read."""
    root = make_image_folder(tmp_path / "images")
    for name in ALL:
        (root / "train" / name).write_bytes(b"")
    return root


def train(folder, images, epochs, *words):
    run_main(*RUN, "--data-path", images, "--epochs", epochs, "--output-dir", folder, "--resume", "auto", *words)
    return torch.load(folder / checkpoint.LAST, weights_only=True)["bad_images"]


def repair(path):
    photo(77).save(path)


@pytest.mark.parametrize(
    ("change", "words", "reported", "counted"),
    [
        (lambda train: None, (), ALL, ALL),
        (lambda train: repair(train / "cat/1.png"), (), ["dog/0.png"], ALL),
        (lambda train: (train / "cat/1.png").unlink(), ("--resume-with-changes",), ["dog/0.png"], ALL),
        (lambda train: (train / "cat/0.png").unlink(), ("--resume-with-changes",), ALL, ALL),
        (lambda train: (train / "dog/2.png").write_bytes(b""), (), [*ALL, "dog/2.png"], [*ALL, "dog/2.png"]),
    ],
    ids=["unchanged", "repaired", "deleted", "another is deleted", "another is damaged"],
)
def test_what_happens_to_images_between_two_processes(change, words, reported, counted, images, tmp_path, capsys):
    assert train(tmp_path / "run", images, 1) == ALL
    capsys.readouterr()
    change(images / "train")
    assert train(tmp_path / "run", images, 3, *words) == counted
    lines = capsys.readouterr().err.splitlines()
    assert sorted(line.split()[2].removeprefix(f"{images}/train/").rstrip(":") for line in lines) == reported
    assert [record["bad_images"] for record in records(tmp_path / "run")][:2] == [2, len(counted)]


def test_a_run_in_two_processes_ends_as_in_one(images, tmp_path):
    train(tmp_path / "one", images, 2)
    train(tmp_path / "two", images, 1)
    train(tmp_path / "two", images, 2)
    assert content(tmp_path / "two") == content(tmp_path / "one")
    assert records(tmp_path / "two") == records(tmp_path / "one")


def test_positions_of_an_earlier_version_are_not_used(images, tmp_path, capsys):
    train(tmp_path / "run", images, 1)
    path = tmp_path / "run" / checkpoint.LAST
    torch.save(torch.load(path, weights_only=True) | {"bad_images": [1, 900]}, path)
    assert train(tmp_path / "run", images, 2) == ALL
    assert "unreadable images of an earlier version's checkpoint are not counted" in capsys.readouterr().out
