"""What `--check-data` and `--dry-run` find before a run, and what an evaluation that fails costs."""

import json
import os
from functools import partial

import pytest
import torch
from cutting import InputRecorder, content, records
from data_files import write_webdataset
from helpers import TINY, make_image_folder, one_line, run_main
from image_files import UNREADABLE
from ranks import run_ranks

from training import checkpoint

BASE = (*TINY, "--mixing-coef", 1)
FLAGS = (*BASE, "--data-set", "IMNET", "--batch-size", 2, "--no-repeated-aug", "--data-path")


def damage(path):
    path.write_bytes(b"no image")


# --check-data


@pytest.mark.parametrize("num_workers", [0, 2])
def test_check_data_lists_every_unreadable_image(tmp_path, capsys, num_workers):
    root = make_image_folder(tmp_path, n=20)
    bad = [root / "train/cat/0.png", root / "train/dog/19.png", root / "val/cat/3.png", root / "val/cat/zero.jpg"]
    for path, name in zip(bad, ("half.png", "text.jpg", "checksum.png", "zero.jpg"), strict=True):
        UNREADABLE[name](path)
    (root / "train/cat/labels.csv").touch()
    with pytest.raises(SystemExit) as caught:
        run_main(*FLAGS, root, "--check-data", "--num-workers", num_workers, "--output-dir", tmp_path / "run")
    one_line(caught, "4 of 81 images cannot be read")
    lines = capsys.readouterr().out.splitlines()
    for path in bad:
        [line] = [line for line in lines if str(path) in line]
        assert line.startswith(f"unreadable image {path}: ")
    assert "40 training images, 2 of them unreadable" in lines
    assert "41 validation images, 2 of them unreadable" in lines
    assert f"files left out for their extension in {root}/train: 1 (.csv 1)" in lines
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("data", ["folder", "digits"])
def test_check_data_of_good_images_succeeds(data, tmp_path, capsys, few_digits):
    # Fewer images than a step needs do not prevent it.
    words = (*TINY, "--batch-size", 4096)
    if data == "folder":
        words = (*FLAGS, make_image_folder(tmp_path))
    run_main(*words, "--check-data")
    lines = capsys.readouterr().out.splitlines()
    counts = {"folder": (8, 8, 2), "digits": (102, 26, 10)}[data]
    assert lines == [
        f"{counts[0]} training images, 0 of them unreadable",
        f"{counts[1]} validation images, 0 of them unreadable",
        f"{counts[2]} classes",
    ]


def test_check_data_finds_classes_that_differ_and_refuses_a_stream(refused, tmp_path):
    root = make_image_folder(tmp_path / "images")
    make_image_folder(root, classes=("fish",), splits=("val",))
    assert "only in val: fish" in refused(*FLAGS, root, "--check-data", base=())
    words = write_webdataset(tmp_path, train=(4,), validation=(2,))
    assert "--data-set wds/any is a stream" in refused(*words, "--num-classes", 3, "--check-data")


# --dry-run


