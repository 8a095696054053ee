"""Runs that are killed at random moments, some of them during a save, end like a run that was not killed."""

import re

import pytest
from helpers import run_process


@pytest.mark.parametrize("kills", [3, pytest.param(60, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_repeatedly_ends_like_one_that_is_not(kills):
    result = run_process("tests/stress.py", "--kills", kills, "--epochs", 2, "--seed", 2, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    summary = result.stdout.splitlines()[-1]
    found = re.fullmatch(r"total: (\d+) kills \(.*\) in \d+ runs; 0 violations, at most \d+ steps lost; \d+ s", summary)
    assert found and int(found[1]) >= kills, summary
