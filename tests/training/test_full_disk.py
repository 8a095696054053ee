"""A full disk or a run folder that vanishes during a run: every record catches up when it can, on all ranks."""

import os
import resource

import pytest
from cutting import InputRecorder, outcome
from full_disk import Disk
from helpers import TINY, run_main
from ranks import run_ranks

from training.stopping import RESUMABLE

FLAGS = (
    *(*TINY, "--preset", "released", "--lr", "4e-3", "--unscale-lr", "--warmup-epochs", "0", "--tensorboard"),
    *("--epochs", "2", "--save-every-steps", "2", "--log-interval", "2", "--resume", "auto"),
)
LOST = "error: the last checkpoint could not be written: [Errno 28] No space left on device"


# --- one process


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    from helpers import few_digits

    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    with few_digits():
        run_main(*FLAGS, "--output-dir", folder)
    return outcome(folder)


def run_with(monkeypatch, at, folder):
    with monkeypatch.context() as patch:
        InputRecorder(patch.setattr, at)
        run_main(*FLAGS, "--output-dir", folder)


@pytest.mark.parametrize(
    ("full", "free"),
    [
        ("step:0:1", "step:0:5"),  # the save within an epoch
        ("validation:0", "step:1:1"),  # the epoch's record, its figures, the best checkpoints and the last one
        ("step:0:1", "validation:1"),  # from the first save to the last evaluation
    ],
)
def test_a_run_catches_up_when_the_disk_has_room_again(
    full, free, undisturbed, tmp_path, monkeypatch, capsys, few_digits
):
    disk = Disk(full, free)
    monkeypatch.setattr(os, "fsync", disk.flush)
    run_with(monkeypatch, disk.at, tmp_path / "run")
    assert outcome(tmp_path / "run") == undisturbed
    err = capsys.readouterr().err
    assert err.count("error: no checkpoint saved in") >= 1
    for name in ("log.txt", "events.out"):
        assert sum(name in line for line in err.splitlines()) <= 1, err


@pytest.mark.parametrize("full", ["step:0:1", "validation:1"])
def test_a_run_on_a_full_disk_ends_with_one_error_and_continues_later(
    full, undisturbed, tmp_path, monkeypatch, few_digits
):
    disk = Disk(full, "never")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr(os, "fsync", disk.flush)
        run_with(monkeypatch, disk.at, tmp_path / "run")
    assert caught.value.code == LOST
    assert not (tmp_path / "run" / "summary.json").exists()
    run_main(*FLAGS, "--output-dir", tmp_path / "run")
    assert outcome(tmp_path / "run") == undisturbed


def test_a_disk_that_is_full_at_the_very_end_leaves_a_run_to_be_finished(undisturbed, tmp_path, few_digits):
    """The log and the figure are the last files but one; the next start writes what is missing."""

    def full_disk(*_):
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, most))  # a real write fails with "File too large"

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as caught:
            patch.setattr("training.log.RunLog.close", full_disk)
            run_main(*FLAGS, "--output-dir", tmp_path / "run", draw_curves=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot be written: File too large; the run is saved, start again" in caught.value.code
    assert not {"summary.json", "curves.png"} & {path.name for path in (tmp_path / "run").iterdir()}
    run_main(*FLAGS, "--output-dir", tmp_path / "run", draw_curves=True)
    assert (tmp_path / "run" / "curves.png").exists()
    assert outcome(tmp_path / "run") == undisturbed


def test_a_run_folder_that_vanishes_and_comes_back(undisturbed, tmp_path, monkeypatch, few_digits):
    def at(*moment):
        if moment == ("validation", 0) and (tmp_path / "run").exists():
            (tmp_path / "run").rename(tmp_path / "away")
        elif moment == ("step", 1, 3):
            (tmp_path / "away").rename(tmp_path / "run")

    run_with(monkeypatch, at, tmp_path / "run")
    assert outcome(tmp_path / "run") == undisturbed


# --- two ranks: an error of the main process involves no other one, so nobody waits for ever


def two_ranks(folder, *moments):
    return run_ranks(2, "tests/full_disk.py", *moments, *FLAGS, "--batch-size", "8", "--output-dir", folder, timeout=60)


@pytest.fixture(scope="module")
def on_two_undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two") / "run"
    assert two_ranks(folder, "never", "never", "none").returncode == 0
    return outcome(folder)


@pytest.mark.parametrize(
    ("full", "free", "name", "code"),
    [
        ("validation:1", "never", "none", 1),
        pytest.param("validation:1", "failure:5", "none", 0, marks=pytest.mark.slow),  # the second attempt at the end
        pytest.param("step:0:1", "step:0:4", "none", 0, marks=pytest.mark.slow),
        ("step:1:3", "never", "TERM", 1),
        pytest.param("step:1:3", "failure:2", "TERM", RESUMABLE, marks=pytest.mark.slow),
    ],
)
def test_two_ranks_whose_disk_is_full_end(full, free, name, code, on_two_undisturbed, tmp_path):
    result = two_ranks(tmp_path / "run", full, free, name)
    assert result.returncodes == [code, code], result.stderr
    assert result.stderr.count(LOST) == (code == 1)
    assert "error: no checkpoint saved in" in result.stderr and "Traceback" not in result.stderr
    if code != 0:
        assert two_ranks(tmp_path / "run", "never", "never", "none").returncode == 0
    assert outcome(tmp_path / "run") == on_two_undisturbed
