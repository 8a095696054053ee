"""A stopped and resumed run ends as one that was not stopped: weights, average, optimizer, pixels, log."""

import json
import time
from signal import SIGABRT

import pytest
import torch
from cutting import DIGITS, EVERYTHING, content, cut_run, points, records
from helpers import few_digits, run_main
from ranks import run_ranks, run_torchrun

from training import checkpoint, resuming
from training.stopping import RESUMABLE

STEPS = DIGITS * 4 // 5 // 256 * 256 // 64  # of an epoch: repeated augmentation rounds its images down


@pytest.fixture(scope="module", autouse=True)
def digits():
    """`cutting.py` as a program has them too."""
    with few_digits(DIGITS):
        yield


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run that was not stopped: its folder and the digests of its batches."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    with pytest.MonkeyPatch.context() as patch:
        digests = cut_run(patch, folder)
    return folder, digests


@pytest.mark.parametrize(
    "cuts",
    [
        [(0, 1)],
        [(0, STEPS // 2), (2, STEPS // 2)],
        [(0, STEPS), (1, 1)],
        [(1, STEPS - 1), (1, STEPS), (2, STEPS)],
    ],
)
def test_a_stopped_run_ends_as_one_that_was_not_stopped(cuts, uninterrupted, tmp_path, monkeypatch):
    folder, digests = uninterrupted
    assert cut_run(monkeypatch, tmp_path / "run", *cuts) == digests
    assert len(digests) == 3 * STEPS * 2
    assert content(tmp_path / "run") == content(folder)
    assert records(tmp_path / "run") == records(folder)
    assert points(tmp_path / "run") == points(folder)
    summaries = [json.loads((run / "summary.json").read_text()) for run in (tmp_path / "run", folder)]
    assert [s.pop("training_seconds") >= 0 for s in summaries] and summaries[0] == summaries[1]


def test_gradient_norms_change_nothing(uninterrupted, tmp_path, monkeypatch):
    folder, digests = uninterrupted
    assert cut_run(monkeypatch, tmp_path / "run", flags=(*EVERYTHING, "--grad-norms-every", "0")) == digests
    assert content(tmp_path / "run") == content(folder)
    with_norms = [{n: v for n, v in record.items() if not n.startswith("gradnorm_")} for record in records(folder)]
    assert records(tmp_path / "run") == with_norms != records(folder)


def test_the_number_of_workers_changes_nothing(uninterrupted, tmp_path, monkeypatch):
    folder, digests = uninterrupted
    assert cut_run(monkeypatch, tmp_path / "run", (1, 5), then=("--num-workers", "2")) == digests
    assert content(tmp_path / "run") == content(folder)
    assert records(tmp_path / "run") == records(folder)


def test_another_seed_feeds_other_pixels_in_another_order(uninterrupted, tmp_path, monkeypatch):
    _, digests = uninterrupted
    other = cut_run(monkeypatch, tmp_path / "run", flags=(*EVERYTHING, "--seed", "1", "--epochs", "1"))
    assert all(digests[key] != value for key, value in other.items())


# --- two ranks

SHORT = (*EVERYTHING, "--epochs", "2", "--drop", "0", "--opt", "sgd", "--lr", "0.05")
CUTTING = "tests/cutting.py"


def ranks(count, folder, out, *flags, when="never", rank=0, target="self", name="TERM", torchrun=None):
    """The run of `SHORT` until it ends or is stopped: {"epoch step": sorted sample indices of all ranks}.

    Args:
        torchrun: its flags, to start the ranks with it.
    """
    out.mkdir(exist_ok=True)
    words = (CUTTING, out, when, rank, target, name, *SHORT, *flags, "--output-dir", folder, "--resume", "auto")
    result = run_ranks(count, *words) if torchrun is None else run_torchrun(count, *torchrun, *words)
    if name == "KILL" and "--max-restarts" not in (torchrun or ()):
        assert result.returncode == 1 and "error: processes could not exchange data" in result.stderr, result.stderr
    elif (out / "sent").exists() and "--max-restarts" not in (torchrun or ()):
        assert torchrun is not None or result.returncodes == [RESUMABLE] * count, result.stderr
        # After its traceback torch's launcher sometimes aborts, as it ends with a thread that is not joined.
        codes = {RESUMABLE} if torchrun is None else {1, -SIGABRT}
        assert result.returncode in codes, result.stderr
        assert time.time() - float((out / "sent").read_text()) < 30
        assert resuming.find_newest(folder) == folder / checkpoint.LAST
        assert result.stderr.count("received: saving at the next step") == (count if target == "parent" else 1)
    else:
        assert result.returncode == 0, result.stderr
    steps = {}
    for file in out.glob("*.json"):
        for key, indices in json.loads(file.read_text()).items():
            steps[key] = sorted([*steps.get(key, []), *indices])
    return steps


@pytest.fixture(scope="module")
def on_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return folder / "run", ranks(2, folder / "run", folder / "steps", "--batch-size", "16")


@pytest.mark.parametrize(
    "cut",
    [
        {"when": "step:0:7", "rank": 1, "name": "USR1"},
        pytest.param({"when": "step:0:10", "target": "parent"}, marks=pytest.mark.slow),
        {"when": "validation:0", "target": "group", "name": "INT"},
        {"when": "validation:0", "rank": 1},
        pytest.param({"when": "save:2", "target": "parent", "name": "INT"}, marks=pytest.mark.slow),
    ],
    ids=lambda cut: " ".join(map(str, cut.values())),
)
def test_two_ranks_stopped_by_a_signal_end_as_if_they_were_not(cut, on_two, tmp_path):
    folder, steps = on_two
    flags = ("--batch-size", "16", "--save-every-steps", "6", "--num-workers", "1")
    torchrun = () if cut.get("target") == "parent" else None
    first = ranks(2, tmp_path / "run", tmp_path / "first", *flags, **cut, torchrun=torchrun)
    rest = ranks(2, tmp_path / "run", tmp_path / "rest", *flags)
    assert first | rest == steps and not first.keys() & rest.keys()
    assert content(tmp_path / "run") == content(folder)
    assert records(tmp_path / "run") == records(folder)
    assert points(tmp_path / "run") == points(folder)


@pytest.mark.slow
def test_gradient_norms_of_the_main_rank_change_nothing(on_two, tmp_path):
    folder, steps = on_two
    flags = ("--batch-size", "16", "--grad-norms-every", "0")
    assert ranks(2, tmp_path / "run", tmp_path / "steps", *flags) == steps
    assert content(tmp_path / "run") == content(folder)


@pytest.mark.parametrize(("when", "name", "at"), [("step:1:3", "INT", (0, 3)), ("validation:1", "USR1", (0, STEPS))])
def test_one_process_stopped_by_a_signal_has_saved(when, name, at, tmp_path):
    ranks(1, tmp_path / "run", tmp_path / "steps", "--batch-size", "32", when=when, name=name)
    saved = torch.load(tmp_path / "run" / checkpoint.LAST, weights_only=True)
    assert (saved["epoch"], saved["step"]) == at


def test_a_killed_rank_is_started_again_and_ends_with_the_same_weights(on_two, tmp_path):
    folder, _ = on_two
    flags = ("--batch-size", "16", "--save-every-steps", "5")
    restarts = ("--max-restarts", "1")
    ranks(2, tmp_path / "run", tmp_path / "steps", *flags, when="step:1:8", rank=1, name="KILL", torchrun=restarts)
    assert (tmp_path / "steps" / "sent").exists()
    assert content(tmp_path / "run") == content(folder)
    assert records(tmp_path / "run") == records(folder)
    assert points(tmp_path / "run") == points(folder)


def test_a_killed_rank_without_restarts_ends_the_others_with_one_line(tmp_path):
    kill = {"when": "step:0:3", "rank": 1, "name": "KILL"}
    steps = ranks(2, tmp_path / "run", tmp_path / "steps", "--batch-size", "16", **kill)  # checks the line
    assert [*steps] == ["0 1", "0 2", "0 3"]


def test_two_ranks_then_one_then_two_see_the_same_global_batches(on_two, tmp_path):
    folder, steps = on_two
    parts = [
        ranks(2, tmp_path / "run", tmp_path / "a", "--batch-size", "16", when="step:0:4"),
        ranks(1, tmp_path / "run", tmp_path / "b", "--batch-size", "32", when="step:1:3"),
        ranks(2, tmp_path / "run", tmp_path / "c", "--batch-size", "8", "--accum-steps", "4"),
    ]
    assert parts[0] | parts[1] | parts[2] == steps
    assert sum(map(len, parts)) == len(steps) == 2 * STEPS
    ours, theirs = (torch.load(run / checkpoint.LAST, weights_only=True) for run in (tmp_path / "run", folder))
    assert (ours["lr_scheduler"], ours["epoch"], ours["step"]) == (theirs["lr_scheduler"], 1, 0)
    assert [r["train_lr"] for r in records(tmp_path / "run")] == [r["train_lr"] for r in records(folder)]


def test_another_global_batch_within_an_epoch_is_refused(tmp_path):
    ranks(1, tmp_path / "run", tmp_path / "a", "--batch-size", "32", when="step:0:2")
    with pytest.raises(SystemExit, match="images per optimizer step 64 -> 32"):
        run_main(*SHORT, "--batch-size", "16", "--output-dir", tmp_path / "run", "--resume", "auto")
