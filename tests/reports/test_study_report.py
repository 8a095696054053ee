"""The report of a study: what its page says of runs that finished, did not, or are missing; which figures it has."""

import json
import re

import pytest
import scipy.stats
from made_reports import make_function, make_report
from run_folders_on_disk import make_run, start

from reports import redundancy as analysis
from reports import study_report
from reports.report_figures import FIGURES, can_draw
from reports.run_folders import find_runs
from reports.run_records import write_records
from reports.study_report import Asked, write_report

ASKED = Asked("A study", {"plain": "", "all": "--preset released", "new": "--emb_so_coef 1"}, [0, 1], "plain",
              ["recipe: digits.yaml"], alpha=0.05, min_runs=2)  # fmt: skip


def measure(folder, seed, function=True):
    """A redundancy.json with all that figures draw."""
    on = {"data_set": "DIGITS", "split": "validation", "input_size": 32, "images": 64, "weights": "raw", "epoch": 1}
    content = {"run": str(folder), "summary": {"function_knn_last": 40.0 + seed}, "measured_on": on} | make_report(seed)
    (folder / "redundancy.json").write_text(json.dumps(content | (make_function(seed) if function else {})))


def make_study(out, name="digits", **flags):
    """plain is finished; all has one seed that is finished, and one that is not; new is missing."""
    for seed in (0, 1):
        folder = start(make_run(out / "plain" / f"seed{seed}", seed, 90.0 + seed, **flags), data={"name": name})
        measure(folder, seed)
    folder = start(make_run(out / "all" / "seed0", 0, 92.0, **flags), data={"name": name}, device="cpu")
    measure(folder, 2)
    start(make_run(out / "all" / "seed1", 1, done=1, finished=False, **flags), data={"name": name})
    return out


@pytest.fixture
def drawn(monkeypatch):
    """Figures are empty files; a list of {name of the figure: reports}, one for each set of figures."""
    calls = []

    def draw_all(reports, styles):
        calls.append((reports, styles))
        return {name: None for name in FIGURES if can_draw(name, reports)}

    monkeypatch.setattr(study_report, "draw_all", draw_all)
    monkeypatch.setattr(study_report.figures, "save", lambda figure, path: path.with_name(f"{path.name}.png").touch())
    monkeypatch.setattr(study_report, "draw_curves", lambda runs, path, styles: path.touch())
    return calls


def page_of(asked, outs, target, **options):
    text = write_report(asked, outs, target, **options).read_text()
    for image in re.findall(r"!\[.*\]\((.*)\)", text):
        assert (target / image).is_file(), image
    return text


def section(page, heading):
    """The text below a heading, up to the next one of its level."""
    level = heading.split()[0]
    (text,) = re.findall(rf"^{re.escape(heading)}\n(.*?)(?=^{level} |\Z)", page, flags=re.DOTALL | re.MULTILINE)
    return text


