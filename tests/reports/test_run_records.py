"""Records of runs: a run folder becomes one JSON line, whose tables are those of the folder."""

import json
import re

import pytest
from run_folders_on_disk import error_of, make_run, redundancy, report, squeezed, start, tabulated

from reports import figures
from reports.run_folders import find_runs
from reports.run_records import read_records_file, record_of, restore_run, write_records

ACC = 53.554140127388536
BACKGROUND = {
    "set": "cifar10",
    "row": "plain",
    "seed": 10,
    "commit": "13900bb",
    "probe": {"patch_probe": 29.769, "patch_head": 20.25},
    "last": {"epoch": 1, "train_loss": 1.5, "test_acc1": ACC, "train_images_per_s": 50.0, "test_loss": 1.0},
    "curves": {"train_loss": [2.5, 1.5], "test_acc1": [40.0, 53.5541]},
    "args": {"seed": 10, "epochs": 2, "data_set": "IMNET", "data_path": "data/cifar10", "input_size": 32},
}
"""The form of the lines of docs/study/background.jsonl."""


def write_lines(path, *changes):
    path.write_text("".join(json.dumps(BACKGROUND | change) + "\n" for change in changes))
    return path


@pytest.fixture
def study(tmp_path):
    """Two rows of two seeds, measured by analyze.py, and an unfinished run."""
    out = tmp_path / "study"
    for seed in (0, 1):
        for row, accuracy in (("plain", 90.0), ("all", 92.0)):
            last = redundancy(0.5 + seed / 8) | {"train_cls_ce": 1.25}
            step0 = {"loss": 2.5, "cls_ce": 2.25 + seed}
            folder = make_run(
                out / row / f"seed{seed}", seed, accuracy + seed, accuracy - seed / 2, last=last, step0=step0
            )
            start(folder, host="a-machine", command="python main.py", device="cpu")
            content = {
                "run": str(folder),
                "spectra": {"q": [[1.0]]},
                "cka": [[1.0]],
                "embedding": {"token_cosine": [0.5]},
            }
            path = report(folder, 0.25 + seed / 1024, function_accuracy=1, epoch=1) / "redundancy.json"
            path.write_text(json.dumps(content | json.loads(path.read_text())))
    make_run(out / "all" / "seed2", 2, done=1, finished=False)
    return out


def test_the_tables_of_records_are_those_of_the_folders(study, tmp_path, capsys):
    (study / "all" / "seed2" / "args.yaml").unlink()
    file = tmp_path / "records.jsonl"
    assert write_records(find_runs([study]), file) == 4
    words = ("--pairwise", "--measures", "embedding_token_cosine_last")
    folders, records = (tabulated(capsys, out, *words).out.splitlines() for out in (study, file))
    expected = [line.replace("| configuration ", "| configuration, cifar ") for line in folders]
    expected = [line.replace("| difference ", "| difference, cifar ") for line in expected]
    shown = [squeezed(line.replace("- cifar: ", "- ")) for line in records]
    expected = [squeezed(line) for line in expected]
    assert [line for line in shown if "---" not in line] == [line for line in expected if "---" not in line]
    assert "0.250 ± 0.001" in "\n".join(records) and "(redundancy.json)" in "\n".join(records)


def test_a_record_has_neither_what_is_large_nor_places_of_the_machine(study):
    make_run(study / "own" / "seed0", data_path="/home/someone/images", teacher_path="https://a.b/c")
    (run,) = [run for run in find_runs([study]) if run.name == "all/seed1"]
    record = json.loads(json.dumps(record_of(run)))
    assert record["redundancy"].keys() == {"embedding", "summary", "measured_on"}
    assert record["curves"]["test_acc1"] == [92.0, 93.0] and record["curves"]["test_acc1_ema"] == [90.5, 91.5]
    assert (record["set"], record["row"], record["seed"], record["commit"]) == ("cifar", "all", 1, "abc")
    assert "host" not in record["start"] and "command" not in record["start"]
    assert "path" not in record["start"]["data"] and record["start"]["data"]["val_digest"] == "bbbb"
    (own,) = [run for run in find_runs([study]) if run.name == "own/seed0"]
    flags = record_of(own)["args"]
    assert (flags["data_path"], flags["teacher_path"]) == ("images", "https://a.b/c")
    assert str(study) not in json.dumps([record, record_of(own)])


def test_numbers_have_six_digits_and_flags_all(study, tmp_path):
    folder = make_run(tmp_path / "one" / "seed0", lr=1 / 3, last={"test_acc1": ACC, "train_x": float("inf")})
    (run,) = find_runs([folder])
    record = record_of(run)
    assert record["last"]["test_acc1"] == 53.5541 and record["last"]["train_x"] is None
    assert record["args"]["lr"] == 1 / 3


def test_only_finished_runs_are_written_and_a_run_once(study, tmp_path):
    file = write_lines(tmp_path / "records.jsonl", {})
    before = file.read_text()
    assert write_records(find_runs([study]), file) == 5
    assert write_records(find_runs([study / "plain"]), file) == 5
    lines = file.read_text().splitlines(keepends=True)
    assert lines[0] == before  # of another study, unchanged
    assert [(r["row"], r["seed"]) for r in map(json.loads, lines[1:])] == [
        ("all", 0), ("all", 1), ("plain", 0), ("plain", 1),
    ]  # fmt: skip
    again = tmp_path / "again.jsonl"
    write_records(find_runs([file]), again)
    assert [json.loads(line)["set"] for line in again.read_text().splitlines()] == ["cifar10", *["cifar"] * 4]


