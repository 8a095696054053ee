"""A loader that fails ends the run with one line, which says what to do."""

import errno
import gc
import multiprocessing
import os
import re
import signal
import tempfile
import time

import pytest
from failing import Failing, hang, kill
from torch.utils.data import DataLoader

from pipeline import workers
from pipeline.workers import loader_errors
from utils import BadImageError


@pytest.fixture
def old_loaders_are_gone():
    """The end of an earlier test's loader, in the middle of this test, would hide the signal of a worker's death."""
    gc.collect()


def reader(index):
    """The process that reads an item."""
    return os.getpid()


def break_pipes_and_die():
    """As when the system is slow: it closes a dying process's files before it signals its death."""
    time.sleep(0.1)  # the batch before waits in the queue
    os.closerange(2, 1000)
    time.sleep(0.7)
    kill()


def leave():
    os._exit(3)


def fill_shared_memory():
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_7_8_0>: No space left on device (28)")


def be_wrong():
    raise ValueError("a bug")


@pytest.mark.parametrize(
    ("fail", "timeout", "line"),
    [
        (kill, 0, r"a loader worker was killed or died.*fewer --num-workers.*killed by signal: Killed"),
        (kill, 30, r"a loader worker was killed or died.*fewer --num-workers.*killed by signal: Killed"),
        (leave, 0, r"a loader worker was killed or died.*exited unexpectedly"),
        (hang, 0.5, r"gave no batch in time.*raise --loader-timeout.*timed out after 0.5 seconds"),
        (fill_shared_memory, 0, r"shared memory.*--shm-size.*No space left"),
    ],
)
def test_a_loader_that_fails_ends_in_one_line(fail, timeout, line, old_loaders_are_gone):
    loader = DataLoader(Failing(fail, reader), batch_size=2, num_workers=2, timeout=timeout)
    with pytest.raises(SystemExit) as stop, loader_errors():
        for _ in loader:
            time.sleep(0.01)
    message = stop.value.code
    assert re.match(rf"error: .*{line}", message)
    assert "; start again with --resume auto (" in message and "\n" not in message


def test_a_worker_killed_while_the_main_process_computes(old_loaders_are_gone):
    """Its death interrupts whatever runs."""
    loader = DataLoader(Failing(int, reader), batch_size=2, num_workers=1)
    with pytest.raises(SystemExit, match="error: a loader worker was killed"), loader_errors():
        batches = iter(loader)
        os.kill(int(next(batches)[0]), signal.SIGKILL)
        time.sleep(10)


def test_a_pipe_that_breaks_before_its_worker_is_known_dead(old_loaders_are_gone):
    loader = DataLoader(Failing(break_pipes_and_die, reader), batch_size=2, num_workers=1)
    with pytest.raises(SystemExit, match=r"a loader worker was killed.*killed by signal: Killed"), loader_errors():
        for _ in loader:
            time.sleep(0.3)


def test_a_pipe_that_breaks_without_a_signal_of_death(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    here, there = multiprocessing.Pipe()
    there.close()
    with (
        pytest.raises(SystemExit, match=r"error: a loader worker was killed or died.*; do this \(EOFError\)"),
        loader_errors("do this"),
    ):
        here.recv()


def test_a_death_whose_signal_arrives_while_an_error_is_handled(monkeypatch):
    is_from_pipe, deaths = workers._is_from_pipe, ["DataLoader worker (pid 5) is killed by signal: Killed. "]

    def interrupted(error):
        if deaths:
            raise RuntimeError(deaths.pop())
        return is_from_pipe(error)

    monkeypatch.setattr(workers, "_is_from_pipe", interrupted)
    with (
        pytest.raises(SystemExit, match=r"^error: a loader worker was killed.*killed by signal: Killed"),
        loader_errors(),
    ):
        raise ConnectionResetError("reset by peer")


@pytest.mark.parametrize(
    ("folder", "line"), [("/" + "x" * 80, "a shorter one, such as /tmp"), (None, "need a temporary folder; set TMPDIR")]
)
def test_a_temporary_folder_that_cannot_serve(folder, line, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", folder)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/dev/null"])
    with pytest.raises(SystemExit, match=line):
        workers.StoppableLoader([1], num_workers=1)
    workers.StoppableLoader([1], num_workers=0)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bug_in_a_data_set_keeps_its_traceback(num_workers):
    with pytest.raises(ValueError, match="a bug"), loader_errors():
        list(DataLoader(Failing(be_wrong, reader), batch_size=2, num_workers=num_workers))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: out of resource: shared memory"),
        RuntimeError(""),
        OSError(errno.ENOSPC, "No space left on device", "checkpoint.pth"),
        ConnectionResetError("of another kind"),
        EOFError(),
        BadImageError("unreadable image a.png: DataLoader worker (pid 5) Bus error"),
        KeyboardInterrupt(),
    ],
)
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as raised, loader_errors():
        raise error
    assert raised.value is error


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (
            "DataLoader worker (pid 5) is killed by signal: Bus error. It is possible that ...",
            "shared memory .* is full",
        ),
        ("unable to write to file </torch_18692_1954506624>", "shared memory .* is full"),
        ("DataLoader worker (pid(s) 5, 6) exited unexpectedly", "a loader worker was killed or died"),
        ("DataLoader worker (pid 5) is killed by signal: Segmentation fault. ", "a loader worker was killed or died"),
    ],
)
def test_further_messages_of_torch(message, line):
    with pytest.raises(SystemExit, match=rf"^error: {line}"), loader_errors():
        raise RuntimeError(message)
