"""Statistical tests by the formulas of a textbook, in float64 and plain loops."""

import math


def mean_and_variance(values):
    mean = sum(values) / len(values)
    return mean, sum((value - mean) ** 2 for value in values) / (len(values) - 1)


def t_between(t, degrees, steps=20_000):
    """The probability that |T| < t, by Simpson's rule on the density of Student's distribution."""
    norm = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
    width, total = t / steps, 0.0
    for i in range(steps + 1):
        weight = 1 if i in (0, steps) else 4 if i % 2 else 2
        total += weight * norm * (1 + (i * width) ** 2 / degrees) ** (-(degrees + 1) / 2)
    return 2 * total * width / 3


def welch(values, baseline):
    """Difference, standard error and degrees of freedom."""
    (m1, v1), (m2, v2) = mean_and_variance(values), mean_and_variance(baseline)
    e1, e2 = v1 / len(values), v2 / len(baseline)
    degrees = (e1 + e2) ** 2 / (e1**2 / (len(values) - 1) + e2**2 / (len(baseline) - 1))
    return m1 - m2, math.sqrt(e1 + e2), degrees


def is_rejected_by_holm(p_values, level):
    """The step-down procedure: from the smallest on, each is compared with level / (number left), until one fails."""
    left, rejected = sorted(range(len(p_values)), key=lambda i: p_values[i]), set()
    while left and p_values[left[0]] < level / len(left):
        rejected.add(left.pop(0))
    return [i in rejected for i in range(len(p_values))]


def mcnemar(first_is_right, second_is_right):
    """Images that only one of two models classifies correctly, and the probability of this split or a rarer one."""
    gained = lost = 0
    for first, second in zip(first_is_right, second_is_right, strict=True):
        gained += int(first and not second)
        lost += int(second and not first)
    n = gained + lost
    ways = [math.comb(n, k) for k in range(n + 1)]
    return gained, lost, sum(way for way in ways if way <= ways[gained]) / 2**n
