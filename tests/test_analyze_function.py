"""analyze.py --function-level: the images, the report, the table, the figure, table.py, and what is refused."""

import json
import shutil

import pytest
import torch
from analyzing import analyzed, loaded, small_model
from helpers import few_digits, make_image_folder, one_line, world
from matplotlib import pyplot as plt
from run_folders_on_disk import make_run, report, tabulated

import analyze
from diversity.function_level import FUNCTION_MEASURES, function_summaries, measure_function
from reports import figures
from reports.chosen_measures import choose_redundancy
from reports.function_level import function_options, function_tables, labelled_data
from reports.run_folders import find_runs
from reports.subjects import find_subject
from training import checkpoint

LEVEL = ("--function-level", "--function-images", "40", "--probe-images", "50", "--num-images", "20")


@pytest.fixture
def run(runs):
    """The folder of a finished run."""
    return runs / "plain"


@pytest.fixture(autouse=True)
def digits():
    with few_digits(256):
        yield


def collect(loader):
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_a_run_is_measured_on_images_of_both_splits(run, tmp_path, undrawn, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(path.name) or plt.close("all"))
    report = analyzed(tmp_path, run, *LEVEL)
    out = capsys.readouterr().out
    data = labelled_data(find_subject(str(run), []), world(), function_options(True, 40, 50))
    test, train = collect(data.test), collect(data.train)
    assert test[1].bincount().tolist() == [4] * 10 and train[1].bincount().tolist() == [5] * 10
    model = small_model(weights=loaded(run / checkpoint.LAST))
    assert report["function"] == measure_function(model, [*data.test], [*data.train])
    assert report["function"]["summary"].items() <= report["summary"].items()
    assert report["measured_on"]["function"].startswith("40 validation images (files ")
    text = (tmp_path / "out" / "redundancy.md").read_text()
    assert all(measure.label(place) in text for measure, place in function_summaries().values())
    assert f"{run}, function level: accuracy {report['summary']['function_accuracy']:.1f} %" in out
    assert "label of most patches" in out and "| 90 % " in text
    assert "function" in drawn and "depth, function, heads" in out


def test_chosen_measures_of_the_function_level_are_measured_alone(run, tmp_path, undrawn, capsys):
    report = analyzed(tmp_path, run, *LEVEL, "--function-measures", "patch_probe", "knn")
    data = labelled_data(find_subject(str(run), []), world(), function_options(True, 40, 50))
    function = measure_function(small_model(weights=loaded(run / checkpoint.LAST)), [*data.test], [*data.train])
    assert report["function"].keys() & FUNCTION_MEASURES.keys() == {"knn", "patch_probe"}
    assert all(report["function"][name] == function[name] for name in ("knn", "patch_probe"))
    assert report["measured_on"]["function"].endswith(", only knn, patch_probe")
    assert "function level: k-NN " in capsys.readouterr().out
    assert "| patch probe" in (tmp_path / "out" / "redundancy.md").read_text()


def test_a_report_with_the_function_level_is_not_replaced_by_one_without(run, tmp_path, undrawn):
    folder = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("redundancy.*"))
    words = [str(folder), "--num-images", "20", "--device", "cpu"]
    analyze.main(words)
    analyze.main([*words, *LEVEL])  # adds to it
    function = json.loads((folder / "redundancy.json").read_text())["function"]
    with pytest.raises(SystemExit) as caught:
        analyze.main(words)
    one_line(caught, "was measured otherwise (function level on 40 validation images", "--overwrite")
    assert json.loads((folder / "redundancy.json").read_text())["function"] == function


def test_labels_of_both_splits_are_those_of_one_list_of_classes(tmp_path, capsys):
    make_image_folder(tmp_path, classes=("a", "b", "c"), n=2, splits=("val",))
    make_image_folder(tmp_path, classes=("a", "c"), n=2, splits=("train",))
    subject = find_subject("random", ["--data-set", "IMNET", "--data-path", str(tmp_path)])
    data = labelled_data(subject, world(), function_options(True, 0, 0))
    assert sorted(collect(data.test)[1].tolist()) == [0, 0, 1, 1, 2, 2]
    assert sorted(collect(data.train)[1].tolist()) == [0, 0, 2, 2]
    make_image_folder(tmp_path, classes=("d",), n=2, splits=("train",))
    assert labelled_data(subject, world(), function_options(True, 0, 0)).train is None
    assert "training images have classes that validation images lack: d" in capsys.readouterr().out


