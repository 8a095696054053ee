"""table.py: run folders in, the exact table out."""

import io
import math
import statistics

import pandas as pd
import pytest
import scipy.stats
from helpers import run_process
from run_folders_on_disk import error_of, make_run, redundancy, squeezed, tabulated

import table
from diversity.measures import summary_measures
from reports import figures, rows, run_folders, tables


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
| configuration   | n | top-1 raw, % ↑                                        | top-1 EMA, % ↑                      \
              | images/s |
| --------------- | - | ----------------------------------------------------- | \
------------------------------------------------- | -------- |
| plain           | 2 | 90.50 ± 0.71                                          | **91.25 ± 0.35**                    \
              | 100      |
| broken (failed) | 0 | -                                                     | -                                   \
              | -        |
| emb_cos         | 2 | **92.25 ± 0.35** (+1.75 [-1.71, 5.21], p 0.13, n. s.) | 91.00 ± 0.00 (-0.25 [-3.43, 2.93], \
p 0.50, n. s.) | 100      |

| configuration   | n | token cosine, last layer ↓                            | absolute token cosine, last layer ↓ \
| participation ratio, last layer ↑ |
| --------------- | - | ----------------------------------------------------- | ----------------------------------- \
| --------------------------------- |
| plain           | 2 | 0.550 ± 0.071                                         | **0.600 ± 0.000**                   \
| 41.0 ± 1.4                        |
| broken (failed) | 0 | -                                                     | -                                   \
| -                                 |
| emb_cos         | 2 | **-0.200 ± 0.000** (-0.750 [-1.385, -0.115], p 0.042) | 0.620 (+0.020, n = 1)               \
| **52.0** (+11.0, n = 1)           |

| configuration   | n | head cosine, first block ↓ | condition number, q k v ↓ | absolute row cosine, q k v ↓ |
| --------------- | - | -------------------------- | ------------------------- | ---------------------------- |
| plain           | 2 | 0.0500 ± 0.0000            | **2000 ± 0**              | 0.0250 ± 0.0071              |
| broken (failed) | 0 | -                          | -                         | -                            |
| emb_cos         | 2 | 0.0500 (0.0000, n = 1)     | 2100 (+100, n = 1)        | **0.0100** (-0.0150, n = 1)  |

