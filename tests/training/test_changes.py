"""What a resumed run may change, silently, with --resume-with-changes, or not at all."""

import json
import shutil

import pytest
import torch
import yaml
from helpers import TINY, few_digits, log_of, make_image_folder, parse, run_main

from diversity import REGULARIZERS
from training import arguments, changes
from training.resuming import Checkpoint

DATA = {"classes": ["cat", "dog"], "num_classes": 2, "train_images": 100, "val_images": 20, "steps": 6}


def compared(before=(), after=(), *, stored=None, data=(), allowed=False, path="a/checkpoint.pth"):
    """`find_changes` between two command lines."""
    content = {"args": vars(parse(*before)), "data": DATA, "global_batch": 16, "step": 0} | (stored or {})
    args = vars(parse(*after))
    return changes.find_changes(
        Checkpoint(path, content), args, arguments.defaults(), DATA | dict(data), 16, allowed
    )  # fmt: skip


def test_every_flag_is_of_one_kind():
    flags = {*arguments.defaults()}
    kinds = [
        {"input_size", *changes.MODEL, *changes.REMEDIES},
        {*changes.DATA},
        changes.UNRELATED - {"check_data", "dry_run"},
    ]
    assert all(kind <= flags for kind in kinds)
    assert sum(map(len, kinds)) == len(set().union(*kinds))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((), ("--num-workers", "3", "--log-interval", "7", "--output-dir", "x", "--keep-checkpoints", "5")),
        ((), ("--data-path", "elsewhere", "--compile", "--max-bad-images", "4", "--finetune", "x.pth")),
        ((), ("--batch-size", "8", "--accum-steps", "2")),
        (("--preset", "released"), ("--config-free",)),
        (("--attn-abscos-within-coef", "0.1"), ("--attn-cos-within-coef", "0.1")),
        (("--model-kwargs", "channels=(8,8)"), ("--model-kwargs", "channels=[8,8]")),  # as args.yaml has it
        (("--sched", "constant"), ("--sched", "constant", "--epochs", "9")),
        (("--cache-images", "memory"), ("--cache-images", "device")),
        (("--cache-images", "memory"), ("--cache-images", "memory", "--cache-size", "32")),  # as by default
        ((), ("--cache-size", "40")),
        (("--sched", "step"), ("--sched", "step", "--epochs", "9", "--cooldown-epochs", "2")),
    ],
)
def test_what_does_not_change_the_training(before, after):
    if after == ("--config-free",):  # the preset's flags, one by one
        names = ("mixing", *(name for name, term in REGULARIZERS.items() if term.coef))
        args = parse(*before)
        after = [word for name in names for word in (f"--{name}_coef", getattr(args, f"{name}_coef"))]
    assert compared(before, after) == []


@pytest.mark.parametrize(
    ("before", "after", "listed"),
    [
        ((), ("--lr", "0.1"), "--lr 0.0005 -> 0.1"),
        ((), ("--seed", "4"), "--seed 0 -> 4"),
        ((), ("--epochs", "9"), "--epochs 1 -> 9"),
        (("--sched", "plateau", "--lr-noise", "0.5"), ("--sched", "plateau", "--lr-noise", "0.5", "--epochs", "9"),
         "--epochs 1 -> 9"),
        ((), ("--emb_cos_within_coef", "0.5"), "--emb-cos-within-coef 0.0 -> 0.5"),
        ((), ("--aa", "none"), "--aa rand-m9-mstd0.5-inc1 -> None"),
        ((), ("--no-model-ema",), "--model-ema True -> False"),
        (("--cache-images", "device"), (), "--cache-images device -> none"),
        (("--cache-images", "device"), ("--cache-images", "device", "--cache-size", "40"), "--cache-size 32 -> 40"),
        ((), ("--train-split", "half"), "--train-split train -> half"),
        (("--sched", "constant"), (), "--sched constant -> cosine"),
        ((), ("--sched", "step"), "--sched cosine -> step"),
    ],
)  # fmt: skip
def test_what_changes_the_training_needs_a_word(before, after, listed):
    with pytest.raises(SystemExit, match=r"error: --resume a/checkpoint.pth was trained differently: ") as caught:
        compared(before, after)
    assert listed in caught.value.code and "--resume-with-changes" in caught.value.code
    assert [str(change) for change in compared(before, after, allowed=True)] == [listed]


@pytest.mark.parametrize(
    "flags",
    [
        ("--model-kwargs", "depth=2", "embed_dim=24", "num_heads=6"),
        ("--model-kwargs", "depth=2", "embed_dim=24", "num_heads=3", "global_pool=avg"),
        ("--model", "deit_small_patch16_224"),
        ("--input-size", "64"),
        ("--patch-size", "16"),
        ("--data-set", "FAKE"),
        ("--num-classes", "11"),
        ("--val-fraction", "0.1"),
        ("--remedy", "xsa"),
    ],
    ids=" ".join,
)
def test_another_model_or_data_set_is_refused(flags):
    with pytest.raises(SystemExit, match=f"has another (model|data set): {flags[0]} .* -> "):
        compared((), flags, allowed=True)


