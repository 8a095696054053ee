"""Statistical tests: Welch's t between the runs of two rows, McNemar's between two models on the same images."""

import math
import statistics
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

ALPHA = 0.05
"""A p-value from here on is not significant; intervals have the confidence 1 - ALPHA."""
LEVELS = (0.01, ALPHA)
"""Of significance, in tables and verdicts."""
CONFIDENCE = f"{100 * (1 - ALPHA):.0f} %"
NOT_SIGNIFICANT = f"n. s. = not significant: p ≥ {ALPHA}"
FEW_RUNS = 3
"""Runs of a row below which a warning is given."""


class Difference(NamedTuple):
    """A difference of two means.

    Attributes:
        difference: the mean minus that of the baseline; NaN where one has no value.
        low, high: the confidence interval of the difference; NaN where there is none.
        p: two-sided, of equal expected values; NaN where there is no test.
    """

    difference: float
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan


def welch(values: Sequence[float], baseline: Sequence[float]) -> Difference:
    """The difference of two means, with Welch's t interval and test for unequal variances.

    With means m, variances of a sample v and n values of each: standard error e = sqrt(v_1 / n_1 + v_2 / n_2),
    t = (m_1 - m_2) / e, e^4 / (v_1^2 / (n_1^2 (n_1 - 1)) + v_2^2 / (n_2^2 (n_2 - 1))) degrees of freedom.

    There is no interval and no test if a side has fewer than two values, or if neither side varies beyond rounding:
    then the deviation between runs is not known.

    Source: Welch, "The generalization of 'Student's' problem when several different population variances are
    involved", Biometrika 1947; `scipy.stats.ttest_ind`.
    """
    if not len(values) or not len(baseline):
        return Difference(math.nan)
    difference = float(np.mean(values) - np.mean(baseline))
    both = np.abs([*values, *baseline])
    if min(len(values), len(baseline)) < 2 or max(np.std(values), np.std(baseline)) <= 1e-12 * both.max():
        return Difference(difference)
    from scipy.stats import ttest_ind  # here, as it takes a second to import

    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # where one side does not vary
        test = ttest_ind(values, baseline, equal_var=False)
    low, high = test.confidence_interval(1 - ALPHA)
    return Difference(difference, float(low), float(high), float(test.pvalue))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values that are corrected for their number by Holm's step-down procedure; NaN stays and does not count.

    The k-th smallest of m is multiplied by m - k + 1; each is at least the one before it, and at most 1. The chance
    that any true hypothesis has a corrected value below a level is at most that level.

    Source: Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 1979.
    """
    corrected, largest = [math.nan] * len(p_values), 0.0
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, p_values[i] * (len(order) - rank)))
        corrected[i] = largest
    return corrected


def runs_needed(deviation: float, difference: float, alpha: float, power: float = 0.8) -> int:
    """Runs of each of two rows with which a true difference of the means is found with a probability.

    2 (z(1 - alpha / 2) + z(power))^2 (deviation / difference)^2 rounded up; z: quantiles of the normal distribution.
    The approximation is some runs too low where it is below ten, as t has wider tails.

    Args:
        deviation: standard deviation between the runs of a row.
        alpha: the p-value below which a difference counts.
        power: the probability.
    """
    normal = statistics.NormalDist()
    return math.ceil(2 * ((normal.inv_cdf(1 - alpha / 2) + normal.inv_cdf(power)) * deviation / difference) ** 2)


class Disagreement(NamedTuple):
    """Where two models disagree on the same images.

    Attributes:
        gained: images that only the first model classifies correctly.
        lost: images that only the second model classifies correctly.
        p: two-sided, of equal expected accuracies.
    """

    gained: int
    lost: int
    p: float


def mcnemar(first_is_right: np.ndarray, second_is_right: np.ndarray) -> Disagreement:
    """McNemar's exact test of two models on the same images [n].

    Under equal accuracies, each image on which only one model is right is one of either model with probability 1/2, so
    that the p-value is binomial. It is 1 where no such image exists.

    Source: McNemar, "Note on the sampling error of the difference between correlated proportions or percentages",
    Psychometrika 1947; `scipy.stats.binomtest`.
    """
    gained = int(np.sum(first_is_right & ~second_is_right))
    lost = int(np.sum(second_is_right & ~first_is_right))
    if gained + lost == 0:
        return Disagreement(0, 0, 1.0)
    from scipy.stats import binomtest

    return Disagreement(gained, lost, float(binomtest(gained, gained + lost).pvalue))


def signed(value: float, decimals: int) -> str:
    """`+1.75`, `-0.30` or `0.00`."""
    value = round(value, decimals) + 0.0  # no -0.0
    return f"{value:{'+' if value else ''}.{decimals}f}"


def interval_text(difference: float, low: float, high: float, decimals: int) -> str:
    """`+1.75 [-0.30, 3.80]`, or the difference alone where there is no interval; empty where there is neither."""
    if math.isnan(difference):
        return ""
    ends = ", ".join(f"{round(end, decimals) + 0.0:.{decimals}f}" for end in (low, high))
    return signed(difference, decimals) + ("" if math.isnan(low) else f" [{ends}]")


def p_text(p: float) -> str:
    """`p 0.12, n. s.` or `p 0.003`, with more digits where it would be rounded up to a level; empty without a test."""
    if math.isnan(p):
        return ""
    digits = 3 if p < 0.0995 else 2
    while p < round(p, digits) and round(p, digits) in LEVELS:
        digits += 1
    text = "p < 0.001" if p < 0.001 else f"p {p:.{digits}f}"
    return text if p < ALPHA else f"{text}, n. s."
