"""Runs that are killed at random moments, some of them during a save, end like a run that was not killed."""

import re

import pytest
from helpers import run_process

SLOW = pytest.mark.slow


@pytest.mark.parametrize(("kills", "ranks"), [(3, 2), pytest.param(60, 1, marks=SLOW), pytest.param(40, 2, marks=SLOW)])
def test_a_run_that_is_killed_repeatedly_ends_like_one_that_is_not(kills, ranks):
    words = ("--kills", kills, "--ranks", ranks, "--epochs", 2, "--seed", 2)
    result = run_process("tests/stress.py", *words, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    summary = result.stdout.splitlines()[-1]
    found = re.fullmatch(r"total: (\d+) kills \(.*\) in \d+ runs; 0 violations, at most \d+ steps lost; \d+ s", summary)
    assert found and int(found[1]) >= kills, summary
