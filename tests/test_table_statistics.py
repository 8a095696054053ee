"""The tests between rows of table.py, between all pairs of them, and between runs image by image."""

import io
import json

import numpy as np
import pandas as pd
import pytest
from run_folders_on_disk import error_of, make_run, redundancy, squeezed, start, tabulated

from reports.statistics import holm, mcnemar, welch

ACCURACIES = {"plain": [90.0, 91.0, 90.5], "b": [92.0, 93.0, 92.2], "c": [90.2, 91.4, 90.1], "d": [94.0]}


@pytest.fixture
def study(tmp_path):
    """A baseline and three rows, the last with one run."""
    for name, accuracies in ACCURACIES.items():
        for seed, accuracy in enumerate(accuracies):
            make_run(tmp_path / name / f"seed{seed}", seed, accuracy)
    return tmp_path


def csv_of(capsys, *words):
    out = tabulated(capsys, *words, "--format", "csv").out
    first = "runs" if "--mcnemar" in words else "difference" if "--pairwise" in words else "configuration"
    return pd.read_csv(io.StringIO(out), index_col=first)


def rows_of(out, number):
    """{first cell: the others} of a table of an output."""
    lines = [line.strip("| ").split(" | ") for line in out.split("\n\n")[number].splitlines()[2:]]
    return {name.strip(): [cell.strip() for cell in cells] for name, *cells in lines}


# --- rows and the baseline


def test_each_row_has_its_interval_and_p_value(study, capsys):
    out = tabulated(capsys, study).out
    for name in ("b", "c"):
        difference, low, high, p = welch(ACCURACIES[name], ACCURACIES["plain"])
        significance = "" if p < 0.05 else ", n. s."
        assert f"({difference:+.2f} [{low:.2f}, {high:.2f}], p {p:.{3 if p < 0.1 else 2}f}{significance})" in out
    assert (", n. s.)" in out) and ("p 0.011)" in out)
    assert "| d | 1 | **94.00** (+3.50) |" in squeezed(out)
    assert "- warning: fewer than 3 runs, too few to conclude anything from a difference: d (n = 1)\n" in out
    assert "- no interval and no p-value: fewer than two runs on a side, or no deviation between runs\n" in out


def test_three_runs_of_each_row_are_no_warning(study, capsys):
    (study / "d" / "seed0" / "summary.json").unlink()
    out = tabulated(capsys, study).out
    assert "warning" not in out and "no interval" not in out


def test_a_value_that_runs_lack_is_compared_among_those_that_have_it(tmp_path, capsys):
    """Three runs of each row have an accuracy, two of them an EMA, and one row has none."""
    emas = {"plain": [80.0, 81.0, None], "b": [None, 84.0, 85.0], "c": [None] * 3}
    for name, of_row in emas.items():
        for seed, ema in enumerate(of_row):
            make_run(tmp_path / name / f"seed{seed}", seed, 90.0 + seed, ema)
    _, low, high, p = welch([84, 85], [80, 81])
    rows = rows_of(tabulated(capsys, tmp_path).out, 0)
    assert rows["b"][2] == f"**84.50 ± 0.71** (+4.00 [{low:.2f}, {high:.2f}], p {p:.3f}, n = 2)"
    assert rows["plain"][2] == "80.50 ± 0.71 (n = 2)" and rows["c"][2] == "-"


def test_equal_runs_have_no_test(tmp_path, capsys):
    for name, accuracy in (("plain", 90.0), ("b", 92.0), ("c", 90.0)):
        for seed in range(3):
            make_run(tmp_path / name / f"seed{seed}", seed, accuracy)
    out = tabulated(capsys, tmp_path).out
    assert rows_of(out, 0)["b"][1] == "**92.00 ± 0.00** (+2.00)" and rows_of(out, 0)["c"][1] == "90.00 ± 0.00 (0.00)"
    assert "n. s." not in out and "or no deviation between runs" in out and "warning" not in out


