"""Verdicts on the rows of a study: Welch's test, Holm's correction over the rows, and enough runs."""

import re

import numpy as np
import pytest
import scipy.stats
from run_folders_on_disk import make_run

from reports.rows import statistics_table
from reports.run_folders import find_runs
from reports.statistics import runs_needed
from reports.verdicts import Rule, verdict_sentences, verdict_tables, verdicts

VALUES = {
    "plain": [50.0, 50.5, 51.0],
    "good": [54.0, 54.5, 54.25],
    "bad": [49.0, 49.25, 48.5],
    "same": [50.25, 51.25, 50.0],
    "few": [60.0, 61.0],
}
COSINE = "embedding_token_cosine_last"  # lower is better
SINK = "attention_sink"  # neither is


@pytest.fixture
def found(tmp_path):
    """The verdicts of a study of at least three runs; the two measures follow the accuracy."""
    for row, values in VALUES.items():
        for seed, value in enumerate(values):
            last = {f"redundancy_{COSINE}": value / 100, f"redundancy_{SINK}": -value / 100}
            make_run(tmp_path / row / f"seed{seed}", seed, value, last=last)
    table = statistics_table(find_runs([tmp_path]), "log.txt", [COSINE, SINK], "plain")
    return verdicts(table, Rule("plain", 0.05, 3))


def of(found, outcome):
    return {verdict.row: verdict for verdict in found if verdict.outcome == outcome}


def test_p_values_are_welchs_and_are_corrected_over_the_tested_rows(found):
    """Three rows are tested: the smallest p-value counts three times, the next one twice."""
    raw = {
        row: scipy.stats.ttest_ind(VALUES[row], VALUES["plain"], equal_var=False).pvalue
        for row in ("good", "bad", "same")
    }
    first, second, third = sorted(raw, key=raw.get)
    rows = of(found, "test_acc1")
    assert [rows[row].p for row in raw] == pytest.approx([*raw.values()])
    assert [rows[row].holm for row in (first, second, third)] == pytest.approx(
        [3 * raw[first], 2 * raw[second], raw[third]]
    )
    assert (first, third) == ("good", "same") and raw["bad"] < 0.05 < raw["same"]


def test_words_follow_the_direction_in_which_an_outcome_is_better(found):
    words = {outcome: {row: verdict.word for row, verdict in of(found, outcome).items()} for outcome in
             ("test_acc1", COSINE, SINK)}  # fmt: skip
    unknown = {"same": "not significant", "few": "too few runs"}
    assert words["test_acc1"] == {"good": "better", "bad": "worse"} | unknown
    assert words[COSINE] == {"good": "worse", "bad": "better"} | unknown
    assert words[SINK] == {"good": "lower", "bad": "higher"} | unknown
    assert "plain" not in words["test_acc1"]


def test_the_table_and_the_sentences_name_every_row(found):
    (table,) = verdict_tables(found)
    first, *outcomes = table
    assert (first, table[first]) == ("configuration", ["bad", "few", "good", "same"])
    assert outcomes == ["top-1 raw, % ↑", "token cosine, last layer ↓", "attention sink, all blocks"]
    bad, few, good, same = table["top-1 raw, % ↑"]
    assert {texts[1] for name, texts in table.items() if name in outcomes} == {few} == {"too few runs (n = 2)"}
    assert good.startswith("**better** (p ") and bad.startswith("**worse** (p ")
    assert re.fullmatch(r"not significant \(p [\d.]+, Holm [\d.]+\)", same)
    text = verdict_sentences([*of(found, "test_acc1").values()], "plain", 2)
    assert text.startswith("Better than plain: good (+3.75 [") and " Worse than plain: bad (-1.58 [" in text
    assert " Not significant: same (0.00 [" in text and text.endswith(
        "Too few runs: few (+10.00 [7.01, 12.99], n = 2)."
    )


def test_runs_that_do_not_vary_have_no_test(tmp_path):
    for row, value in (("plain", 50.0), ("all", 51.0)):
        for seed in (0, 1):
            make_run(tmp_path / row / f"seed{seed}", seed, value)
    (verdict,) = verdicts(statistics_table(find_runs([tmp_path]), None, [], "plain"), Rule("plain", 0.05, 2))
    assert verdict.word == "no test"
    assert verdict_tables([verdict]) == [{"configuration": ["all"], "top-1 raw, % ↑": ["no test (n = 2)"]}]


def test_few_outcomes_are_beside_each_other(found):
    four = [verdict._replace(outcome=f"{verdict.outcome}{end}") for end in ("", "_mine") for verdict in found]
    assert [len(table) for table in verdict_tables(four)] == [4, 4]


def test_without_the_baseline_there_is_no_verdict(tmp_path):
    make_run(tmp_path / "all" / "seed0")
    assert verdicts(statistics_table(find_runs([tmp_path]), None, [], "plain"), Rule("plain", 0.05, 1)) == []


def test_a_stricter_rule(tmp_path, found):
    for row in ("plain", "bad"):
        for seed, value in enumerate(VALUES[row]):
            make_run(tmp_path / "strict" / row / f"seed{seed}", seed, value, ema=value)
    table = statistics_table(find_runs([tmp_path / "strict"]), None, [], "plain")
    (verdict,) = verdicts(table, Rule("plain", 0.01, 3))  # none of the averaged weights
    assert (verdict.outcome, verdict.word) == ("test_acc1", "not significant") and 0.01 < verdict.p < 0.05


def test_the_rule_names_its_numbers():
    text = str(Rule("plain", 0.01, 5))
    assert all(words in text for words in ("Welch", "Holm", "p < 0.01", "at least 5 finished runs", "plain"))


@pytest.mark.parametrize(("deviation", "alpha", "runs"), [(1, 0.05, 16), (2, 0.05, 63), (0.5, 0.05, 4), (1, 0.01, 24)])
def test_runs_needed(deviation, alpha, runs):
    """Lehr's rule: 16 times the squared ratio at p < 0.05 with a power of 80 %."""
    assert runs_needed(deviation, 1, alpha) == runs


def test_runs_needed_find_the_difference_in_most_studies():
    generator = np.random.default_rng(0)
    count = runs_needed(1.5, 1, 0.01)
    first, second = generator.normal(0, 1.5, (2, 2000, count)) + np.array([1, 0])[:, None, None]
    p = scipy.stats.ttest_ind(first, second, axis=1, equal_var=False).pvalue
    assert 0.75 < (p < 0.01).mean() < 0.85