def test_lines_of_an_earlier_study_have_a_table_for_each_set(tmp_path, capsys):
    other = {"set": "imagenette", "args": BACKGROUND["args"] | {"data_path": "data/imagenette96", "lr": 1.0}}
    file = write_lines(tmp_path / "early.jsonl", {}, {"seed": 11}, {"row": "all"}, other, other | {"row": "all"})
    out = squeezed(tabulated(capsys, file).out)
    assert out.count("| configuration, cifar10 |") == 2 and out.count("| configuration, imagenette |") == 2
    assert "| configuration, cifar10 | n | early_patch_probe | early_patch_head |" in out
    assert "| plain | 2 | 53.55 ± 0.00 | - | 50.0 |" in out and "| plain | 1 | 53.55 | - | 50.0 |" in out
    note = f"early_patch_probe, early_patch_head: as the program of {file} defines them, not analyze.py"
    assert f"- cifar10: {note}\n" in out and f"- imagenette: {note}\n" in out
    assert "no environment.json in cifar10/plain/seed10" in out
    out = tabulated(capsys, file, "--measures", "early_patch_head").out
    assert "early_patch_probe" not in out and "| 20.2" in out
    assert "unknown measure early_patch_heed; did you mean early_patch_head" in error_of(
        file, "--measures", "early_patch_heed"
    )


def test_records_are_not_compared_with_folders(study, tmp_path, capsys):
    """Rows of one name need not be of the same flags."""
    make_run(tmp_path / "other" / "plain" / "seed10", 10, lr=1.0, data_set="IMNET", data_path="data/cifar10")
    file = write_lines(tmp_path / "early.jsonl", {}, {"row": "all"})
    out = squeezed(tabulated(capsys, tmp_path / "other", file).out)
    assert out.count("| configuration |") == 1 and "| plain | 1 | 90.00 | - | 100 |" in out
    assert "| plain | 1 | 53.55 | - | 50.0 |" in out
    csv = tabulated(capsys, tmp_path / "other", file, "--format", "csv").out
    assert csv.splitlines()[0].split(",")[:2] == ["configuration", "n"] and ",cifar10," in csv


def test_a_row_has_one_colour_in_all_sets_of_a_file(tmp_path, capsys, monkeypatch):
    other = {"set": "imagenette", "args": BACKGROUND["args"] | {"data_path": "data/imagenette96"}}
    file = write_lines(tmp_path / "early.jsonl", {"row": "all"}, {"row": "b"}, {}, other | {"row": "b"}, other)
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure))
    tabulated(capsys, file, "--curves", tmp_path / "curves.png")
    colours = [[handle.get_color() for handle in figure.legends[0].legend_handles] for figure in drawn]
    plain, first, second = figures.COLOURS[:3]
    assert colours == [[plain, first, second], [plain, second]]


def test_a_quantity_of_the_last_epoch_alone_is_not_drawn(tmp_path):
    runs = find_runs([write_lines(tmp_path / "early.jsonl", {})])
    figure = figures.training_curves([(run.configuration, run.records, True) for run in runs])
    (axis,) = figure.axes
    assert axis.get_title().startswith("Test accuracy") and [*axis.lines[0].get_ydata()] == [40.0, ACC]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no record of a run"),
        ("{}\n", "line 1 of .* is not the record of a run: it lacks 'set'"),
        ('{"set": 1', "line 1 of .* is not the record of a run: "),
        ("[1]\n", "line 1 of .* is not the record of a run: "),
        (json.dumps(BACKGROUND | {"curves": {"test_acc1": [1.0]}}), "a curve has not the 2 epochs of the run"),
        (f"{json.dumps(BACKGROUND)}\n" * 2, "lines 1 and 2 of .* are both of cifar10/plain/10; remove one"),
    ],
)
def test_a_damaged_file_is_one_line(text, words, tmp_path):
    file = tmp_path / "records.jsonl"
    file.write_text(text)
    message = error_of(file)
    assert re.search(words, message), message
    assert str(file) in message


def test_a_missing_file_is_one_line(tmp_path):
    assert "cannot be read" in error_of(tmp_path / "missing.jsonl")


def test_a_record_becomes_a_run_folder_without_weights_that_has_the_same_record(study, tmp_path):
    file, again = tmp_path / "records.jsonl", tmp_path / "again"
    write_records(find_runs([study]), file)
    for run in read_records_file(file):
        restore_run(run, again / run.configuration / f"seed{run.flags['seed']}")
    write_records(find_runs([again]), tmp_path / "second.jsonl")
    lines = [
        {line for line in map(sorted_line, path.read_text().splitlines())} for path in (file, tmp_path / "second.jsonl")
    ]
    assert lines[0] == lines[1]
    assert not [*again.rglob("*.pth")]


def sorted_line(line):
    return json.dumps(json.loads(line), sort_keys=True)
