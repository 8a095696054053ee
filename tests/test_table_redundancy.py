"""Which measurement of redundancy table.py shows: all runs were measured in the same way, or it shows none."""

import json
import math

import pytest
from run_folders_on_disk import make_run, redundancy, report, tabulated

from reports import chosen_measures, run_folders

CHOSEN = (
    "redundancy: measured after the last epoch on data set CIFAR10, split test, the first 512 images, 224 pixels wide, "
    "EMA weights (redundancy.json)"
)
LOGGED = (
    "redundancy: measured after the last epoch on data set DIGITS, split validation, the first 64 images, 32 pixels "
    "wide, raw weights (log.txt"
)


def chosen(out):
    return chosen_measures.choose_redundancy(run_folders.find_runs([out]))


@pytest.fixture
def measured(tmp_path):
    """Two finished runs that both sources know, and an unfinished one that neither does."""
    for name in ("plain", "all"):
        report(make_run(tmp_path / name / "seed0", last=redundancy(0.5)))
    make_run(tmp_path / "plain" / "seed1", 1, done=1, finished=False)
    return tmp_path


def test_the_report_is_chosen_where_all_finished_runs_have_it(measured, capsys):
    assert chosen(measured) == ("redundancy.json", CHOSEN)
    out = tabulated(capsys, measured, "--measures", chosen_measures.DEFAULT_MEASURES[0]).out
    assert f"- {CHOSEN}\n" in out
    assert out.count("| 0.250 ") == 2 and "0.500" not in out


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"images": 64},
            "in redundancy.json, all/seed0 was measured on the first 512 images, plain/seed0 on the first 64",
        ),
        ({"data_set": "IMNET"}, "all/seed0 was measured on data set CIFAR10, plain/seed0 on data set IMNET"),
        ({"split": "val"}, "all/seed0 was measured on split test, plain/seed0 on split val"),
        ({"input_size": 32}, "all/seed0 was measured on 224 pixels wide, plain/seed0 on 32 pixels wide"),
        ({"weights": "raw"}, "all/seed0 was measured on EMA weights, plain/seed0 on raw weights"),
        ({"epoch": 0}, "the redundancy.json of plain/seed0 is of epoch 0, not of its last, 1"),
        ({"epoch": None}, "the redundancy.json of plain/seed0 is of an unknown epoch, not of its last, 1"),
        ({"value": math.nan}, "plain/seed0 has none in redundancy.json"),
    ],
)
def test_reports_that_were_measured_differently_are_not_used(change, reason, measured, capsys):
    report(measured / "plain" / "seed0", **change)
    source, note = chosen(measured)
    assert source == "log.txt"
    assert note.startswith(f"{LOGGED}, as ") and reason in note
    out = tabulated(capsys, measured, "--measures", chosen_measures.DEFAULT_MEASURES[0]).out
    assert out.count("| 0.500 ") == 2 and "0.250" not in out


def test_a_report_of_an_older_version_is_of_an_unknown_epoch(measured):
    (measured / "all" / "seed0" / "redundancy.json").write_text('{"summary": {"embedding_token_cosine": 0.25}}')
    source, note = chosen(measured)
    assert source == "log.txt" and "all/seed0 is of an unknown epoch" in note


def test_epochs_may_differ_between_runs_if_each_is_the_last(measured):
    report(make_run(measured / "long", epochs=5), epoch=4)
    assert chosen(measured) == ("redundancy.json", CHOSEN)


def test_sources_are_never_mixed(tmp_path, capsys):
    """One run was measured while training, the other afterwards."""
    make_run(tmp_path / "plain" / "seed0", last=redundancy(0.5))
    report(make_run(tmp_path / "all" / "seed0"))
    reason = "all/seed0 has none in the last epoch of log.txt"
    note = f"redundancy: not in the table, as plain/seed0 has none in redundancy.json and {reason}"
    note += "; run analyze.py on all runs in the same way"
    assert chosen(tmp_path) == (None, note)
    out, _ = tabulated(capsys, tmp_path)
    assert f"- {note}\n" in out and "cosine" not in out and out.count("| configuration ") == 1
    out, err = tabulated(capsys, tmp_path, "--format", "csv")
    assert note in err.splitlines() and len(err.splitlines()) == 4 and "cosine" not in out
    assert "not in the table" not in tabulated(capsys, tmp_path, "--measures").out


def test_only_the_last_epoch_of_the_log_counts(tmp_path):
    folder = make_run(tmp_path / "plain", last=redundancy(0.5, math.nan))
    first, last = (folder / "log.txt").read_text().splitlines()
    first = json.dumps(json.loads(first) | redundancy(0.9, 0.9, 0.9))
    (folder / "log.txt").write_text(f"{first}\n{last}\n")
    (run,) = run_folders.find_runs([tmp_path])
    assert run.redundancy["log.txt"].measures == {chosen_measures.DEFAULT_MEASURES[0]: 0.5}
    (folder / "log.txt").write_text(f"{first}\n{json.dumps({'epoch': 1, 'train_loss': 1.0, 'test_acc1': 90.0})}\n")
    assert chosen(tmp_path) == (None, None)


def test_runs_logged_on_different_images_are_not_compared(tmp_path):
    make_run(tmp_path / "plain", last=redundancy(0.5))
    make_run(tmp_path / "other", last=redundancy(0.5), input_size=64)
    source, note = chosen(tmp_path)
    assert source is None
    assert "in log.txt, other/seed0 was measured on 64 pixels wide, plain/seed0 on 32 pixels wide" in note


def test_without_any_measure_there_is_no_note_unless_asked_for(tmp_path, capsys):
    make_run(tmp_path / "plain")
    make_run(tmp_path / "other", done=1, finished=False, last=redundancy(0.5))
    assert "redundancy" not in tabulated(capsys, tmp_path).out
    out = tabulated(capsys, tmp_path, "--measures", "attention_row_std").out
    assert "- redundancy: not in the table, as no finished run has any measures\n" in out


def test_runs_of_an_earlier_version_show_the_effective_rank(tmp_path, capsys):
    for name in ("plain", "other"):
        make_run(tmp_path / name, last=redundancy(0.5) | {"redundancy_embedding_effective_rank_last": 12.0})
    out = tabulated(capsys, tmp_path).out
    assert "| effective rank, last layer ↑ |" in out and "participation" not in out
    make_run(tmp_path / "new", last=redundancy(0.5, 0.5, 7.0))
    out = tabulated(capsys, tmp_path).out
    assert "| participation ratio, last layer ↑ |" in out and "effective rank, last layer" not in out


def test_results_of_the_last_evaluation_are_columns_on_request(tmp_path, capsys):
    for name, values in {"plain": (4.0, 6.0), "b": (3.0, 4.5)}.items():
        for seed, value in enumerate(values):
            make_run(tmp_path / name / f"seed{seed}", seed, last={"test_ece": value} | redundancy(0.5))
    assert "calibration" not in tabulated(capsys, tmp_path).out
    out = tabulated(capsys, tmp_path, "--measures", "test_ece", "test_ece_ema", "embedding_token_cosine_last").out
    assert "calibration error raw, % ↓" in out and "token cosine" in out
    assert "| 5.00 ± 1.41 " in out and "| **3.75 ± 1.06** (-1.25 [" in out
    assert "- no finished run has test_ece_ema in its log.txt\n" in out and "it lacks" not in out
