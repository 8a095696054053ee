"""Fixtures that several test files share."""

import os

import forking
import pytest


@pytest.fixture
def few_digits():
    """Runs of this process see 128 digits, 102 to train on and 26 to evaluate, in place of 1,797."""
    import helpers  # here, as it imports main.py, which some test files do not need

    with helpers.few_digits():
        yield


@pytest.fixture
def fork():
    """`forking.start`, whose processes end with the test."""
    started = []

    def start(function, *args):
        started.append(forking.start(function, *args))
        return started[-1]

    yield start
    for process, pipe in started:
        process.kill()
        process.join()
        pipe.close()


@pytest.fixture
def quick_flushes(monkeypatch):
    """No file is flushed to the disk. A test can observe the order of the calls, but not whether a flush succeeded."""
    monkeypatch.setattr(os, "fsync", os.fstat)
