"""tabulate.py: crafted run folders in, the exact table out."""

import io
import json
import math
import statistics

import pandas as pd
import pytest
import yaml
from helpers import run_process

import diversity
import figures
import run_folders
import tabulate


def make_run(folder, seed=0, acc1=90.0, ema=None, epochs=2, done=None, finished=True, last=None, **flags):
    """A run folder as main.py leaves it: accuracy rises by one point an epoch up to `acc1`, 100 images/s and more.

    Args:
        done: epochs in log.txt; None = all, 0 = no log.txt.
        last: changes of the last record.
    """
    folder.mkdir(parents=True)
    args = {"seed": seed, "epochs": epochs, "cooldown_epochs": 0, "output_dir": str(folder), "num_workers": seed}
    (folder / "args.yaml").write_text(yaml.safe_dump(args | {"lr": 5e-4} | flags, sort_keys=False))
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
    return {f"redundancy_{name}": value for name, value in zip(tabulate.MEASURES, values, strict=True)}


def tabulated(capsys, *words):
    """What `python tabulate.py *words` prints to stdout and to stderr."""
    tabulate.main([str(word) for word in words])
    return capsys.readouterr()


def error_of(*words):
    with pytest.raises(SystemExit) as stop:
        tabulate.main([str(word) for word in words])
    message = str(stop.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


@pytest.fixture
def study(tmp_path):
    """A baseline of two seeds; a better cell of two, and a third that was stopped; one that only ever broke."""
    out = tmp_path / "study"
    make_run(out / "plain" / "seed0", 0, 90.0, 91.0, last=redundancy(0.5, 0.6, 0.05))
    make_run(out / "plain" / "seed1", 1, 91.0, 91.5, last=redundancy(0.6, 0.6, 0.05))
    make_run(out / "emb_cos" / "seed0", 0, 92.0, 91.0, emb_cos_coef=0.5, last=redundancy(0.25, 0.62, 0.05))
    make_run(out / "emb_cos" / "seed1", 1, 92.5, 91.0, emb_cos_coef=0.5)
    make_run(out / "emb_cos" / "seed2", 2, 20.0, 20.0, emb_cos_coef=0.5, epochs=2, done=1, finished=False)
    make_run(out / "broken" / "seed0", 0, math.nan, 10.0, lr=1.0)
    return out


MARKDOWN = """\
| cell            | n | top-1 raw, %     | top-1 EMA, %     | raw vs plain, points | EMA vs plain, points | \
embedding_token_cosine | attention_head_cosine | weight_row_abscosine | images/s |
| --------------- | - | ---------------- | ---------------- | -------------------- | -------------------- | \
---------------------- | --------------------- | -------------------- | -------- |
| plain           | 2 | 90.50 ± 0.71     | **91.25 ± 0.35** | 0.00                 | **0.00**             | \
0.550 ± 0.071          | **0.600 ± 0.000**     | 0.0500 ± 0.0000      | 100      |
| broken (failed) | 0 | -                | -                | -                    | -                    | \
-                      | -                     | -                    | -        |
| emb_cos         | 2 | **92.25 ± 0.35** | 91.00 ± 0.00     | **+1.75**            | -0.25                | \
**0.250 (n = 1)**      | 0.620 (n = 1)         | 0.0500 (n = 1)       | 100      |

- broken, seed 0, failed: test_acc1 is nan in epoch 1
- emb_cos, seed 2, unfinished: epoch 1 of 2
"""


def test_the_markdown_table(study, capsys):
    assert tabulated(capsys, study) == (MARKDOWN, "")


def test_the_latex_table(study, capsys):
    head, rule, *rows, last = tabulated(capsys, study, "--format", "latex").out.splitlines()[3:-3]
    assert (rule, last) == (r"\midrule", r"\bottomrule")
    assert all(row.endswith(r" \\") and row.count("&") == 9 for row in (head, *rows))
    assert r"top-1 raw, \%" in head and r"embedding\_token\_cosine" in head
    assert rows[1] == rf"broken (failed) & 0{' & --' * 8} \\"
    assert rows[2].startswith(r"emb\_cos & 2 & \textbf{92.25 $\pm$ 0.35} & 91.00 $\pm$ 0.00 & \textbf{+1.75} & $-$0.25")


def test_the_latex_table_is_a_whole_environment(study, capsys):
    lines = tabulated(capsys, study, "--format", "latex").out.splitlines()
    assert lines[:3] == [r"% needs \usepackage{booktabs}", r"\begin{tabular}{lrrrrrrrrr}", r"\toprule"]
    assert lines[-3] == r"\end{tabular}"
    assert lines[-1] == r"\par{\footnotesize emb\_cos, seed 2, unfinished: epoch 1 of 2\par}"
    assert "**" not in "".join(lines)


def test_the_csv_reads_back(study, capsys):
    out, err = tabulated(capsys, study, "--format", "csv")
    table = pd.read_csv(io.StringIO(out), index_col="cell")
    assert [*table.index] == ["plain", "broken", "emb_cos"]
    assert [*table["n"]] == [2, 0, 2]
    assert table.loc["plain", "test_acc1_mean"] == 90.5
    assert table.loc["plain", "test_acc1_std"] == pytest.approx(statistics.stdev([90, 91]), rel=1e-15)
    assert table.loc["emb_cos", "test_acc1_difference"] == 1.75
    assert table.loc["emb_cos", "embedding_token_cosine_mean"] == 0.25
    assert table.loc["emb_cos", "embedding_token_cosine_n"] == 1
    assert table.loc["plain", "images_per_s_mean"] == 100.5
    assert table.loc["broken"].drop(["n", *(name for name in table if name.endswith("_n"))]).isna().all()
    assert "**" not in out
    assert err.splitlines() == [line.removeprefix("- ") for line in MARKDOWN.splitlines()[-2:]]


def test_one_seed_has_no_deviation_and_one_cell_no_best(tmp_path, capsys):
    make_run(tmp_path / "plain", 7, 90.0)
    row = tabulated(capsys, tmp_path, "--measures").out.splitlines()[2]
    assert row.split("|")[1:-1] == [" plain ", " 1 ", " 90.00        ", " -            ",
                                    " 0.00                 ", " -                    ", " 100      "]  # fmt: skip


def test_without_the_baseline_nothing_is_subtracted(study, capsys):
    out, err = tabulated(capsys, study, "--baseline", "palin")
    assert "points" not in out
    assert "palin" in err
    assert "raw vs emb_cos, points" in tabulated(capsys, study, "--baseline", "emb_cos").out


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        ({"done": 0, "finished": False}, "unfinished: epoch 0 of 2"),
        ({"done": 0}, "failed: log.txt ends after 0 epochs, summary.json tells of 2"),
        ({"done": 1, "finished": False, "cooldown_epochs": 3}, "unfinished: epoch 1 of 5"),
        ({"last": {"test_acc1_ema": math.nan}}, "failed: test_acc1_ema is nan in epoch 1"),
        ({"last": {"test_loss": math.inf}, "finished": False}, "failed: test_loss is inf in epoch 1"),
        ({"last": {"epoch": 4}}, "failed: log.txt ends after 5 epochs, summary.json tells of 2"),
    ],
)
def test_what_is_not_averaged(make, problem, tmp_path, capsys):
    make_run(tmp_path / "plain" / "seed0", 0, 90.0, cooldown_epochs=make.get("cooldown_epochs", 0))
    make_run(tmp_path / "plain" / "seed1", 1, 50.0, **make)
    out = tabulated(capsys, tmp_path).out
    assert "| plain | 1 | 90.00 " in out
    assert out.endswith(f"\n\n- plain, seed 1, {problem}\n")