def files(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_a_dry_run_takes_a_step_evaluates_and_writes_nothing(tmp_path, monkeypatch, capsys, few_digits):
    monkeypatch.chdir(tmp_path)
    recorder = InputRecorder(monkeypatch.setattr)
    run_main(*BASE, "--epochs", 20, "--accum-steps", 2, "--output-dir", "run", "--tensorboard", "--dry-run")
    assert [*recorder.digests] == [(0, 0), (0, 1)] and recorder.last == (0, 1)
    out = capsys.readouterr().out
    assert "dry run: at most one optimizer step, and an evaluation on all validation images; no file is written" in out
    assert "epochs 0 to 19" in out and out.splitlines()[-1].startswith("test accuracy: raw ")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("damaged", [False, True])
def test_a_dry_run_of_a_resume_leaves_the_folder_as_it_was(damaged, tmp_path, monkeypatch, capsys, few_digits):
    words = (*BASE, "--output-dir", tmp_path / "run", "--sched", "constant")
    run_main(*words)
    if damaged:
        os.truncate(tmp_path / "run" / checkpoint.LAST, 1000)
    before = files(tmp_path)
    recorder = InputRecorder(monkeypatch.setattr)
    run_main(*words, "--resume", "auto", "--epochs", 3, "--dry-run")
    assert files(tmp_path) == before
    # With the newest file damaged, the one before it only lacks the evaluation.
    assert [*recorder.digests] == ([] if damaged else [(1, 0)])
    assert ("damaged checkpoint" in capsys.readouterr().err) == damaged


def test_a_dry_run_of_a_finished_run_says_so(tmp_path, capsys, few_digits):
    words = (*BASE, "--output-dir", tmp_path / "run")
    run_main(*words)
    before = files(tmp_path)
    capsys.readouterr()
    run_main(*words, "--resume", "auto", "--dry-run")
    assert capsys.readouterr().out == f"{tmp_path / 'run'} has finished its 1 epochs\n" and files(tmp_path) == before


def test_a_dry_run_continues_where_its_step_overflows_in_fp16(monkeypatch, capsys, few_digits):
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**40))
    run_main(*BASE, "--amp", "fp16", "--dry-run")
    assert "epoch 0 of 1: no step taken, accuracy raw" in capsys.readouterr().out


# An evaluation that fails


@pytest.fixture
def bad_validation(tmp_path):
    """(folder with an image that cannot be read, how to repair it)."""
    root = make_image_folder(tmp_path / "images", n=8)
    path = root / "val/dog/2.png"
    good = path.read_bytes()
    damage(path)
    return root, lambda: path.write_bytes(good)


RUN = ("--epochs", 2, "--save-every-minutes", 0, "--tensorboard")


@pytest.fixture
def expected(bad_validation, tmp_path):
    """The folder of a run on good images."""
    root, repair = bad_validation
    repair()
    run_main(*FLAGS, root, *RUN, "--output-dir", tmp_path / "expected")
    damage(root / "val/dog/2.png")
    return tmp_path / "expected"


def test_an_evaluation_that_fails_costs_no_step(bad_validation, expected, tmp_path, monkeypatch, refused):
    root, repair = bad_validation
    words = (*FLAGS, root, *RUN, "--output-dir", tmp_path / "run", "--resume", "auto")
    for attempt in range(2):
        with monkeypatch.context() as patch:
            recorder = InputRecorder(patch.setattr)
            assert f"unreadable image {root}/val/dog/2.png" in refused(*words, base=())
        assert {epoch for epoch, _ in recorder.digests} == ({0} if attempt == 0 else set())
        stored = torch.load(tmp_path / "run" / checkpoint.LAST, weights_only=True)
        assert (stored["epoch"], stored["step"]) == (-1, 8)
        assert len([*(tmp_path / "run").glob("checkpoint*.pth")]) == attempt + 1
    repair()
    with monkeypatch.context() as patch:
        recorder = InputRecorder(patch.setattr)
        run_main(*words)
    assert {epoch for epoch, _ in recorder.digests} == {1}
    assert content(tmp_path / "run") == content(expected)
    assert records(tmp_path / "run") == records(expected)


def test_an_evaluation_that_fails_on_one_of_two_ranks_costs_no_step(bad_validation, tmp_path):
    root, repair = bad_validation
    words = ("main.py", *FLAGS, root, *RUN, "--output-dir", tmp_path / "run", "--resume", "auto")
    failed = run_ranks(2, *words)
    assert failed.returncode == 1
    assert failed.stderr.count(f"error: unreadable image {root}/val/dog/2.png") == 1
    stored = torch.load(tmp_path / "run" / checkpoint.LAST, weights_only=True)
    assert (stored["epoch"], stored["step"]) == (-1, 4)
    repair()
    assert run_ranks(2, *words).returncode == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["epochs"] == 2
