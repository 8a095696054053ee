"""table.py: crafted run folders in, the exact table out."""

import io
import json
import math
import re
import statistics

import pandas as pd
import pytest
import yaml
from helpers import run_process

import table
from diversity.measures import summary_measures
from reports import figures, run_folders, study_table, tables


def make_run(folder, seed=0, acc1=90.0, ema=None, epochs=2, done=None, finished=True, last=None, **flags):
    """A run folder as main.py leaves it: accuracy rises by one point an epoch up to `acc1`, 100 images/s and more.

    Args:
        done: epochs in log.txt; None = all, 0 = no log.txt.
        last: changes of the last record.
    """
    folder.mkdir(parents=True)
    args = {"seed": seed, "epochs": epochs, "cooldown_epochs": 0, "output_dir": str(folder), "num_workers": seed}
    args |= {"lr": 5e-4, "data_set": "DIGITS", "val_split": None, "input_size": 32}
    (folder / "args.yaml").write_text(yaml.safe_dump(args | flags, sort_keys=False))
    done = epochs if done is None else done
    records = []
    for epoch in range(done):
        behind = done - 1 - epoch
        record = {"epoch": epoch, "train_loss": 1.0 + behind, "train_images_per_s": 100.0 + epoch, "test_loss": 0.5}
        record |= {"test_acc1": acc1 - behind} | ({} if ema is None else {"test_acc1_ema": ema - behind})
        records.append(record)
    if done:
        records[-1] |= last or {}
        (folder / "log.txt").write_text("".join(json.dumps(record) + "\n" for record in records))
    if finished:
        (folder / "summary.json").write_text(json.dumps({"epochs": done or epochs, "test_acc1": acc1}))
    return folder


def redundancy(*values):
    """The first of the default measures, as a record of log.txt has them."""
    measures = {f"redundancy_{name}": value for name, value in zip(study_table.DEFAULT_MEASURES, values, strict=False)}
    return measures | {"redundancy_images": 64}


def report(folder, value=0.25, measure=study_table.DEFAULT_MEASURES[0], **measured_on):
    """A redundancy.json as analyze.py leaves it in a run folder of two epochs."""
    on = {"data_set": "CIFAR10", "split": "test", "input_size": 224, "images": 512, "weights": "EMA", "epoch": 1}
    content = {"summary": {measure: value}, "measured_on": on | measured_on}
    (folder / "redundancy.json").write_text(json.dumps(content))
    return folder


def tabulated(capsys, *words):
    """What `python table.py *words` prints to stdout and to stderr."""
    table.main([str(word) for word in words])
    return capsys.readouterr()


def squeezed(text):
    """A text whose spaces follow each other no more: the rows of a table whatever the widths of its columns."""
    return re.sub(" +", " ", text)


