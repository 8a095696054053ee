"""The processes of a study: each ends, and is stopped, with all that it has started."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

SAVE_SECONDS = 240  # in which the ranks of torchrun can save before they are killed
_LIBC = ctypes.CDLL(None)  # loaded here, as nothing may be loaded between fork and exec
_SIGNAL_AT_PARENTS_DEATH, _ADOPT_ORPHANS = 1, 36  # PR_SET_PDEATHSIG and PR_SET_CHILD_SUBREAPER of Linux


class Processes:
    """Context manager in which processes are started that do not outlive it or this process.

    Each leads a session, so that only `subprocess.Popen.terminate` stops it, and not a terminal's
    Ctrl-C: one that is stopped twice may end before it has saved. When this process is killed, they get SIGTERM (on
    Linux). Processes that they leave behind, as a killed torchrun leaves its ranks, are stopped by `end_orphans`.
    """

    def __enter__(self) -> "Processes":
        self.running: list[subprocess.Popen] = []
        self._others = _children()
        _prctl(_ADOPT_ORPHANS, 1)
        return self

    def __exit__(self, *_):
        for process in self.running:
            process.terminate()
        for process in self.running:
            process.wait()
        self.end_orphans()
        _prctl(_ADOPT_ORPHANS, 0)

    def start(self, words: list[str], log: Path | None, environment: Mapping[str, str]) -> subprocess.Popen:
        """Start a command; its output is added to the file `log`, or is that of this process."""
        self.end_orphans()
        with _opened(log) as output:
            process = subprocess.Popen(
                words,
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        self.running.append(process)
        return process

    def end_orphans(self):
        """Stop what ended processes left behind: SIGTERM, and SIGKILL after the time in which ranks can save."""
        self.running = [process for process in self.running if process.poll() is None]
        stopped, kill_at = set(), time.monotonic() + SAVE_SECONDS
        while orphans := _children() - self._others - {process.pid for process in self.running}:
            for pid in orphans:
                ended, _ = os.waitpid(pid, os.WNOHANG)
                if not ended and (pid not in stopped or time.monotonic() > kill_at):
                    os.kill(pid, signal.SIGTERM if pid not in stopped else signal.SIGKILL)
                    stopped.add(pid)
            time.sleep(0.05)


@contextlib.contextmanager
def _opened(log: Path | None) -> Iterator:
    if log is None:
        yield None
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
        yield file


def _end_with_parent():
    _prctl(_SIGNAL_AT_PARENTS_DEATH, signal.SIGTERM)


def _prctl(option: int, value: int):
    if sys.platform == "linux":
        _LIBC.prctl(option, value, 0, 0, 0)


def _children() -> set[int]:
    """The processes whose parent is this one; empty where the system does not list them."""
    return {int(pid) for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()}
