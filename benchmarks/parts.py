"""The parts of a long report: each runs in its own process with a time limit, and its results are saved one by one."""

import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

NOT_STARTED, NOT_FINISHED, FINISHED, FAILED = "not started", "not finished", "finished", "failed"


class Part(NamedTuple):
    """A part of a report: a function, and its fraction of the time, to which the rest of earlier parts' is added.

    The function is called in a new process with the inputs, the results of all parts so far ({name: result}), and
    `send`, to which it passes each dict of results as soon as it is known.
    """

    function: Callable
    fraction: float


def run_parts(
    parts: dict[str, Part], inputs: tuple, seconds: float, write: Callable[[dict], None], log: Path, start_method: str
) -> dict[str, dict]:
    """Run the parts one after the other within `seconds`; returns {name: result}.

    A result has what its part has sent, its `state`, its `seconds`, and a `note` if it did not finish. While a part
    runs its state is "not finished", so that an interrupted report is correct.

    Args:
        inputs: first arguments of every part.
        write: called with all results so far whenever they change.
        log: file that receives what the parts print.
        start_method: multiprocessing's.
    """
    results = {name: {"state": NOT_STARTED} for name in parts}
    report_start, fraction = time.monotonic(), 0.0
    for name, part in parts.items():
        start = time.monotonic()
        fraction += part.fraction
        limit = report_start + fraction * seconds - start
        results[name]["state"] = NOT_FINISHED
        write(results)
        for update in _updates(part.function, (*inputs, results), limit, log, start_method):
            results[name] |= update
            results[name]["seconds"] = round(time.monotonic() - start, 1)
            write(results)
        print(f"{name}: {results[name]['state']} after {results[name]['seconds']:.0f} s", flush=True)
    return results


def _updates(function: Callable, inputs: tuple, limit: float, log: Path, start_method: str) -> Iterator[dict]:
    """Start a part, and yield what it sends until it ends or its time is over; its state or a note comes last."""
    context = multiprocessing.get_context(start_method)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run_part, args=(function, inputs, sender, log))
    process.start()
    sender.close()
    deadline = time.monotonic() + limit
    try:
        while receiver.poll(max(0, deadline - time.monotonic())):
            update = receiver.recv()
            yield update
            if "state" in update:
                return
        yield {"note": f"ended at its time limit, {limit:.0f} s"}
    except EOFError:
        process.join()
        yield {"state": FAILED, "note": f"its process ended with exit code {process.exitcode}"}
    finally:
        _kill(process)


def _kill(process):
    """Stop a part's process and all processes that it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has no group yet, or no process any more
        process.kill()
    process.join()


def _run_part(function: Callable, inputs: tuple, sender: Connection, log: Path):
    """Run a part in its new process, and send the state in which it ends."""
    os.setsid()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.stdout = sys.stderr = file = open(log, "a", buffering=1)  # noqa: SIM115
    os.dup2(file.fileno(), 1)  # for output that Python does not print
    os.dup2(file.fileno(), 2)
    sys.dont_write_bytecode, tempfile.tempdir = True, None  # a forked process has those of its parent
    try:
        function(*inputs, sender.send)
        sender.send({"state": FINISHED})
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        sender.send({"state": FAILED, "note": one_line(error)})


def _end_with_parent():
    """Wait until the process of the report has ended, then stop this part's processes."""
    multiprocessing.parent_process().join()
    os.killpg(0, signal.SIGKILL)


def one_line(error: BaseException) -> str:
    """An error as one line of a report: its type and the first line of its message."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first[:200]}"
