"""Runs that are killed at random moments, some of them within a save, end as the run that nobody killed."""

import re

from helpers import run_process


def test_a_run_that_is_killed_again_and_again_is_the_run_that_was_not():
    result = run_process("tests/stress.py", "--kills", "10", "--epochs", "2", "--seed", "2", timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    summary = result.stdout.splitlines()[-1]
    assert re.match(r"total: (1\d|[2-9]\d) kills \(.*\) in \d+ runs; 0 wrong digests, 0 violations, ", summary), summary
    assert int(re.search(r"(\d+) of them with no save under way", summary)[1]) <= 3
