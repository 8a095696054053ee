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


@pytest.fixture
def plant(tmp_path):
    """plant(name) writes a file of `planted.PLANTED`; the test fails if its code runs."""
    from planted import PLANTED, Code  # here, as it imports main.py

    def write(name):
        PLANTED[name][0](tmp_path / name, Code(tmp_path / "ran"))
        return tmp_path / name

    yield write
    assert not (tmp_path / "ran").exists()


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """The folders of `analyzing.make_runs`."""
    from analyzing import make_runs

    return make_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def undrawn(monkeypatch):
    """No figure of redundancy is drawn."""
    from reports import figures, map_figures, redundancy, report_figures

    monkeypatch.setattr(redundancy, "draw_all", lambda *args: dict.fromkeys(report_figures.FIGURES))
    monkeypatch.setattr(map_figures, "attention_heads", lambda *args: None)
    monkeypatch.setattr(figures, "save", lambda figure, path: None)


@pytest.fixture
def refused(capsys):
    """refused(*words) runs `TINY`, or another `base`, with `words` on top and returns the one line it ends in."""
    import helpers

    def run(*words, base=helpers.TINY):
        with pytest.raises(SystemExit) as caught:
            helpers.run_main(*base, *words)
        code = caught.value.code
        out, err = capsys.readouterr()
        line = err.removesuffix("\n") if isinstance(code, int) else code  # argparse prints its line
        assert code != 0
        assert line.startswith("error: ") and "\n" not in line
        assert "Traceback" not in out + err
        return line

    return run
