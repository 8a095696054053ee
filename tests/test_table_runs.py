"""The runs that table.py finds: their configurations, which ones count, and what must not differ between them."""

import json
import math

import pytest
from run_folders_on_disk import error_of, make_run, squeezed, tabulated

from reports import rows, run_folders


@pytest.mark.parametrize(
    ("run", "out", "name"),
    [
        ("s/plain/seed0", "s", "plain"),
        ("s/plain/seed0", "s/plain", "plain"),
        ("s/plain/seed0", "s/plain/seed0", "plain"),
        ("s/group/plain/seed12", "s", "group/plain"),
        ("s/plain-seed0", "s", "plain"),
        ("s/plain_seed0", "s/plain_seed0", "plain"),
        ("s/reseed0", "s", "reseed0"),
        ("s/plain/seed0/again", "s", "plain/seed0/again"),
    ],
)
def test_names_of_configurations(run, out, name, tmp_path):
    assert run_folders.configuration_name(tmp_path / run, tmp_path / out) == name


def test_runs_are_found_once_and_sorted_as_people_count(tmp_path, capsys):
    for number in (10, 2):
        make_run(tmp_path / f"layers{number}" / "seed0")
    make_run(tmp_path / "plain" / "seed0")
    runs = run_folders.find_runs([tmp_path, tmp_path / "plain"])
    assert [run.configuration for run in runs] == ["layers2", "layers10", "plain"]
    assert [*rows.statistics_table(runs, None, [], "plain").index] == ["plain", "layers2", "layers10"]


def test_a_flag_that_an_earlier_version_did_not_have_is_at_its_default(tmp_path, capsys):
    make_run(tmp_path / "plain" / "seed0", 0)
    make_run(tmp_path / "plain" / "seed1", 1, model_ema_warmup=False, mean=None)
    assert "| plain | 2 | 90.00 ± 0.00 |" in squeezed(tabulated(capsys, tmp_path).out)
    make_run(tmp_path / "plain" / "seed2", 2, model_ema_warmup=True)
    assert "differ in --model-ema-warmup: False in" in error_of(tmp_path)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        ({"done": 0, "finished": False}, "unfinished: epoch 0 of 2"),
        ({"done": 0}, "failed: log.txt ends after 0 epochs, summary.json reports 2"),
        ({"done": 1, "finished": False, "cooldown_epochs": 3}, "unfinished: epoch 1 of 5"),
        ({"last": {"test_acc1_ema": math.nan}}, "failed: test_acc1_ema is nan in epoch 1"),
        ({"last": {"test_loss": math.inf}, "finished": False}, "failed: test_loss is inf in epoch 1"),
        ({"last": {"epoch": 4}}, "failed: log.txt ends after 5 epochs, summary.json reports 2"),
    ],
)
def test_what_is_not_averaged(make, problem, tmp_path, capsys):
    make_run(tmp_path / "plain" / "seed0", 0, 90.0, cooldown_epochs=make.get("cooldown_epochs", 0))
    make_run(tmp_path / "plain" / "seed1", 1, 50.0, **make)
    out = squeezed(tabulated(capsys, tmp_path).out)
    assert "| plain | 1 | 90.00 |" in out
    assert out.endswith(f"\n- plain/seed1, {problem}\n")


def test_a_study_without_a_finished_run_has_its_rows(tmp_path, capsys):
    make_run(tmp_path / "plain" / "seed0", done=1, finished=False)
    make_run(tmp_path / "other" / "seed0", last={"test_acc1": math.nan})
    make_run(tmp_path / "other" / "seed1", seed=1, done=1, finished=False)
    rows = tabulated(capsys, tmp_path).out.splitlines()[2:4]
    assert [row.split("|")[1].strip() for row in rows] == ["plain (unfinished)", "other (unfinished)"]
    assert all(row.replace(" ", "").endswith("|0|-|-|-|") for row in rows)


def test_a_last_epoch_without_a_step_failed(tmp_path, capsys):
    folder = make_run(tmp_path / "plain", 3)
    record = {"epoch": 1, "train_images_per_s": 100, "test_acc1": 10.0, "test_loss": 2.0}
    (folder / "log.txt").write_text(json.dumps(record) + "\n")
    assert "- plain/seed3, failed: no step taken in epoch 1" in tabulated(capsys, tmp_path).out


@pytest.mark.parametrize(
    "name", ["args.yaml", "log.txt", "summary.json", "redundancy.json", "environment.json", "changes.jsonl"]
)
@pytest.mark.parametrize("content", [b"\xff\xfe", b"[1, 2", b"3", b"{}"])
def test_unreadable_files_make_a_failed_run(name, content, tmp_path, capsys):
    make_run(tmp_path / "plain" / "seed0", 0, 90.0)
    folder = make_run(tmp_path / "plain" / "seed1", 1, 50.0)
    (folder / name).write_bytes(content)
    out = squeezed(tabulated(capsys, tmp_path).out)
    if (name, content) == ("redundancy.json", b"{}"):
        assert "| plain | 2 | 70.00 ± 28.28 |" in out
    else:
        assert "| plain | 1 | 90.00 |" in out
        assert out.count("\n- plain/seed") == 1


def test_a_partly_written_line_is_skipped_with_a_notice_on_stderr(tmp_path, capsys):
    folder = make_run(tmp_path / "plain", 0, 90.0, done=2, epochs=3, finished=False)
    with open(folder / "log.txt", "a") as log:
        log.write('{"epoch": 2, "test_ac')
    out, err = tabulated(capsys, tmp_path)
    assert "unfinished: epoch 2 of 3" in out
    assert "log.txt:3: not a complete JSON line" in err and "log.txt" not in out


def test_a_resumed_run_continues_from_its_checkpoint(tmp_path):
    folder = make_run(tmp_path / "plain", epochs=4, finished=False)
    again = {"epoch": 2, "train_loss": 1.0, "test_acc1": 70.0}
    with open(folder / "log.txt", "a") as log:
        log.write(json.dumps(again) + "\n")
    (run,) = run_folders.find_runs([tmp_path])
    assert [record["epoch"] for record in run.records] == [0, 1, 2]
    assert run.records[-1] == again
    assert run.problem == "unfinished: epoch 3 of 4"


def test_runs_of_a_configuration_differ_in_nothing_but_the_seed(tmp_path):
    make_run(tmp_path / "plain" / "seed0")
    make_run(tmp_path / "plain" / "seed5", 5, lr=0.1, opt="sgd")
    message = error_of(tmp_path)
    assert "the runs of plain differ in --lr: 0.0005 in" in message and "0.1 in" in message


def test_a_flag_that_only_one_run_has_is_a_difference(tmp_path):
    make_run(tmp_path / "plain" / "seed0")
    make_run(tmp_path / "plain" / "seed5", 5, drop_path=0.2)
    assert "--drop-path: 0.1 in" in error_of(tmp_path)  # the default


def test_runs_of_an_earlier_version_and_of_this_one_are_one_configuration(tmp_path):
    make_run(tmp_path / "plain" / "seed0", 0, fused_opt=True, decode_once=True)
    make_run(tmp_path / "plain" / "seed1", 1, scale_lr_flag=False, grad_norms_every=5)
    assert [run.problem for run in run_folders.find_runs([tmp_path])] == [None, None]


def test_a_seed_counts_once(tmp_path):
    make_run(tmp_path / "plain" / "seed1", seed=1)
    make_run(tmp_path / "plain" / "seed5", seed=1)
    message = error_of(tmp_path)
    assert "plain has seed 1 twice" in message and "seed5" in message