def test_numbers_of_the_data_are_compared():
    with pytest.raises(SystemExit, match="training images 100 -> 99, validation images 20 -> 21"):
        compared(data={"train_images": 99, "val_images": 21})
    listed = compared(data={"train_images": 99}, stored={"global_batch": 32}, allowed=True)
    assert [*map(str, listed)] == ["images per optimizer step 32 -> 16", "training images 100 -> 99"]
    with pytest.raises(SystemExit, match="is within an epoch that has other images: training images 100 -> 99"):
        compared(data={"train_images": 99}, stored={"step": 3}, allowed=True)
    assert compared(data={"val_images": 21}, stored={"step": 3}, allowed=True)


def test_checkpoints_that_do_not_know_their_flags_are_continued():
    assert compared((), ("--lr", "0.1"), stored={"args": None, "data": {}}) == []
    older = {name: value for name, value in vars(parse()).items() if name not in ("mixup_mode", "seed")}
    assert compared(stored={"args": older | {"flag_of_long_ago": 1}}) == []
    with pytest.raises(SystemExit, match="--seed 0 -> 3"):
        compared((), ("--seed", "3"), stored={"args": older})


# Whole runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of one epoch on 102 digits."""
    folder = tmp_path_factory.mktemp("run") / "run"
    with few_digits():
        run_main(*TINY, "--output-dir", folder)
    return folder


@pytest.fixture
def run(finished, tmp_path, few_digits):
    """A copy of the run."""
    return shutil.copytree(finished, tmp_path / "run")


def test_a_change_is_recorded_with_its_epoch_and_history_stays(run, capsys):
    words = ("--output-dir", run, "--resume", "auto", "--epochs", 2, "--emb_cos_within_coef", 0.5)
    files = {path: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(SystemExit, match=r"--epochs 1 -> 2, --emb-cos-within-coef 0\.0 -> 0\.5"):
        run_main(*TINY, *words)
    assert {path: path.read_bytes() for path in run.iterdir()} == files
    first = (run / "objective.txt").read_text()
    for _ in range(2):  # the second has finished, and changes nothing
        run_main(*TINY, *words, "--resume-with-changes")
        lines = [json.loads(line) for line in (run / "changes.jsonl").read_text().splitlines()]
        assert lines == [
            {"epoch": 1, "step": 0, "name": "--epochs", "before": 1, "after": 2},
            {"epoch": 1, "step": 0, "name": "--emb-cos-within-coef", "before": 0.0, "after": 0.5},
        ]
        assert yaml.safe_load((run / "args.yaml").read_text())["epochs"] == 2
        objective = (run / "objective.txt").read_text()
        assert objective.startswith(f"{first}\nfrom epoch 1 step 0 on:\n") and objective.count("emb_cos_within") == 1
    assert "changed since the checkpoint: --epochs 1 -> 2" in capsys.readouterr().out
    assert len(log_of(run)) == 2


def test_a_run_whose_checkpoints_are_lost_is_not_started_anew(run):
    words = (*TINY, "--output-dir", run, "--resume", "auto", "--epochs", 2, "--resume-with-changes")
    log = (run / "log.txt").read_text()
    for path in run.glob("checkpoint*.pth"):
        path.write_bytes(path.read_bytes()[:-2000])
    for _ in range(2):
        with pytest.raises(SystemExit, match="has a run of 1 epochs but no undamaged checkpoint; damaged: "):
            run_main(*words)
    for path in run.glob("checkpoint*"):
        path.unlink()
    with pytest.raises(SystemExit, match="has a run of 1 epochs but no undamaged checkpoint; put one back"):
        run_main(*words)
    assert (run / "log.txt").read_text() == log


def test_a_run_that_was_killed_in_its_first_epoch_starts_anew(run):
    for path in (*run.glob("checkpoint*"), run / "summary.json"):
        path.unlink()
    run_main(*TINY, "--output-dir", run, "--resume", "auto")
    assert len(log_of(run)) == 1


def test_a_moved_run_continues_where_it_lies(run, tmp_path, monkeypatch):
    moved = run.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    run_main("--config", moved / "args.yaml", "--resume", "auto", "--epochs", 2, "--resume-with-changes")
    assert [record["epoch"] for record in log_of(moved)] == [0, 1] and not run.exists()


def test_classes_are_continued_by_name(tmp_path):
    """Folders that were renamed are refused; the order of others does not matter."""
    data = make_image_folder(tmp_path / "data", classes=("cat", "dog"))
    words = (*TINY, "--data-set", "IMNET", "--batch-size", 2, "--no-repeated-aug", "--data-path", data)
    words += ("--output-dir", tmp_path / "run")
    run_main(*words)
    stored = torch.load(tmp_path / "run" / "checkpoint.pth")["data"]
    assert stored == {"classes": ["cat", "dog"], "num_classes": 2, "train_images": 8, "val_images": 8, "steps": 4}
    for split in ("train", "val"):
        (data / split / "dog").rename(data / split / "ant")
    with pytest.raises(SystemExit, match="other classes: only in the data: ant; only in the checkpoint: dog"):
        run_main(*words, "--resume", "auto", "--epochs", 2, "--resume-with-changes")