def test_a_study_without_a_finished_run_has_its_rows(tmp_path, capsys):
    make_run(tmp_path / "plain" / "seed0", done=1, finished=False)
    make_run(tmp_path / "other" / "seed0", last={"test_acc1": math.nan})
    make_run(tmp_path / "other" / "seed1", seed=1, done=1, finished=False)
    rows = tabulated(capsys, tmp_path).out.splitlines()[2:4]
    assert [row.split("|")[1].strip() for row in rows] == ["plain (unfinished)", "other (unfinished)"]
    assert all(row.replace(" ", "").endswith("|0|-|-|-|-|-|-|-|-|") for row in rows)


def test_a_last_epoch_without_a_step_failed(tmp_path, capsys):
    folder = make_run(tmp_path / "plain", 3)
    record = {"epoch": 1, "train_images_per_s": 100, "test_acc1": 10.0, "test_loss": 2.0}
    (folder / "log.txt").write_text(json.dumps(record) + "\n")
    assert "- plain, seed 3, failed: no step taken in epoch 1" in tabulated(capsys, tmp_path).out


@pytest.mark.parametrize("name", ["args.yaml", "log.txt", "summary.json", "redundancy.json"])
@pytest.mark.parametrize("content", [b"\xff\xfe", b"[1, 2", b"3", b"{}"])
def test_unreadable_files_make_a_failed_run(name, content, tmp_path, capsys):
    make_run(tmp_path / "plain" / "seed0", 0, 90.0)
    folder = make_run(tmp_path / "plain" / "seed1", 1, 50.0)
    (folder / name).write_bytes(content)
    out = tabulated(capsys, tmp_path).out
    if (name, content) == ("redundancy.json", b"{}"):
        assert "| plain | 2 | 70.00 " in out
    else:
        assert "| plain | 1 | 90.00 " in out
        assert out.count("\n- plain, seed ") == 1


def test_a_partly_written_line_is_skipped_and_said_on_stderr(tmp_path, capsys):
    folder = make_run(tmp_path / "plain", 0, 90.0, done=2, epochs=3, finished=False)
    with open(folder / "log.txt", "a") as log:
        log.write('{"epoch": 2, "test_ac')
    out, err = tabulated(capsys, tmp_path)
    assert "unfinished: epoch 2 of 3" in out
    assert "log.txt:3: not a whole JSON line" in err and "log.txt" not in out