- mean ± standard deviation of a sample of n runs; the best mean in bold
- in parentheses the difference from the mean of plain [its 95 % confidence interval] and its p-value, by Welch's t \
for unequal variances, not corrected for their number
- n. s. = not significant: p ≥ 0.05
- no interval and no p-value: fewer than two runs on a side, or no deviation between runs
- warning: fewer than 3 runs, too few to conclude anything from a difference: plain (n = 2), emb_cos (n = 2)
- all runs: data DIGITS, epochs 2
- redundancy: measured after the last epoch on data set DIGITS, split validation, the first 64 images, 32 pixels \
wide, raw weights (log.txt)
- --lr differs: 0.0005 in plain, emb_cos; 1.0 in broken
- files of the data, batches and effective rates are not compared: no environment.json in plain/seed0, plain/seed1, \
broken/seed0, emb_cos/seed0 and 2 more
- broken/seed0, failed: test_acc1 is nan in epoch 1
- emb_cos/seed2, unfinished: epoch 1 of 2
"""


def test_the_markdown_table(study, capsys):
    assert tabulated(capsys, study) == (MARKDOWN, "")


def test_the_latex_tables(study, capsys):
    lines = tabulated(capsys, study, "--format", "latex").out.splitlines()
    assert lines[:8] == [r"% needs \usepackage{booktabs,adjustbox}", "", r"\begin{table*}[t]", r"\centering",
                         r"% \caption{}", r"\begin{adjustbox}{max width=\linewidth}",
                         r"\begin{tabular}{lrr@{ }lr@{ }lr}", r"\toprule"]  # fmt: skip
    assert [squeezed(line) for line in lines[8:10]] == [
        r" & & top-1 raw & & top-1 EMA & & \\",
        r"configuration & n & \% $\uparrow$ & & \% $\uparrow$ & & images/s \\",
    ]
    assert lines[10:18] == [
        r"\midrule",
        r"plain & 2 & 90.50 $\pm$ 0.71 &  & \textbf{91.25 $\pm$ 0.35} &  & 100 \\",
        r"broken (failed) & 0 & -- &  & -- &  & -- \\",
        r"emb\_cos & 2 & \textbf{92.25 $\pm$ 0.35} & (+1.75 [$-$1.71, 5.21], p 0.13, n. s.) & 91.00 $\pm$ 0.00 "
        r"& ($-$0.25 [$-$3.43, 2.93], p 0.50, n. s.) & 100 \\",
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{adjustbox}",
        r"\end{table*}",
    ]
    second = lines[lines.index(r"\begin{tabular}{lr" + 3 * "r@{ }l" + "}") :]
    assert second[2].startswith(r" &  & token cosine &  & absolute token cosine &  & participation ratio")
    assert squeezed(second[3]).endswith(
        r" & last layer $\downarrow$ & & last layer $\downarrow$ & & last layer $\uparrow$ & \\"
    )
    interval = r"($-$0.750 [$-$1.385, $-$0.115], p 0.042)"
    assert rf"\textbf{{$-$0.200 $\pm$ 0.000}} & {interval} & 0.620 & (+0.020, n = 1)" in second[7]
    assert all(row.count("&") == 7 and row.endswith(r" \\") for row in second[2:4] + second[5:8])
    assert r"n. s. = not significant: p $\geq$ 0.05 \\" in lines
    assert lines[-4:] == [r"emb\_cos/seed2, unfinished: epoch 1 of 2 \\", r"\end{tabular}", "}", r"\end{table*}"]
    assert "**" not in "".join(lines)
    assert len([line for line in lines if line.startswith(r"\end")]) == 10


def test_a_narrow_latex_table_fits_into_a_column():
    columns = {"configuration": ["plain"], "n": ["1"], "top-1 raw, % ↑": ["90.00"]}
    lines = tables.latex([columns], []).splitlines()
    assert r"\begin{table}[t]" in lines and r"\begin{tabular}{lrr}" in lines and r"plain & 1 & 90.00 \\" in lines


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
    table = pd.read_csv(io.StringIO(out), index_col="configuration")
    assert [*table.index] == ["plain", "broken", "emb_cos"]
    assert [*table["n"]] == [2, 0, 2]
    assert table.loc["plain", "test_acc1_mean"] == 90.5
    assert table.loc["plain", "test_acc1_std"] == pytest.approx(statistics.stdev([90, 91]), rel=1e-15)
    assert table.loc["emb_cos", "test_acc1_difference"] == 1.75
    test = scipy.stats.ttest_ind([92, 92.5], [90, 91], equal_var=False)
    found = table.loc["emb_cos", ["test_acc1_low", "test_acc1_high", "test_acc1_p"]]
    assert [*found] == pytest.approx([*test.confidence_interval(), test.pvalue], rel=1e-12)
    assert table.loc["plain"].filter(regex="_(low|high|p)$").isna().all()
    assert table.loc["emb_cos", "embedding_token_cosine_last_mean"] == -0.2
    assert table.loc["emb_cos", "embedding_token_cosine_last_difference"] == pytest.approx(-0.75)
    assert table.loc["emb_cos", "embedding_participation_ratio_last_n"] == 1
    assert [*table["unfinished"]] == [0, 0, 1] and [*table["failed"]] == [0, 1, 0]
    assert table.loc["plain", "images_per_s_mean"] == 100.5
    counts = ["n", "unfinished", "failed", *(name for name in table if name.endswith("_n"))]
    assert table.loc["broken"].drop(counts).isna().all()
    assert "**" not in out and "↓" not in out
    assert err.splitlines() == [line.removeprefix("- ") for line in MARKDOWN.splitlines()[-7:]]


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
    assert "90.50 ± 0.71 (-1.75 [" in out and "0.550 ± 0.071 (+0.750 [" in out
    assert "difference from the mean of emb_cos" in out


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
    statistics = rows.statistics_table(run_folders.find_runs([tmp_path]), "log.txt", [measure], "a")
    assert rows.text_tables(statistics, [measure], "a")[1] == {
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