def rows_of(text):
    """{first cell: the others} of all tables."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return {first: others for first, *others in cells}


def test_the_page_says_what_was_asked_and_what_was_run(tmp_path, drawn):
    page = page_of(ASKED, [make_study(tmp_path / "out")], tmp_path / "out" / "report")
    assert page.startswith("# A study\n") and "- 3 of 6 runs are finished." in section(page, "## In short")
    asked = section(page, "## What was asked")
    assert rows_of(asked) == {
        "row": ["its flags"], "---------------- ".strip(): ["-" * 19], "plain (baseline)": ["-"],
        "all": ["`--preset released`"], "new": ["`--emb_so_coef 1`"],
    }  # fmt: skip
    assert "- recipe: digits.yaml\n- Seeds of each row: 0, 1.\n- Rule: a row differs from plain" in asked
    run = rows_of(section(page, "## What was run"))
    assert (run["plain"], run["all"], run["new"]) == (
        ["0, 1", "-", "-", "-"], ["0", "1", "-", "-"], ["-", "-", "-", "0, 1"],
    )  # fmt: skip
    assert "- commit abc; device not known (3 runs), cpu (1 runs); processes 1; torch 2.11\n" in page
    assert "- all/seed1, unfinished: epoch 1 of 2" in section(page, "### Runs that are not averaged")


def test_runs_that_were_not_asked_for_are_counted_apart(tmp_path, drawn):
    out = make_study(tmp_path / "out")
    start(make_run(out / "extra" / "seed0"), data={"name": "digits"})
    start(make_run(out / "plain" / "seed7", 7), data={"name": "digits"})
    short = section(page_of(ASKED, [out], tmp_path / "report"), "## In short")
    assert "- 3 of 6 runs are finished.\n- 2 finished runs of other rows or seeds are in the tables too.\n" in short


def test_hours_are_images_over_speed(tmp_path, drawn):
    page = page_of(ASKED, [make_study(tmp_path / "out")], tmp_path / "report")
    minutes = (500 / 100 + 500 / 101) / 60  # two epochs of 500 images
    assert f"training took {3 * minutes:.1f} minutes in 3 finished runs, {minutes:.1f} minutes in the longest" in page


def test_results_have_the_outcomes_and_a_verdict(tmp_path, drawn):
    out = make_study(tmp_path / "out")
    folder = start(make_run(out / "new" / "seed0", 0, 95.0), data={"name": "digits"})
    measure(folder, 3)
    folder = start(make_run(out / "new" / "seed1", 1, 96.5), data={"name": "digits"})
    measure(folder, 4)
    page = page_of(ASKED, [out], tmp_path / "report")
    results = section(page, "### digits")
    assert "k-NN accuracy, last layer, % ↑" in results and "**95.75 ± 1.06** (+5.25 [" in results
    p = scipy.stats.ttest_ind([95.0, 96.5], [90.0, 91.0], equal_var=False).pvalue
    first, *_ = results.partition("Verdicts by the rule above:\n\n")[2].split("\n\n")
    assert rows_of(first)["all"][0] == "too few runs (n = 1)"
    assert rows_of(first)["new"][0] == f"**better** (p {p:.3f}, Holm {p:.3f})"
    assert "digits, top-1 raw, % ↑. Better than plain: new (+5.25 [" in section(page, "## In short")
    assert list(drawn[0][0]) == ["plain", "all", "new"] and [len(of_row) for of_row in drawn[0][0].values()] == [
        2,
        1,
        2,
    ]
    table = (tmp_path / "report" / "table.md").read_text()
    assert "k-NN accuracy" in table and "all/seed1, unfinished" in table and "- digits: all runs: data digits" in table


def test_where_nothing_differs_the_page_says_so_and_what_would_find_a_point(tmp_path, drawn):
    for row, values in {"plain": (50.0, 52.0), "all": (50.5, 52.5)}.items():
        for seed, value in enumerate(values):
            make_run(tmp_path / "out" / row / f"seed{seed}", seed, value)
    short = section(page_of(ASKED, [tmp_path / "out"], tmp_path / "report"), "## In short")
    assert "DIGITS, top-1 raw, % ↑. Not significant: all (+0.50 [-5.58, 6.58], p 0.76, Holm 0.76)." in short
    assert "DIGITS, no row differs in these outcomes. The intervals say how large" in short
    assert "deviate by 1.41 points in top-1 raw. A difference of one point is found with p < 0.05" in short
    assert "in 80 % of studies of 32 runs of each row" in short  # 15.7 times the variance 2


def test_one_seed_has_no_verdict_and_says_so(tmp_path, drawn):
    for row in ("plain", "all"):
        make_run(tmp_path / "out" / row / "seed0")
    page = page_of(ASKED, [tmp_path / "out"], tmp_path / "report")
    assert "No verdict by the rule above" in page
    assert "Too few runs: all (0.00, n = 1)." in section(page, "## In short")
    assert "no finished run has a redundancy.json" in page and not drawn
    assert "redundancy: not in the table, as no finished run has any measures" in page


def test_runs_of_a_row_on_other_data_are_refused(tmp_path, drawn):
    start(make_run(tmp_path / "out" / "plain" / "seed0"))
    start(make_run(tmp_path / "out" / "plain" / "seed1", 1), global_batch=8)
    with pytest.raises(SystemExit, match="the runs of plain are not averaged"):
        write_report(ASKED, [tmp_path / "out"], tmp_path / "report")


def test_a_study_of_its_baseline_alone(tmp_path, drawn):
    make_run(tmp_path / "out" / "plain" / "seed0")
    page = page_of(ASKED, [tmp_path / "out"], tmp_path / "report")
    assert "Nothing can be compared: plain and another row need finished runs." in page


def test_each_data_set_has_its_section_and_a_row_one_style(tmp_path, drawn):
    outs = [make_study(tmp_path / name, name) for name in ("cifar", "flowers")]
    page = page_of(ASKED, outs, tmp_path / "report")
    assert "- 6 of 12 runs are finished." in page
    for name in ("cifar", "flowers"):
        assert f"![curves](curves_{name}.png)" in section(page, f"### {name}")
        assert f"![depth](depth_{name}.png)" in section(page, f"### {name}")
        assert f"### Notes on {name}" in page
    (_, first), (_, second) = drawn
    assert first == second and first[0] != first[1]


def test_rows_that_cannot_be_compared_are_groups(tmp_path, drawn):
    out = make_study(tmp_path / "out")
    start(make_run(out / "new" / "seed0"), data={"name": "digits"}, global_batch=8)
    page = page_of(ASKED, [out], tmp_path / "report")
    assert "another table, as " in section(page, "### Notes on digits, group 2")
    assert "new" in rows_of(section(page, "### digits, group 2"))


def test_records_alone_have_what_their_lines_have(tmp_path, drawn):
    out, file = make_study(tmp_path / "out"), tmp_path / "records.jsonl"
    assert write_records(find_runs([out]), file) == 3
    page = page_of(ASKED, [file], tmp_path / "report")
    results = section(page, "### digits")
    assert [name for name, _ in re.findall(r"!\[(.*)\]\((.*)\)", results)] == ["curves", "depth", "function"]
    lacking = "weights, spectra, variance, circuits, cka"
    assert f"Not drawn, as a run or its record lacks the numbers: {lacking}." in results
    folders = page_of(ASKED, [out], tmp_path / "again")
    assert rows_of(section(folders, "### digits"))["plain"] == rows_of(results)["plain"]


def test_another_study_is_shown_beside(tmp_path, drawn):
    out, other = make_study(tmp_path / "out"), tmp_path / "early.jsonl"
    write_records(find_runs([make_study(tmp_path / "other", "flowers", lr=1.0)]), other)
    page = page_of(ASKED, [out], tmp_path / "report", also=[other])
    assert "### flowers, early" not in section(page, "## Results")
    assert "### flowers, early" in section(page, "## Other studies, beside this one")
    assert "- 3 of 6 runs are finished." in page
    assert rows_of(section(page, "## What was run"))["row, flowers, early"] == [
        "seeds finished", "seeds unfinished", "seeds failed",
    ]  # fmt: skip


def test_measurements_on_other_images_are_not_drawn(tmp_path, drawn):
    out = make_study(tmp_path / "out")
    path = out / "all" / "seed0" / "redundancy.json"
    content = json.loads(path.read_text())
    content["measured_on"]["images"] = 8
    path.write_text(json.dumps(content))
    page = page_of(ASKED, [out], tmp_path / "report")
    assert "are not drawn: in redundancy.json, plain/seed0 was measured on the first 64 images" in page and not drawn


def test_a_run_without_a_report_is_named(tmp_path, drawn):
    out = make_study(tmp_path / "out")
    (out / "all" / "seed0" / "redundancy.json").unlink()
    page = page_of(ASKED, [out], tmp_path / "report")
    assert "Without all, of which no run has a redundancy.json." in page and list(drawn[0][0]) == ["plain"]


def test_runs_with_weights_are_measured_first(tmp_path, drawn, monkeypatch, capsys):
    out = make_study(tmp_path / "out")
    for seed, has_weights in ((0, True), (1, False)):
        folder = start(make_run(out / "new" / f"seed{seed}", seed), data={"name": "digits"})
        (folder / "checkpoint.pth").touch() if has_weights else None
    (out / "all" / "seed1" / "checkpoint.pth").touch()  # unfinished
    measured = []

    def analyze(runs, *options):
        measured.append(runs)
        if len(measured) > 1:
            raise SystemExit("error: no such data")
        measure(out / "new" / "seed0", 5)
        print("a table")

    monkeypatch.setattr(analysis, "analyze", analyze)
    page_of(ASKED, [out], tmp_path / "report", measure=False)
    assert not measured and "new" not in drawn[0][0]
    page_of(ASKED, [out], tmp_path / "report")
    assert measured == [[str(out / "new" / "seed0")]] and "new" in drawn[1][0]
    assert capsys.readouterr().out == f"measuring {out / 'new' / 'seed0'}\n"
    (out / "plain" / "seed1" / "redundancy.json").unlink()
    (out / "plain" / "seed1" / "checkpoint.pth").touch()
    page = page_of(ASKED, [out], tmp_path / "report")
    assert "- plain/seed1 was not measured: no such data" in section(page, "### Further remarks")


def test_heads_that_analyze_has_drawn_are_shown(tmp_path, drawn):
    out = make_study(tmp_path / "out")
    (out / "plain" / "seed0" / "heads_plain.png").write_bytes(b"png")
    page = page_of(ASKED, [out], tmp_path / "report")
    assert "![heads](heads_digits_plain.png)\n\n*Attention maps of the heads of one block of plain/seed0.*" in page


@pytest.mark.slow
def test_the_figures_of_records_are_drawn(tmp_path):
    file = tmp_path / "records.jsonl"
    write_records(find_runs([make_study(tmp_path / "out")]), file)
    page = page_of(ASKED, [file], tmp_path / "report")
    assert all(f"![{name}]({name}_digits.png)" in page for name in ("curves", "depth", "function"))
    assert all((tmp_path / "report" / f"{name}_digits.png").stat().st_size > 10_000 for name in ("depth", "function"))


def test_the_terms_at_the_first_step_stand_beside_those_of_the_last_epoch(tmp_path, drawn):
    """From folders and from their records: means over the runs of a row that have both."""
    for seed in (0, 1, 2):
        start(make_run(tmp_path / "out" / "plain" / f"seed{seed}", seed, step0={"cls_ce": 2.0, "cls_ce_share": 1.0}))
        step0 = {"loss": 3.0, "cls_ce": 2.0, "cls_ce_share": 0.5, "emb_so": 400.0 + 100 * seed, "emb_so_share": 0.5}
        last = {"train_emb_so": 20.0 + seed, "train_emb_so_share": 0.25}
        last |= {"train_cls_ce": 1.0, "train_cls_ce_share": 0.75}
        if seed == 2:  # a value that was not finite is not kept
            del step0["emb_so"]
        start(make_run(tmp_path / "out" / "new" / f"seed{seed}", seed, last=last, step0=step0, emb_so_coef=0.001))
    write_records(find_runs([tmp_path / "out"]), tmp_path / "records.jsonl")
    for number, source in enumerate((tmp_path / "out", tmp_path / "records.jsonl")):
        page = page_of(ASKED, [source], tmp_path / str(number))
        (line,) = [line for line in page.splitlines() if re.match(r"\| new +\| emb_so ", line)]
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells == ["new", "emb_so", "0.001", "2", "450", "50.00 %", "20.5", "25.00 %"]
        assert not re.search(r"\| (plain|new) +\| (cls_ce|loss) ", page)


def test_without_values_of_a_first_step_there_is_no_table_of_terms(tmp_path, drawn):
    assert "Terms at the first step" not in page_of(ASKED, [make_study(tmp_path / "out")], tmp_path / "report")


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, drawn):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"^error: .*file.* cannot be written"):
        write_report(ASKED, [make_study(tmp_path / "out")], tmp_path / "file" / "report")
