"""Loader processes: which signals they ignore, and what a command reports when one of them fails."""

import contextlib
import errno
import os
import signal
import threading
import time
import traceback
from pathlib import Path

from utils import BadImageError

TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)


def ignore_in_worker(worker_id: int):
    """`worker_init_fn` of a DataLoader: a stop that reaches the whole process group leaves its workers at work.

    They end when the loader tells them, when their parent has died, and by a SIGTERM that their parent sends, with
    which multiprocessing ends those that are left at exit, and for whose effect it then waits.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey_parent, args=(os.getppid(),), daemon=True).start()


def _obey_parent(parent: int):
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


DEAD_WORKER = "a loader worker died; unless a line above says why, memory may have run out: use fewer --num-workers"
LOADER_FAILURES = (
    (
        "the loader gave no batch in time; unless a line above says why, the storage hangs, or is slow: "
        "raise --loader-timeout",
        ("DataLoader timed out",),
    ),
    (
        "shared memory (/dev/shm) ran out; use fewer --num-workers, or give more of it (docker run --shm-size=16g)",
        ("Bus error", "</torch_", "No space left on device"),
    ),
    (
        "too many open files; use fewer --num-workers, or raise the limit with ulimit -n",
        ("Too many open files", "items of ancdata"),
    ),
    (
        "a loader worker was killed, as the system does where memory runs out; use fewer --num-workers, or more memory",
        ("by signal: Killed",),
    ),
    (DEAD_WORKER, ("DataLoader worker (pid", "Pin memory thread exited")),
)
"""What happened and what to do, by parts of the messages of torch's loader; the first that fits counts."""


@contextlib.contextmanager
def loader_errors(then: str = "start again with --resume auto"):
    """Turn the failures of a `DataLoader` itself, not of its data set, into the line that a command ends with.

    Enclose the whole loop over the batches: a worker's death interrupts the main process wherever it is.

    Args:
        then: what to do after the cause is away.
    """
    try:
        yield
    except BadImageError:
        raise
    except (RuntimeError, OSError, EOFError) as error:
        known = _death_behind(error)
        line = _last_line(known)
        failure = _loader_failure(known, line)
        if failure is None:
            raise
        raise SystemExit(f"error: {failure}; {then} ({line})") from None


def _is_in_pipe(error: Exception) -> bool:
    """Whether it was raised in talking to a worker."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return Path(frame.f_code.co_filename).parent.name == "multiprocessing"


def _death_behind(error: Exception) -> Exception:
    """The death of a worker, which the system tells a little after its pipes break, or else `error`."""
    try:
        if _is_in_pipe(error):
            time.sleep(2)
    except RuntimeError as death:
        return death
    return error


def _loader_failure(error: Exception, line: str) -> str | None:
    is_in_pipe = _is_in_pipe(error)
    from_worker = "in DataLoader worker process" in str(error)
    too_many_files = getattr(error, "errno", None) in TOO_MANY_FILES
    if not (is_in_pipe or from_worker or too_many_files or isinstance(error, RuntimeError)):
        return None
    for failure, parts in LOADER_FAILURES:
        if any(part in line for part in parts):
            return failure
    return DEAD_WORKER if is_in_pipe else None


def _last_line(error: Exception) -> str:
    """The last line of the message, after the traceback that an error from a worker has in there."""
    if isinstance(error.__cause__, RuntimeError):
        error = error.__cause__  # which signal it was that killed a worker
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