def test_a_single_row_has_no_warning(tmp_path, capsys):
    make_run(tmp_path / "plain" / "seed0")
    assert "warning" not in tabulated(capsys, tmp_path, "--pairwise").out


# --- all pairs


def test_pairs_are_corrected_for_their_number(study, capsys):
    pairs = ("b - plain", "c - plain", "d - plain", "c - b", "d - b", "d - c")
    found = [welch(*(ACCURACIES[name] for name in pair.split(" - "))) for pair in pairs]
    corrected = holm([test.p for test in found])
    table = csv_of(capsys, study, "--pairwise")
    assert [*table.index] == [*pairs]
    assert [*table["n"]] == [3, 3, 1, 3, 1, 1] and [*table["n_subtracted"]] == [3, 3, 3, 3, 3, 3]
    for column, values in {**dict(zip(("difference", "low", "high", "p"), zip(*found, strict=True), strict=True)),
                           "p_holm": corrected}.items():  # fmt: skip
        assert [*table[f"test_acc1_{column}"]] == pytest.approx(values, nan_ok=True, rel=1e-12)
    out = tabulated(capsys, study, "--pairwise").out
    rows = rows_of(out, 1)
    test, p = found[0], corrected[0]
    assert rows["b - plain"] == ["3, 3", f"+1.90 [{test.low:.2f}, {test.high:.2f}] (p {p:.3f})", "-"]
    assert p == pytest.approx(3 * test.p) and p < 0.05
    assert rows["d - c"] == ["1, 3", "+3.43", "-"]
    assert "corrected by Holm's method for all pairs of a column" in out


def test_pairs_need_no_baseline(study, capsys):
    out = tabulated(capsys, study, "--pairwise", "--baseline", "x").out
    assert "n. s. = not significant" in out and "d (n = 1)" in out and "plain - d" in out


def test_pairs_of_measures_have_the_digits_of_their_rows(tmp_path, capsys):
    values = {"plain": (0.5, 0.52, 0.51), "b": (0.61, 0.6, 0.64)}
    for name, of_row in values.items():
        for seed, value in enumerate(of_row):
            make_run(tmp_path / name / f"seed{seed}", seed, last=redundancy(value))
    _, low, high, p = welch(values["b"], values["plain"])
    rows = rows_of(tabulated(capsys, tmp_path, "--pairwise").out, 3)
    assert rows == {"b - plain": ["3, 3", f"+0.107 [{low:.3f}, {high:.3f}] (p {p:.3f})"]}


# --- image by image