def test_without_training_images_there_are_no_probes(run, tmp_path, undrawn, capsys):
    photos = make_image_folder(tmp_path / "photos", classes=("0", "1", "5"), n=4, splits=("val",))
    data = ("--data-set", "IMNET", "--data-path", photos, "--function-level")
    report = analyzed(tmp_path, run, *data, "--num-images", "4")
    function = report["function"]
    assert function["knn"] is function["probe"] is None and function["accuracy"] is not None
    out = capsys.readouterr().out
    assert "k-NN and linear probes are not measured: --data-path" in out and "has no folder 'train'" in out
    assert report["measured_on"]["function"].startswith("12 validation images") and function["train_images"] is None


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--probe-images", "9"), "--probe-images needs --function-level"),
        (("--function-images", "0"), "--function-images needs --function-level"),
        (("--function-measures", "knn"), "--function-measures needs --function-level"),
        (("--function-level", "--data-set", "UNLABELLED"), "UNLABELLED does not serve --function-level, which needs"),
        (("--function-level", "--data-set", "IMNET"), "other classes: only in the data: cat, dog"),
    ],
)
def test_what_does_not_fit_is_one_line(words, line, run, tmp_path, undrawn):
    photos = make_image_folder(tmp_path / "photos", splits=("val",))
    with pytest.raises(SystemExit) as caught:
        analyze.main([str(run), *words, "--data-path", str(photos), "--device", "cpu"])
    one_line(caught, line)


def test_labels_of_one_class_are_one_line(run, tmp_path, undrawn):
    photos = make_image_folder(tmp_path / "photos", classes=("1",))
    with pytest.raises(SystemExit) as caught:
        analyzed(tmp_path, run, "--function-level", "--data-set", "IMNET", "--data-path", photos, "--num-images", "2")
    one_line(caught, "--function-level: the test images must be of two classes at least; got 4 image(s) of 1 class(es)")


# --- table.py


def add_function(folder, words, value):
    path = folder / "redundancy.json"
    content = json.loads(path.read_text())
    content["measured_on"]["function"] = words
    content["summary"]["function_patch_probe"] = value
    path.write_text(json.dumps(content))


@pytest.fixture
def measured(tmp_path):
    """Two finished runs with redundancy.json."""
    return [report(make_run(tmp_path / name / "seed0")) or tmp_path / name / "seed0" for name in ("plain", "all")]


def test_the_table_has_the_numbers_of_the_function_level(measured, tmp_path, capsys):
    for folder, value in zip(measured, (30.0, 35.25), strict=True):
        add_function(folder, "40 validation images", value)
    out = tabulated(capsys, tmp_path, "--measures", "function_patch_probe").out
    assert "patch probe accuracy, all patches, % ↑" in out and "**35.2** (+5.2" in out
    assert "function level on 40 validation images" in out


def test_runs_with_other_images_are_not_compared(measured, tmp_path):
    add_function(measured[0], "40 validation images", 30.0)
    source, note = choose_redundancy(find_runs([tmp_path]))
    assert source == "redundancy.json"  # one of them was not measured
    add_function(measured[1], "50 validation images", 30.0)
    source, note = choose_redundancy(find_runs([tmp_path]))
    assert source is None and "was measured on function level on 40 validation images, plain" not in note
    assert "function level on 50 validation images" in note


def test_tables_leave_out_what_a_model_lacks(run, tmp_path, undrawn):
    report = analyzed(tmp_path, run, *LEVEL)
    for name in ("heads", "knn", "probe", "patch_probe"):
        report["function"][name] = None
    by_fraction, by_layer = (text.splitlines() for text in function_tables({"plain": [report]})[1:])
    assert len(by_fraction) == 12 and "| - " in by_fraction[2]
    assert len(by_layer) == 5 and by_layer[2].count("- ") == 3
    del report["function"]
    assert function_tables({"plain": [report]}) == []
