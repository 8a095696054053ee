"""The part of the GPU report that runs the tests of tests/test_cuda.py."""

import os
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
LAST_LINES = 15  # of a test that failed


class Outcomes:
    """A plugin of pytest that sends {"tests": [{name, outcome, seconds, lines}, ...]} after every test."""

    def __init__(self, send: Callable[[dict], None]):
        self.send = send
        self.tests: list[dict] = []

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or not report.passed:
            self._add(report, report.duration)

    def pytest_collectreport(self, report):
        if report.failed:
            self._add(report, 0.0)

    def _add(self, report, seconds: float):
        text = report.longrepr[2] if report.skipped else report.longreprtext
        lines = text.splitlines()[-LAST_LINES:]
        name = report.nodeid.rpartition("::")[2]
        self.tests.append({"name": name, "outcome": report.outcome, "seconds": round(seconds, 1), "lines": lines})
        self.send({"tests": self.tests})


def run_cuda_tests(own: Namespace, args: Namespace, earlier: dict, send: Callable[[dict], None]):
    """Run the tests marked `cuda`, which are skipped without a GPU; their files go to TMPDIR."""
    try:
        import pytest
    except ModuleNotFoundError:
        send({"note": "pytest is not installed, so no test ran"})
        return
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # plugins of other packages may write elsewhere
    words = ["-m", "cuda", "-p", "no:cacheprovider", "-p", "no:logging", "--rootdir", str(REPOSITORY)]
    code = pytest.main([*words, str(REPOSITORY / "tests" / "test_cuda.py")], plugins=[Outcomes(send)])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise SystemExit(f"error: pytest ended with {code!r}")
