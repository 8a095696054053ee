"""Fixtures of the tests of pipeline/resize.py."""

import functools
import signal
from concurrent.futures import ProcessPoolExecutor

import forking
import pytest


@pytest.fixture
def two_workers(monkeypatch):
    """Two processes, forked, so that what a test replaces is replaced in them too."""
    from pipeline import resize as program

    monkeypatch.setattr(program, "cpu_count", lambda: 2)
    pool = functools.partial(ProcessPoolExecutor, mp_context=forking.FORK)
    monkeypatch.setattr(program, "ProcessPoolExecutor", pool)
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def source(tmp_path, two_workers):
    """Two classes, larger and smaller images, one that is cut off, and a val folder."""
    from resizing import make_source

    return make_source(tmp_path / "source")
