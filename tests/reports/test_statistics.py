"""The statistics of table.py against scipy, textbooks and examples by hand."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import textbook_statistics as textbook

from reports.statistics import ALPHA, Difference, holm, interval_text, mcnemar, p_text, welch

pytestmark = pytest.mark.filterwarnings("error")
FIRST, SECOND = [90.1, 91.4, 90.6], [92.0, 92.9, 91.3, 93.5, 92.2]


@pytest.mark.parametrize(
    ("values", "baseline"),
    [
        (SECOND, FIRST),
        (FIRST, SECOND),
        ([1.0, 3.0], [2.0, 2.5]),
        ([5.0, 5.0, 5.0], [4.0, 4.5]),
        ([0.3, 0.1], [0.2] * 3),
    ],
)
def test_welch_is_that_of_the_textbook(values, baseline):
    """By the distribution of t: p is outside of t, and the ends of the interval have 95 % between them."""
    difference, error, degrees = textbook.welch(values, baseline)
    found = welch(values, baseline)
    assert found.difference == pytest.approx(difference, rel=1e-12)
    assert found.p == pytest.approx(1 - textbook.t_between(abs(difference) / error, degrees), rel=1e-6)
    for end in (found.low, found.high):
        assert textbook.t_between(abs(end - difference) / error, degrees) == pytest.approx(1 - ALPHA, abs=1e-7)
    assert found.low < found.difference < found.high


def test_welch_is_that_of_scipy():
    found, test = welch(SECOND, FIRST), scipy.stats.ttest_ind(SECOND, FIRST, equal_var=False)
    assert (found.low, found.high) == test.confidence_interval(0.95) and found.p == test.pvalue
    assert test.pvalue != scipy.stats.ttest_ind(SECOND, FIRST).pvalue


def test_welch_by_hand():
    """Two pairs: means 2 and 6, variances 2 and 2, standard error sqrt(2), two degrees of freedom.

    There t = 2 sqrt(2), p = 1 - t / sqrt(t^2 + 2) = 1 - sqrt(0.8), and the quantile is 4.302653.
    """
    found = welch([5.0, 7.0], [1.0, 3.0])
    assert found.difference == 4
    assert found.p == pytest.approx(1 - math.sqrt(0.8))
    assert (found.low, found.high) == pytest.approx((4 - 4.302653 * math.sqrt(2), 4 + 4.302653 * math.sqrt(2)))


def test_an_interval_has_zero_outside_exactly_where_p_is_significant():
    generator = np.random.RandomState(0)
    found = [welch(generator.randn(3) + 2, generator.randn(4)) for _ in range(40)]
    assert {p < ALPHA for *_, p in found} == {True, False}
    assert all((p < ALPHA) == (low > 0 or high < 0) for _, low, high, p in found)


@pytest.mark.parametrize(
    ("values", "baseline", "difference"),
    [
        ([90.0], [89.0, 88.0], 1.5),  # one run
        ([90.0, 91.0], [89.0], 1.5),
        ([90.0, 90.0], [90.0, 90.0], 0.0),  # equal values
        ([92.0, 92.0, 92.0], [90.0, 90.0], 2.0),  # no variance: scipy would report p = 0
        ([0.1 + 0.2, 0.3], [0.3, 0.3], 0.0),  # nor here, beyond rounding
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([], [89.0, 88.0], math.nan),
        ([90.0, 91.0], [], math.nan),
    ],
)
def test_without_a_known_deviation_there_is_no_interval(values, baseline, difference):
    assert welch(values, baseline) == pytest.approx(Difference(difference), abs=1e-15, nan_ok=True)


def test_holm_is_the_step_down_procedure():
    generator = np.random.RandomState(1)
    for p_values in (*(generator.rand(6) ** 3 for _ in range(20)), [0.01, 0.01, 0.04], [1.0, 0.9], [0.2]):
        corrected = holm(p_values)
        for level in (*np.linspace(0.001, 1, 60), *(c + d for c, d in itertools.product(corrected, (-1e-9, 1e-9)))):
            if level < 1:
                assert [p < level for p in corrected] == textbook.is_rejected_by_holm(p_values, level)
        assert max(corrected) <= 1


def test_holm_by_hand():
    assert holm([0.04, math.nan, 0.01, 0.03]) == pytest.approx([0.06, math.nan, 0.03, 0.06], nan_ok=True)
    assert holm([]) == []


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (0, 6), (5, 5), (3, 11), (40, 25)])
def test_mcnemar_is_that_of_the_textbook(gained, lost):
    first = np.array([True] * gained + [False] * lost + [True] * 7 + [False] * 4)
    second = np.array([False] * gained + [True] * lost + [True] * 7 + [False] * 4)
    order = np.random.RandomState(0).permutation(len(first))
    found = mcnemar(first[order], second[order])
    assert found == pytest.approx(textbook.mcnemar(first, second), rel=1e-12)
    assert mcnemar(second, first) == (lost, gained, found.p)


def test_mcnemar_by_hand():
    """Six images that only the second model gets right: p = 2 / 2^6."""
    first, second = np.zeros(9, bool), np.arange(9) < 6
    assert mcnemar(first, second) == (0, 6, pytest.approx(0.03125))


def test_mcnemar_of_many_images():
    right = np.arange(50_000) % 4 > 0
    other = right.copy()
    other[:20_000:2] ^= True
    gained, lost, p = mcnemar(right, other)
    assert gained + lost == 10_000 and p == scipy.stats.binomtest(gained, 10_000).pvalue


@pytest.mark.parametrize(
    ("values", "decimals", "text"),
    [
        ((1.754, -0.296, 3.8), 2, "+1.75 [-0.30, 3.80]"),
        ((-0.001, -0.004, 0.002), 2, "0.00 [0.00, 0.00]"),
        ((-356.4, math.nan, math.nan), 0, "-356"),
        ((math.nan, math.nan, math.nan), 2, ""),
    ],
)
def test_intervals_as_text(values, decimals, text):
    assert interval_text(*values, decimals) == text


@pytest.mark.parametrize(
    ("p", "text"),
    [
        (0.12345, "p 0.12, n. s."), (1.0, "p 1.00, n. s."), (0.0996, "p 0.10, n. s."), (0.0504, "p 0.050, n. s."),
        (0.0496, "p 0.0496"),
        (0.00965, "p 0.0097"), (0.00999, "p 0.00999"), (0.0101, "p 0.010"), (0.05, "p 0.050, n. s."),
        (0.0012, "p 0.001"), (0.00099, "p < 0.001"), (math.nan, ""),
    ],
)  # fmt: skip
def test_p_values_as_text(p, text):
    assert p_text(p) == text
