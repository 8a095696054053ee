"""Loader processes: which signals they ignore, and what a command reports when one of them fails."""

import contextlib
import multiprocessing
import os
import re
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path

from torch.utils.data import DataLoader

from utils import STOP_SIGNALS, BadImageError

DEAD_WORKER = (
    "a loader worker was killed or died; unless a line above says why, memory may have run out: "
    "use fewer --num-workers, or more memory"
)
HINTS = {
    "DataLoader timed out": "the loader gave no batch in time; unless a line above says why, the storage hangs, "
    "or is slow: raise --loader-timeout",
    "Bus error|</torch_": "shared memory (/dev/shm) is full; use fewer --num-workers, "
    "or give more of it (docker run --shm-size=16g)",
    r"DataLoader worker \(pid": DEAD_WORKER,
}
"""{pattern of a message of torch's loader: what happened and what to do}; the first that matches is reported."""

LONGEST_FOLDER = 107 - len("/pymp-12345678/listener-12345678")  # bytes that the name of a socket can have, less its own


@contextlib.contextmanager
def loader_errors(then: str = "start again with --resume auto") -> Iterator[None]:
    """Turn the failures of a `DataLoader` itself, not of its data set, into the line that a command ends with.

    Enclose the whole loop over the batches: a worker's death interrupts the main process wherever it is.

    Args:
        then: what to do once the cause is removed.
    """
    try:
        yield
    except BadImageError:
        raise
    except (RuntimeError, OSError, EOFError) as error:
        try:
            reason = _reason(error, then)
        except RuntimeError as death:  # torch raises it at the signal of a worker's death, whenever that arrives
            reason = _reason(death, then)
        if reason is None:
            raise
        raise SystemExit(f"error: {reason}") from None


def _reason(error: Exception, then: str) -> str | None:
    """What happened to a worker and what to do, with torch's message; None for an error of another kind."""
    broken_pipe = _is_from_pipe(error)
    if broken_pipe:
        time.sleep(2)  # the signal of the worker's death arrives a little after its pipe broke
    cause = error.__cause__ if isinstance(error.__cause__, RuntimeError) else error  # it names the signal
    line = (str(cause).strip() or type(cause).__name__).splitlines()[-1]
    hint = DEAD_WORKER if broken_pipe else None
    if broken_pipe or isinstance(error, RuntimeError) or "in DataLoader worker process" in str(error):
        hint = next((hint for pattern, hint in HINTS.items() if re.search(pattern, line)), hint)
    return f"{hint}; {then} ({line})" if hint else None


def _is_from_pipe(error: Exception) -> bool:
    """Whether it was raised in the exchange with a worker."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return Path(frame.f_code.co_filename).parent.name == "multiprocessing"


class StoppableLoader(DataLoader):
    """A `DataLoader` whose workers continue to work when a signal to stop reaches all processes.

    They end when the loader ends them, when their parent has died, and by a SIGTERM from their parent: multiprocessing
    sends it to those that are left at exit, and then waits for their end.
    """

    def __init__(self, *args, **settings):
        super().__init__(*args, worker_init_fn=_ignore_signals, **settings)
        if self.num_workers:
            _check_temporary_folder()

    def __iter__(self):
        # Workers, and the server that forks them with the start method forkserver, start with these signals blocked:
        # threads that a library starts after a fork, as pyarrow does, are then blocked too; one that is not would end
        # the worker.
        if (self.multiprocessing_context or multiprocessing).get_start_method() != "fork":
            resource_tracker.ensure_running()  # its start would unblock them
        previous = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _check_temporary_folder():
    """Workers send batches through sockets in the temporary folder; without one, the first batch would never come.

    Raises:
        SystemExit: there is none, or its name is too long.
    """
    try:
        folder = tempfile.gettempdir()
    except OSError as error:
        raise SystemExit(f"error: loader processes need a temporary folder; set TMPDIR to one ({error})") from None
    if len(os.fsencode(folder)) > LONGEST_FOLDER:
        raise SystemExit(
            f"error: the temporary folder {folder} has a name of more than {LONGEST_FOLDER} bytes, so loader processes "
            "cannot send batches; set TMPDIR to a shorter one, such as /tmp"
        )


def _ignore_signals(worker_id: int):
    for number in {*STOP_SIGNALS} - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # not yet, if the server was started by another loader
    threading.Thread(target=_end_with_parent, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with_parent(parent: multiprocessing.process.BaseProcess):
    """Wait for the end of the process that has the loader, which with forkserver is not `os.getppid()`.

    With fork, a worker seems to have a living parent until the workers that were forked after it have ended.
    """
    own_parent = os.getppid()
    while parent.is_alive() and os.getppid() == own_parent:
        received = signal.sigtimedwait({signal.SIGTERM}, 1)
        if received is not None and received.si_pid == parent.pid:
            break
    os._exit(0)