def test_a_resumed_run_goes_on_from_where_it_was_saved(tmp_path):
    folder = make_run(tmp_path / "plain", epochs=4, finished=False)
    again = {"epoch": 2, "train_loss": 1.0, "test_acc1": 70.0}
    with open(folder / "log.txt", "a") as log:
        log.write(json.dumps(again) + "\n")
    (run,) = run_folders.find_runs([tmp_path])
    assert [record["epoch"] for record in run.records] == [0, 1, 2]
    assert run.records[-1] == again
    assert run.problem == "unfinished: epoch 3 of 4"


def test_redundancy_json_wins_over_the_log_whose_last_value_counts(tmp_path):
    folder = make_run(tmp_path / "plain", last=redundancy(0.5, 0.6, math.nan))
    first, last = (folder / "log.txt").read_text().splitlines()
    first = json.dumps(json.loads(first) | redundancy(0.9, 0.9, 0.9))
    (folder / "log.txt").write_text(f"{first}\n{last}\n")
    (folder / "redundancy.json").write_text(json.dumps({"summary": {"embedding_token_cosine": 0.25}}))
    (run,) = run_folders.find_runs([tmp_path])
    assert run.measures == {"embedding_token_cosine": 0.25, "attention_head_cosine": 0.6}


@pytest.mark.parametrize(
    ("run", "out", "cell"),
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
def test_names_of_cells(run, out, cell, tmp_path):
    assert run_folders.cell_name(tmp_path / run, tmp_path / out) == cell


def test_runs_are_found_once_and_sorted_as_people_count(tmp_path, capsys):
    for number in (10, 2):
        make_run(tmp_path / f"layers{number}" / "seed0")
    make_run(tmp_path / "plain" / "seed0")
    runs = run_folders.find_runs([tmp_path, tmp_path / "plain"])
    assert [run.cell for run in runs] == ["layers2", "layers10", "plain"]
    assert [*tabulate.statistics_table(runs, [], "plain").index] == ["plain", "layers2", "layers10"]


def test_the_measures_shown_are_those_asked_for(study, capsys):
    out = tabulated(capsys, study, "--measures", "weight_effective_rank", "attention_head_cosine").out
    assert "| weight_effective_rank | attention_head_cosine | images/s |" in out
    make_run(study / "own", lr=2.0, last={"redundancy_embedding_mine": 12.5})
    assert "| embedding_mine | images/s |" in tabulated(capsys, study, "--measures", "embedding_mine").out


@pytest.mark.parametrize(
    ("measure", "values", "texts"),
    [
        ("embedding_effective_rank", (40.0, 52.31, 3), ["40.0", "**52.3**", "3.0"]),
        ("weight_condition_number", (4000.0, 52.31, 52.4), ["4000", "**52**", "**52**"]),
        ("attention_row_std", (0.4, 0.5, 0.6), ["0.400", "0.500", "0.600"]),
        ("weight_row_abscosine", (4e-5, 4e-5, 4e-5), ["0.000040", "0.000040", "0.000040"]),
    ],
)
def test_the_best_values_are_bold_and_three_digits_shown(measure, values, texts, tmp_path):
    for value, name in zip(values, "abc", strict=True):
        make_run(tmp_path / name, last={f"redundancy_{measure}": value})
    table = tabulate.statistics_table(run_folders.find_runs([tmp_path]), [measure], "a")
    assert tabulate.text_columns(table, [measure], "a")[measure] == texts


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


def test_every_measure_of_the_project_is_known():
    assert set(tabulate.BETTER) == {f"{level}_{name}" for level, names in diversity.MEASURES.items() for name in names}


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
        tabulate.main(words)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_runs_of_a_cell_differ_in_nothing_but_the_seed(study):
    make_run(study / "plain" / "seed5", 5, lr=0.1, opt="sgd")
    message = error_of(study)
    assert "the runs of plain differ in --lr: 0.0005 in" in message and "0.1 in" in message


def test_a_flag_that_only_one_run_has_is_a_difference(study):
    make_run(study / "plain" / "seed5", 5, drop_path=0.1)
    assert "--drop-path: None in" in error_of(study)


def test_a_seed_counts_once(study):
    make_run(study / "plain" / "seed5", seed=1)
    message = error_of(study)
    assert "plain has seed 1 twice" in message and "seed5" in message


def test_a_process_writes_the_table_and_the_curves(study, tmp_path):
    """The command line end to end; nothing but notices on stderr."""
    curves, table = tmp_path / "curves.png", tmp_path / "table.md"
    result = run_process("tabulate.py", study, "--curves", curves)
    assert (result.returncode, result.stdout, result.stderr) == (0, MARKDOWN, "")
    assert curves.read_bytes().startswith(b"\x89PNG")
    assert curves.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
    result = run_process("tabulate.py", study, "--output", table)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert table.read_text() == MARKDOWN
    result = run_process("tabulate.py", tmp_path / "nothing")
    assert result.returncode == 1
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_torch_does_not_take_this_program_for_the_package_of_its_name():
    result = run_process("-c", "import torch._dynamo")  # prints compile times at its end, as a table
    assert (result.returncode, result.stderr) == (0, "")
