"""What table.py compares: equal data, models, epochs, batches and rates; what else differs is in its notes."""

import io
import json

import pandas as pd
import pytest
from run_folders_on_disk import error_of, make_run, redundancy, report, start, tabulated


def notes_of(out):
    return [line.removeprefix("- ") for line in out.splitlines() if line.startswith("- ")]


@pytest.fixture
def study(tmp_path):
    """plain and all, one run each, which `start` describes."""
    for name, accuracy in (("plain", 90.0), ("all", 92.0)):
        start(make_run(tmp_path / name / "seed0", acc1=accuracy, model="deit"))
    return tmp_path


def test_equal_runs_are_one_table_that_names_their_data(study, capsys):
    out = tabulated(capsys, study).out
    assert out.count("| configuration ") == 1 and "(+2.00)" in out
    common = "data cifar, classes 10, training images 500, validation images 100, model deit, epochs 2"
    assert notes_of(out) == [
        "mean ± standard deviation of a sample of n runs; the best mean in bold",
        "in parentheses the difference from the mean of plain",
        "no interval and no p-value: fewer than two runs on a side, or no deviation between runs",
        "warning: fewer than 3 runs, too few to conclude anything from a difference: plain (n = 1), all (n = 1)",
        f"all runs: {common}, images per optimizer step 64, learning rate 0.001",
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": {"name": "other", "train_digest": "cccc"}}, "data cifar and other, training files aaaa and cccc"),
        ({"data": {"val_images": 99}}, "validation images 100 and 99"),
        ({"data": {"classes": 9}}, "classes 10 and 9"),
        ({"global_batch": 128}, "images per optimizer step 64 and 128"),
        ({"learning_rate": 0.002}, "learning rate 0.001 and 0.002"),
        ({"flags": {"model": "vit"}}, "model deit and vit"),
        ({"flags": {"model": "deit", "model_kwargs": {"depth": 4}}}, "model deit and deit depth=4"),
        ({"flags": {"model": "deit", "epochs": 3}}, "epochs 2 and 3"),
    ],
)
def test_unequal_runs_are_two_tables_without_a_difference(change, words, tmp_path, capsys):
    flags = change.pop("flags", {"model": "deit"})
    ours = start(make_run(tmp_path / "plain" / "seed0", acc1=90.0, model="deit"))
    theirs = start(make_run(tmp_path / "all" / "seed0", acc1=92.0, **flags), **change)
    out = tabulated(capsys, tmp_path).out
    assert out.count("| configuration ") == 2 and "(+2.00)" not in out and "**" not in out
    assert f"another table, as {ours} and {theirs} differ in {words}" in notes_of(out)
    assert [note.partition(":")[0] for note in notes_of(out) if note.startswith("table of")] == [
        "table of plain",
        "table of all",
    ]
    table = pd.read_csv(io.StringIO(tabulated(capsys, tmp_path, "--format", "csv").out), index_col="configuration")
    assert [*table.index] == ["plain", "all"] and table.loc["all"].filter(like="difference").isna().all()


def test_a_row_is_compared_with_all_rows_of_a_table(tmp_path, capsys):
    make_run(tmp_path / "plain", data_set="cifar")  # of an earlier version: its batch is not known
    ours = start(make_run(tmp_path / "all"))
    theirs = start(make_run(tmp_path / "more"), global_batch=32)
    note = f"another table, as {ours} and {theirs} differ in images per optimizer step 64 and 32"
    assert note in notes_of(tabulated(capsys, tmp_path).out)


def test_the_same_files_in_another_folder_are_the_same_data(tmp_path, capsys):
    start(make_run(tmp_path / "plain"))
    start(make_run(tmp_path / "all"), data={"name": "copy", "path": "/scratch/copy"})
    assert tabulated(capsys, tmp_path).out.count("| configuration ") == 1


def test_image_folders_of_earlier_versions_are_distinguished_by_their_names(tmp_path, capsys):
    for name, data in (("plain", "cars"), ("all", "birds")):
        make_run(tmp_path / name, data_set="IMNET", data_path=f"/data/{data}", last=redundancy(0.5))
    out = tabulated(capsys, tmp_path).out
    assert any(note.endswith("differ in data cars and birds") for note in notes_of(out))
    assert "IMNET" not in out and "on data set birds" in out and "on data set cars" in out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"processes": 2, "global_batch": 128}, "images per optimizer step 64 and 128"),
        ({"learning_rate": 0.002}, "learning rate 0.001 and 0.002"),
        ({"data": {"train_digest": "cccc"}}, "training files aaaa and cccc"),
    ],
)
def test_unequal_seeds_are_not_averaged(change, words, tmp_path):
    start(make_run(tmp_path / "plain" / "seed0"))
    start(make_run(tmp_path / "plain" / "seed1", 1), **change)
    message = error_of(tmp_path)
    assert message.startswith("error: the runs of plain are not averaged: ")
    assert words in message and "seed0" in message and "seed1" in message


def test_other_differences_are_noted(tmp_path, capsys):
    start(make_run(tmp_path / "plain" / "seed0", drop_path=0.1, emb_cos_within_coef=0, batch_size=64))
    start(make_run(tmp_path / "plain" / "seed1", 1, drop_path=0.1, emb_cos_within_coef=0, batch_size=64), torch="2.12")
    folder = start(make_run(tmp_path / "all", drop_path=0.2, emb_cos_within_coef=0.5, batch_size=32), processes=2)
    change = {"epoch": 1, "step": 0, "name": "--lr", "before": 1, "after": 2}
    (folder / "changes.jsonl").write_text("".join(f"{json.dumps(c)}\n" for c in (change, change | {"name": "--opt"})))
    start(folder, processes=2, data={"val_digest": "cccc"})
    start(folder, processes=2)
    assert notes_of(tabulated(capsys, tmp_path).out)[-6:] == [
        "--drop-path differs: 0.1 in plain; 0.2 in all",
        "--batch-size differs: 64 in plain; 32 in all",
        "processes differs: 1 in plain/seed0, plain/seed1; 2 in all/seed0",
        "torch differs: 2.11 in plain/seed0, all/seed0; 2.12 in plain/seed1",
        "all/seed0 continued on other files of its data (environment.json)",
        "all/seed0 was changed at epoch 1: --lr 1 -> 2, --opt 1 -> 2 (changes.jsonl)",
    ]


def test_a_flag_that_the_version_of_a_row_did_not_have_is_noted_at_its_default(tmp_path, capsys):
    make_run(tmp_path / "plain" / "seed0")
    make_run(tmp_path / "new" / "seed0", remedy=["xsa"], lr_noise=None)
    lines = notes_of(tabulated(capsys, tmp_path).out)
    assert "--remedy differs: none in plain; xsa in new" in lines
    assert not [line for line in lines if line.startswith("--lr-noise")]


def test_reports_on_other_files_are_not_compared(study, capsys):
    report(study / "plain" / "seed0", files="bbbb")
    report(study / "all" / "seed0", files="cccc")
    out = tabulated(capsys, study).out
    assert "in redundancy.json, plain/seed0 was measured on files bbbb, all/seed0 on files cccc" in out


def test_each_table_has_its_curves(study, tmp_path, capsys):
    start(make_run(study / "longer", epochs=3, model="deit"))
    tabulated(capsys, study, "--curves", tmp_path / "curves.png")
    assert {path.name for path in tmp_path.glob("curves*.png")} == {"curves.png", "curves_2.png"}
