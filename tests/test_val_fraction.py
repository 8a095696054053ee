"""Runs with --val-fraction: files, resuming, evaluations, analyze.py and table.py."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers import TINY, few_digits, one_line, parse, run_main, world
from ranks import run_ranks
from run_folders_on_disk import make_run

from pipeline.holdout import numbers
from pipeline.sources import Digits
from reports.comparisons import comparable_groups
from reports.function_level import function_options, labelled_data
from reports.run_folders import find_runs
from reports.subjects import find_subject, images
from training.arguments import seen_in_training
from training.provenance import read_starts

FLAGS = (*TINY, "--val-fraction", 0.3, "--save-predictions")
NUM_VAL = 30


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    with few_digits():
        run_main(*FLAGS, "--output-dir", folder)
    return folder


@pytest.fixture
def run(finished, tmp_path, few_digits):
    """A copy of a run on 72 digits, whose validation part is 30 others of the training images."""
    return shutil.copytree(finished, tmp_path / "run")


def test_a_run_is_evaluated_on_its_part(run):
    predictions = np.load(run / "predictions.npz")
    labels = Digits(is_training=True).labels
    assert len(predictions["image"]) == NUM_VAL and [*predictions["label"]] == [*labels[predictions["image"]]]
    (start,) = read_starts(run)
    assert predictions["val_digest"] == start["data"]["val_digest"]
    assert (start["data"]["train_images"], start["data"]["val_images"]) == (102 - NUM_VAL, NUM_VAL)
    stored = torch.load(run / "checkpoint.pth", weights_only=True)
    assert (stored["data"]["train_images"], stored["data"]["val_images"]) == (102 - NUM_VAL, NUM_VAL)
    assert json.loads((run / "log.txt").read_text())["test_images"] == NUM_VAL


def test_two_ranks_are_evaluated_on_the_part_of_one(run, tmp_path):
    words = (*FLAGS, "--batch-size", 8, "--output-dir", tmp_path / "other")
    result = run_ranks(2, "main.py", *words)
    assert result.returncode == 0, result.stderr
    one, two = (np.load(folder / "predictions.npz") for folder in (run, tmp_path / "other"))
    assert all(np.array_equal(one[name], two[name]) for name in ("image", "label", "val_digest"))


@pytest.mark.parametrize("fraction", [0.3, 0.2])
def test_fine_tuning_warns_of_validation_images_that_the_weights_know(fraction, run, capsys):
    run_main(*TINY, "--finetune", run / "checkpoint.pth", "--val-fraction", fraction, "--dry-run")
    line = f"warning: --val-fraction {fraction} has images that the weights were trained on, with --val-fraction 0.3"
    assert (line in capsys.readouterr().out) == (fraction != 0.3)


@pytest.mark.parametrize("other, words", [("b/set", ""), ("b/pets", ", if --data-path a/set has the images of b/pets")])
def test_images_of_another_folder_are_not_said_to_be_known(other, words):
    line = seen_in_training(parse("--data-path", "a/set", "--val-fraction", 0.1), vars(parse("--data-path", other)))
    known = "--val-fraction 0.1 has images that the weights were trained on, with --val-fraction 0.0"
    assert line == known + words


@pytest.mark.parametrize("other", [0, 0.2])
def test_another_fraction_is_another_data_set(other, run, refused):
    words = ("--output-dir", run, "--resume", "auto", "--epochs", 2, "--val-fraction", other, "--resume-with-changes")
    assert f"has another data set: --val-fraction 0.3 -> {other}" in refused(*words)


def test_check_data_reads_both_parts(capsys, few_digits):
    run_main(*FLAGS, "--check-data")
    lines = capsys.readouterr().out.splitlines()
    assert f"{102 - NUM_VAL} training images, 0 of them unreadable" in lines
    assert f"{NUM_VAL} validation images, 0 of them unreadable" in lines


def test_evaluations_of_the_part_and_of_the_test_set(run, capsys, refused):
    words = ("--eval", "--resume", run / "checkpoint.pth", "--device", "cpu", "--num-workers", 0)
    run_main(*words)
    assert f": {NUM_VAL} images, 10 classes" in capsys.readouterr().out
    run_main(*words, "--val-fraction", 0)
    assert ": 26 images, 10 classes" in capsys.readouterr().out
    line = refused(*words, "--val-fraction", 0.2, base=())
    assert "--val-fraction 0.2 has images that the weights were trained on, with --val-fraction 0.3" in line


def test_a_split_on_the_command_line_is_not_silently_replaced(run, capsys):
    words = ("--eval", "--resume", run / "checkpoint.pth", "--device", "cpu", "--num-workers", 0, "--val-split", "test")
    with pytest.raises(SystemExit):
        run_main(*words)
    assert "--val-split test is replaced by the --val-fraction 0.3" in capsys.readouterr().err
    run_main(*words, "--val-fraction", 0)


def test_analyze_reads_the_parts_of_the_run(run):
    subject = find_subject(str(run), ["--device", "cpu"])
    val = read_starts(run)[0]["data"]["val_digest"]
    measured_on = images(subject, world(), 8).measured_on
    assert (measured_on["split"], measured_on["files"]) == ("validation part 0.3", val)
    data = labelled_data(subject, world(), function_options(True, 0, 0))
    train, test = ({*numbers(loader.dataset.dataset.source)} for loader in (data.train, data.test))
    assert test == {*np.load(run / "predictions.npz")["image"]}
    assert train == {*range(102)} - test and f"(files {val})" in data.words
    with pytest.raises(SystemExit) as caught:
        find_subject(str(run), ["--val-fraction", "0.1"])
    one_line(caught, "--val-fraction 0.1 has images that the weights were trained on")


def test_runs_of_different_fractions_are_not_in_one_table(tmp_path):
    for row, flags in {"plain": {"val_fraction": 0.1}, "all": {"val_fraction": 0.1}, "other": {"val_fraction": 0.2},
                       "earlier": {}}.items():  # fmt: skip
        make_run(tmp_path / row / "seed0", **flags)
    groups = comparable_groups(find_runs([tmp_path]))
    assert sorted(sorted(run.configuration for run in group) for group in groups) == [
        ["all", "plain"], ["earlier"], ["other"],
    ]  # fmt: skip
