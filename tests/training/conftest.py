"""Fixtures of the tests of training/."""

import forking
import pytest


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