def save(folder, right, *, digest="bbbb", epoch=1, labels=None, ema=None):
    """The predictions of a run in which `right` says which images are classified correctly, and its summary.json."""
    labels = np.arange(len(right)) % 10 if labels is None else labels
    arrays = {"raw": np.where(right, labels, labels + 1), "image": np.arange(len(right)), "label": labels}
    if ema is not None:  # other runs have files as earlier versions wrote them
        arrays |= {f"{kind}_confidence": np.full(len(right), 0.5, np.float32) for kind in ("raw", "ema")}
    summary = {"epochs": 2, "test_acc1": 100 * np.mean(right)}
    if ema is not None:
        arrays["ema"] = np.where(ema, labels, labels + 1)
        summary["test_acc1_ema"] = 100 * np.mean(ema)
    np.savez(folder / "predictions.npz", val_digest=np.array(digest), epoch=np.array(epoch), **arrays)
    (folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def predicted(tmp_path):
    """Runs of two seeds with predictions; a third seed of the baseline, which has no partner; a run without them."""
    right = {}
    for name, seeds in (("plain", 3), ("b", 2), ("c", 2)):
        for seed in range(seeds):
            folder = start(make_run(tmp_path / name / f"seed{seed}", seed))
            right[f"{name}/seed{seed}"] = np.random.RandomState(len(right)).rand(200) < 0.8
            if (name, seed) != ("c", 1):
                save(folder, right[f"{name}/seed{seed}"], ema=None if name == "c" else np.arange(200) % (seed + 2) > 0)
    return tmp_path, right


def test_runs_of_one_seed_are_compared_image_by_image(predicted, capsys):
    folder, right = predicted
    table = csv_of(capsys, folder, "--mcnemar")
    assert [*table.index] == ["b/seed0 - plain/seed0", "b/seed1 - plain/seed1", "c/seed0 - plain/seed0"]
    for pair, row in table.iterrows():
        first, second = (right[name] for name in pair.split(" - "))
        assert (row["test_acc1_gained"], row["test_acc1_lost"], row["test_acc1_p"]) == mcnemar(first, second)
        assert row["test_acc1_difference"] == pytest.approx(100 * (first.mean() - second.mean()))
        assert row["images"] == 200
    assert [*table["test_acc1_ema_p"]] == pytest.approx([1, 1, np.nan], nan_ok=True)  # c has no EMA
    out = tabulated(capsys, folder, "--mcnemar").out
    gained, lost, p = mcnemar(right["c/seed0"], right["plain/seed0"])
    assert gained != lost
    text = f"{(gained - lost) / 2:+.2f} ({gained} gained, {lost} lost, p {p:.2f}, n. s.)"
    assert rows_of(out, 1)["c/seed0 - plain/seed0"] == ["200", text, "-"]
    left = "plain/seed2 (no comparable run of its seed), c/seed1 (no predictions.npz)"
    assert f"- not in McNemar's test: {left}\n" in out
    assert "the images are the sample" in out and "n. s. = not significant" in out


def test_all_pairs_of_runs_of_one_seed(predicted, capsys):
    table = csv_of(capsys, predicted[0], "--mcnemar", "--pairwise")
    assert [*table.index] == [
        *("b/seed0 - plain/seed0", "b/seed1 - plain/seed1", "c/seed0 - plain/seed0", "c/seed0 - b/seed0"),
    ]
    out = tabulated(capsys, predicted[0], "--mcnemar", "--pairwise").out
    assert "corrected by Holm's method" in out and len(rows_of(out, 2)) == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"digest": "cccc"}, "validation files bbbb and cccc"),
        ({"labels": np.arange(200) % 7}, "their labels"),
        ({"right": np.ones(190, bool)}, "200 and 190 images"),
    ],
)
def test_different_images_are_refused(change, words, predicted):
    folder, right = predicted
    save(folder / "b" / "seed1", **{"right": right["b/seed1"]} | change)
    message = error_of(folder, "--mcnemar")
    assert message == (
        f"error: --mcnemar: {folder}/plain/seed1 and {folder}/b/seed1 were evaluated on different images: {words}"
    )


def test_predictions_of_another_evaluation_are_refused(predicted):
    folder, right = predicted
    path = folder / "b" / "seed1"
    save(path, right["b/seed1"], epoch=0)
    message = error_of(folder, "--mcnemar")
    assert f"{path}/predictions.npz is not of the last evaluation" in message and "--save-predictions" in message
    for accuracy in (100 * right["b/seed1"].mean() + 0.5, None):  # an image more than predicted, or unknown
        save(path, right["b/seed1"])
        (path / "summary.json").write_text(json.dumps({"epochs": 2} | ({"test_acc1": accuracy} if accuracy else {})))
        assert f"{path}/predictions.npz is not of the last evaluation" in error_of(folder, "--mcnemar")


def test_damaged_predictions_are_one_line(predicted):
    folder, _ = predicted
    (folder / "b" / "seed0" / "predictions.npz").write_bytes(b"PK")
    assert "b/seed0/predictions.npz cannot be read" in error_of(folder, "--mcnemar")


def test_runs_without_a_pair_of_predictions_are_one_line(study):
    line = "error: --mcnemar: no two comparable runs of one seed"
    assert error_of(study, "--mcnemar").startswith(f"{line}, one of them of plain (--baseline, or --pairwise), have")
    assert error_of(study, "--mcnemar", "--pairwise").startswith(f"{line} have predictions.npz; train with")