def error_of(*words):
    with pytest.raises(SystemExit) as stop:
        table.main([str(word) for word in words])
    message = str(stop.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


@pytest.fixture
def study(tmp_path):
    """A baseline of two seeds; a better configuration of two and a stopped third; one whose only run failed."""
    out = tmp_path / "study"
    make_run(out / "plain" / "seed0", 0, 90.0, 91.0, last=redundancy(0.5, 0.6, 40.0, 0.05, 2000.0, 0.02))
    make_run(out / "plain" / "seed1", 1, 91.0, 91.5, last=redundancy(0.6, 0.6, 42.0, 0.05, 2000.0, 0.03))
    make_run(out / "emb_cos" / "seed0", 0, 92.0, 91.0, coef=0.5, last=redundancy(-0.2, 0.62, 52.0, 0.05, 2100.0, 0.01))
    make_run(out / "emb_cos" / "seed1", 1, 92.5, 91.0, coef=0.5, last=redundancy(-0.2))
    make_run(out / "emb_cos" / "seed2", 2, 20.0, 20.0, coef=0.5, epochs=2, done=1, finished=False)
    make_run(out / "broken" / "seed0", 0, math.nan, 10.0, lr=1.0)
    return out


MARKDOWN = """\
| configuration   | n | top-1 raw, % ↑           | top-1 EMA, % ↑       | images/s |
| --------------- | - | ------------------------ | -------------------- | -------- |
| plain           | 2 | 90.50 ± 0.71             | **91.25 ± 0.35**     | 100      |
| broken (failed) | 0 | -                        | -                    | -        |
| emb_cos         | 2 | **92.25 ± 0.35** (+1.75) | 91.00 ± 0.00 (-0.25) | 100      |

| configuration   | n | token cosine, last layer ↓  | absolute token cosine, last layer ↓ | \
effective rank, last layer ↑ | head cosine, first block ↓ | condition number, q k v ↓ | absolute row cosine, q k v ↓ |
| --------------- | - | --------------------------- | ----------------------------------- | \
---------------------------- | -------------------------- | ------------------------- | ---------------------------- |
| plain           | 2 | 0.550 ± 0.071               | **0.600 ± 0.000**                   | \
41.0 ± 1.4                   | 0.0500 ± 0.0000            | **2000 ± 0**              | 0.0250 ± 0.0071              |
| broken (failed) | 0 | -                           | -                                   | \
-                            | -                          | -                         | -                            |
| emb_cos         | 2 | **-0.200 ± 0.000** (-0.750) | 0.620 (+0.020, n = 1)               | \
**52.0** (+11.0, n = 1)      | 0.0500 (0.0000, n = 1)     | 2100 (+100, n = 1)        | **0.0100** (-0.0150, n = 1)  |

- mean ± standard deviation of a sample of n runs (difference from the mean of plain); the best in bold
- redundancy: measured after the last epoch on data set DIGITS, split validation, the first 64 images, \
32 pixels wide, raw weights (log.txt)
- broken/seed0, failed: test_acc1 is nan in epoch 1
- emb_cos/seed2, unfinished: epoch 1 of 2
"""


def test_the_markdown_table(study, capsys):
    assert tabulated(capsys, study) == (MARKDOWN, "")


def test_the_latex_tables(study, capsys):
    lines = tabulated(capsys, study, "--format", "latex").out.splitlines()
    assert lines[:5] == [r"% needs \usepackage{booktabs,adjustbox}", "", r"\begin{adjustbox}{max width=\linewidth}",
                         r"\begin{tabular}{lllll}", r"\toprule"]  # fmt: skip
    assert lines[5:7] == [
        r" &  & top-1 raw & top-1 EMA &  \\",
        r"configuration & n & \% $\uparrow$ & \% $\uparrow$ & images/s \\",
    ]
    assert lines[7:13] == [
        r"\midrule",
        r"plain & 2 & 90.50 $\pm$ 0.71 & \textbf{91.25 $\pm$ 0.35} & 100 \\",
        r"broken (failed) & 0 & -- & -- & -- \\",
        r"emb\_cos & 2 & \textbf{92.25 $\pm$ 0.35} (+1.75) & 91.00 $\pm$ 0.00 ($-$0.25) & 100 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]
    second = lines[lines.index(r"\begin{tabular}{llllllll}") :]
    assert second[2].startswith(r" &  & token cosine & absolute token cosine & effective rank")
    assert second[3].endswith(r" & first block $\downarrow$ & q k v $\downarrow$ & q k v $\downarrow$ \\")
    assert r"\textbf{$-$0.200 $\pm$ 0.000} ($-$0.750) & 0.620 (+0.020, n = 1)" in second[7]
    assert all(row.count("&") == 7 and row.endswith(r" \\") for row in second[2:4] + second[5:8])
    assert lines[-3:] == [r"emb\_cos/seed2, unfinished: epoch 1 of 2 \\", r"\end{tabular}", "}"]
    assert "**" not in "".join(lines)
    assert len([line for line in lines if line.startswith(r"\end")]) == 5


@pytest.mark.parametrize(
    ("text", "markdown", "latex"),
    [("a|b", r"a\|b", r"a\textbar{}b"), ("a_b%", "a_b%", r"a\_b\%"), ("a\\b", "a\\b", r"a\textbackslash b")],
)
def test_names_with_special_characters(text, markdown, latex):
    columns = {"configuration": [text], "n": ["1"]}
    assert squeezed(tables.markdown([columns], []).splitlines()[2]) == f"| {markdown} | 1 |"
    lines = tables.latex([columns], [text]).splitlines()
    assert latex + r" & 1 \\" in lines and latex + r" \\" in lines


def test_the_csv_reads_back(study, capsys):
    out, err = tabulated(capsys, study, "--format", "csv")
    table = pd.read_csv(io.StringIO(out), index_col="cell")
    assert [*table.index] == ["plain", "broken", "emb_cos"]
    assert [*table["n"]] == [2, 0, 2]
    assert table.loc["plain", "test_acc1_mean"] == 90.5
    assert table.loc["plain", "test_acc1_std"] == pytest.approx(statistics.stdev([90, 91]), rel=1e-15)
    assert table.loc["emb_cos", "test_acc1_difference"] == 1.75
    assert table.loc["emb_cos", "embedding_token_cosine_last_mean"] == -0.2
    assert table.loc["emb_cos", "embedding_token_cosine_last_difference"] == pytest.approx(-0.75)
    assert table.loc["emb_cos", "embedding_effective_rank_last_n"] == 1
    assert [*table["unfinished"]] == [0, 0, 1] and [*table["failed"]] == [0, 1, 0]
    assert table.loc["plain", "images_per_s_mean"] == 100.5
    counts = ["n", "unfinished", "failed", *(name for name in table if name.endswith("_n"))]
    assert table.loc["broken"].drop(counts).isna().all()
    assert "**" not in out and "↓" not in out
    assert err.splitlines() == [line.removeprefix("- ") for line in MARKDOWN.splitlines()[-3:]]


def test_one_seed_has_no_deviation_and_one_configuration_no_best(tmp_path, capsys):
    make_run(tmp_path / "plain", 7, 90.0)
    row = tabulated(capsys, tmp_path, "--measures").out.splitlines()[2]
    assert [text.strip() for text in row.split("|")[1:-1]] == ["plain", "1", "90.00", "-", "100"]


def test_without_the_baseline_nothing_is_subtracted(study, capsys):
    out, err = tabulated(capsys, study, "--baseline", "palin")
    assert "(+" not in out and "difference" not in out
    assert "palin" in err
    assert "_difference" not in tabulated(capsys, study, "--baseline", "palin", "--format", "csv").out
    out = tabulated(capsys, study, "--baseline", "emb_cos").out
    assert "90.50 ± 0.71 (-1.75)" in out and "0.550 ± 0.071 (+0.750)" in out
    assert "difference from the mean of emb_cos" in out


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


@pytest.mark.parametrize("name", ["args.yaml", "log.txt", "summary.json", "redundancy.json"])
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


def test_a_resumed_run_goes_on_from_where_it_was_saved(tmp_path):
    folder = make_run(tmp_path / "plain", epochs=4, finished=False)
    again = {"epoch": 2, "train_loss": 1.0, "test_acc1": 70.0}
    with open(folder / "log.txt", "a") as log:
        log.write(json.dumps(again) + "\n")
    (run,) = run_folders.find_runs([tmp_path])
    assert [record["epoch"] for record in run.records] == [0, 1, 2]
    assert run.records[-1] == again
    assert run.problem == "unfinished: epoch 3 of 4"


CHOSEN = (
    "redundancy: measured after the last epoch on data set CIFAR10, split test, the first 512 images, 224 pixels wide, "
    "EMA weights (redundancy.json)"
)
LOGGED = (
    "redundancy: measured after the last epoch on data set DIGITS, split validation, the first 64 images, 32 pixels "
    "wide, raw weights (log.txt"
)


def chosen(out):
    return study_table.choose_redundancy(run_folders.find_runs([out]))


@pytest.fixture
def measured(tmp_path):
    """Two finished runs that both sources know, and an unfinished one that neither does."""
    for name in ("plain", "all"):
        report(make_run(tmp_path / name / "seed0", last=redundancy(0.5)))
    make_run(tmp_path / "plain" / "seed1", 1, done=1, finished=False)
    return tmp_path


def test_the_report_is_chosen_where_all_finished_runs_have_it(measured, capsys):
    assert chosen(measured) == ("redundancy.json", CHOSEN)
    out = tabulated(capsys, measured, "--measures", study_table.DEFAULT_MEASURES[0]).out
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
    out = tabulated(capsys, measured, "--measures", study_table.DEFAULT_MEASURES[0]).out
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
    assert err == f"{note}\n" and "cosine" not in out
    assert "not in the table" not in tabulated(capsys, tmp_path, "--measures").out


def test_only_the_last_epoch_of_the_log_counts(tmp_path):
    folder = make_run(tmp_path / "plain", last=redundancy(0.5, math.nan))
    first, last = (folder / "log.txt").read_text().splitlines()
    first = json.dumps(json.loads(first) | redundancy(0.9, 0.9, 0.9))
    (folder / "log.txt").write_text(f"{first}\n{last}\n")
    (run,) = run_folders.find_runs([tmp_path])
    assert run.redundancy["log.txt"].measures == {study_table.DEFAULT_MEASURES[0]: 0.5}
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
    assert [*study_table.statistics_table(runs, None, [], "plain").index] == ["plain", "layers2", "layers10"]


def test_the_measures_shown_are_those_asked_for(study, capsys):
    out = tabulated(capsys, study, "--measures", "weight_effective_rank", "attention_head_cosine_first").out
    assert "| configuration   | n | head cosine, first block ↓ |\n" in out
    assert "(log.txt); it lacks weight_effective_rank\n" in out
    make_run(study / "own", lr=2.0, last={"redundancy_embedding_mine": 12.5, "redundancy_images": 64})
    assert "| embedding_mine |\n" in tabulated(capsys, study, "--measures", "embedding_mine").out


@pytest.mark.parametrize(
    ("measure", "heading", "values", "texts"),
    [
        ("embedding_effective_rank", "effective rank, all layers ↑", (40.0, 52.31, 3),
         ["40.0", "**52.3** (+12.3)", "3.0 (-37.0)"]),
        ("embedding_first_cosine", "cosine to the first embedding, all layers ↓", (0.2, 0.5, -1e-9),
         ["0.200", "0.500 (+0.300)", "**0.000** (-0.200)"]),
        ("weight_condition_number_qkv", "condition number, q k v ↓", (4000.0, 52.31, 52.4),
         ["4000", "**52** (-3948)", "**52** (-3948)"]),
        ("weight_smallest_angle", "smallest angle of rows in degrees, all matrices ↑", (88.0, 88.01, 87.0),
         ["**88.0**", "**88.0** (0.0)", "87.0 (-1.0)"]),
        ("attention_row_std", "standard deviation of a row, all blocks", (0.4, 0.5, 0.6),
         ["0.400", "0.500 (+0.100)", "0.600 (+0.200)"]),
        ("attention_row_entropy_first", "entropy of a row in nats, first block", (1, 2, 3),
         ["1.00", "2.00 (+1.00)", "3.00 (+2.00)"]),
        ("weight_row_abscosine", "absolute row cosine, all matrices ↓", (4e-5, 4e-5, 4e-5),
         ["0.000040", "0.000040 (0.000000)", "0.000040 (0.000000)"]),
    ],
)  # fmt: skip
def test_headings_best_values_and_digits(measure, heading, values, texts, tmp_path):
    for value, name in zip(values, "abc", strict=True):
        make_run(tmp_path / name, last={f"redundancy_{measure}": value})
    statistics = study_table.statistics_table(run_folders.find_runs([tmp_path]), "log.txt", [measure], "a")
    assert study_table.text_tables(statistics, [measure], "a")[1] == {
        "configuration": [*"abc"],
        "n": ["1"] * 3,
        heading: texts,
    }


def test_curves_are_thin_for_runs_and_thick_for_the_mean_of_finished_ones():
    def records(*accuracies):
        return [{"epoch": epoch, "test_acc1": value} for epoch, value in enumerate(accuracies)]

    runs = [("a", records(1, 2), True), ("a", records(3, 6), True), ("a", records(9), False), ("b", records(5), False)]
    figure = figures.training_curves(runs)
    (axis,) = figure.axes  # neither an EMA nor a loss
    lines = [(line.get_linewidth() > 1, line.get_color(), [*line.get_ydata()]) for line in axis.lines]
    first, second = figures.COLOURS[:2]
    assert lines == [
        (False, first, [1, 2]), (False, first, [3, 6]), (False, first, [9]), (True, first, [2, 4]),
        (False, second, [5]), (True, second, []),
    ]  # fmt: skip
    assert [text.get_text() for text in figure.legends[0].texts] == ["a", "b (none finished)"]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("epoch", "top-1, percent")
    figures.plt.close(figure)


def test_every_measure_has_its_own_heading():
    headings = {measure.label(place) for measure, place in summary_measures().values()}
    assert len(headings) == len(summary_measures())


def test_errors_are_one_line(tmp_path, study, capsys):
    (tmp_path / "empty").mkdir()
    assert "no run folder found under" in error_of(tmp_path / "empty")
    assert "no run folder found under" in error_of(tmp_path / "missing")
    message = error_of(study, "--measures", "weight_row_cosine")
    assert "unknown measure weight_row_cosine; did you mean weight_row_abscosine" in message
    assert "attention_row_std" in message
    assert "cannot be written" in error_of(study, "--output", tmp_path / "missing" / "table.md")
    assert "cannot be written" in error_of(study, "--curves", tmp_path / "missing" / "curves.png")
    make_run(tmp_path / "new" / "plain", done=0, finished=False)
    assert "nothing to draw" in error_of(tmp_path / "new", "--curves", tmp_path / "curves.png")


@pytest.mark.parametrize("words", [[], ["x", "--curves", "a.jpg"], ["x", "--format", "html"], ["x", "--seeds", "3"]])
def test_mistakes_on_the_command_line_are_one_line(words, capsys):
    with pytest.raises(SystemExit) as stop:
        table.main(words)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_runs_of_a_configuration_differ_in_nothing_but_the_seed(study):
    make_run(study / "plain" / "seed5", 5, lr=0.1, opt="sgd")
    message = error_of(study)
    assert "the runs of plain differ in --lr: 0.0005 in" in message and "0.1 in" in message


def test_a_flag_that_only_one_run_has_is_a_difference(study):
    make_run(study / "plain" / "seed5", 5, drop_path=0.1)
    assert "--drop-path: None in" in error_of(study)


def test_runs_of_an_earlier_version_and_of_this_one_are_one_configuration(tmp_path):
    make_run(tmp_path / "plain" / "seed0", 0, fused_opt=True, decode_once=True)
    make_run(tmp_path / "plain" / "seed1", 1, scale_lr_flag=False)
    assert [run.problem for run in run_folders.find_runs([tmp_path])] == [None, None]


def test_a_seed_counts_once(study):
    make_run(study / "plain" / "seed5", seed=1)
    message = error_of(study)
    assert "plain has seed 1 twice" in message and "seed5" in message


def test_the_table_is_written_to_a_file(study, tmp_path, capsys):
    assert tabulated(capsys, study, "--output", tmp_path / "table.md") == ("", "")
    assert (tmp_path / "table.md").read_text() == MARKDOWN


def test_a_process_prints_the_table_and_draws_the_curves(study, tmp_path):
    """The command line end to end; nothing on stderr."""
    curves = tmp_path / "curves.png"
    result = run_process("table.py", study, "--curves", curves)
    assert (result.returncode, result.stdout, result.stderr) == (0, MARKDOWN, "")
    assert curves.read_bytes().startswith(b"\x89PNG")
    assert curves.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
