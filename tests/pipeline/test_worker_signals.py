"""The signals of loader workers: a stop of the whole process group does not end them, their parent's end does."""

import contextlib
import os
import select
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from forking import exit_code, receive

from pipeline.workers import StoppableLoader
from training.stopping import StopSignals
from utils import STOP_SIGNALS, run_command


class Pids:
    def __len__(self):
        return 40

    def __getitem__(self, index):
        return os.getpid()


def load(pipe, how, method="fork", num_workers=2):
    """An epoch of a loader in its own process group, which the test signals after a batch."""
    os.setsid()
    with StopSignals():
        batches = iter(StoppableLoader(Pids(), batch_size=2, num_workers=num_workers, multiprocessing_context=method))
        pids = set(next(batches).tolist()) | set(next(batches).tolist())
        pipe.send(pids)
        pipe.recv()
        if how == "leave":
            load.batches = batches  # still working when the process exits
            return
        later = set(torch.cat(list(batches)).tolist())
        pipe.send(later)


def load_beside_a_library(pipe, how, method):
    """`load`, where a library starts a thread in each forked process, as pyarrow does."""
    os.register_at_fork(after_in_child=lambda: threading.Thread(target=time.sleep, args=(60,), daemon=True).start())
    load(pipe, how, method)


def with_errors_in(pipe, path, loading, *args):
    """`loading`, whose errors are added to a file; in pytest's the resource tracker could write over them."""
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    loading(pipe, *args)


SLOW = pytest.mark.slow  # each worker imports torch
METHODS = ["fork", pytest.param("forkserver", marks=SLOW), pytest.param("spawn", marks=SLOW)]


@pytest.mark.parametrize(
    ("loading", "method"),
    [(load_beside_a_library, "fork"), (load, "fork"), pytest.param(load, "forkserver", marks=SLOW)],
)
def test_workers_survive_a_stop_of_the_group_and_end_with_their_loader(loading, method, fork, tmp_path):
    process, pipe = fork(with_errors_in, tmp_path / "errors", loading, "finish", method)
    pids = receive(pipe)
    for number in STOP_SIGNALS:
        os.killpg(process.pid, number)
        time.sleep(0.05)  # pytest's faulthandler gives handlers a small stack, which many at once overflow
    time.sleep(0.2)
    pipe.send("continue")
    assert receive(pipe) == pids
    assert len(pids) == 2
    assert exit_code(process, seconds=8) == 0
    assert (tmp_path / "errors").read_text().count("received") == 1  # not by the workers


@pytest.mark.parametrize("method", ["fork", "forkserver", pytest.param("spawn", marks=SLOW)])
def test_a_process_that_leaves_workers_behind_at_its_exit_does_not_hang(method, fork):
    process, pipe = fork(load, "leave", method)
    receive(pipe)
    pipe.send("leave")
    assert exit_code(process) == 0


def command(pipe, folder):
    """A program that reads batches for ever and has made a folder."""

    def read():
        with contextlib.ExitStack() as stack:
            folder.mkdir()
            stack.callback(folder.rmdir)
            loader = StoppableLoader(Pids(), batch_size=2, num_workers=3, persistent_workers=True)
            pipe.send(set(torch.cat(list(loader)).tolist()))
            while True:
                list(loader)

    run_command(read)


def test_sigterm_ends_a_program_its_workers_and_its_temporary_files(fork, tmp_path, capfd):
    process, pipe = fork(command, tmp_path / "folder")
    pids = receive(pipe)
    os.kill(process.pid, signal.SIGTERM)
    assert exit_code(process) == 128 + signal.SIGTERM
    assert len(pids) == 3 and not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert [*tmp_path.iterdir()] == []
    assert capfd.readouterr().err == ""


def block(pipe):
    """A program that blocks SIGTERM for a while, as at the start of workers, but has a thread that does not."""

    def wait():
        threading.Thread(target=time.sleep, args=(20,), daemon=True).start()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
        pipe.send("blocked")
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        pipe.send("not ended")

    run_command(wait)


def test_sigterm_waits_for_what_blocks_it(fork):
    process, pipe = fork(block)
    assert receive(pipe) == "blocked"
    assert exit_code(process) == 128 + signal.SIGTERM
    with pytest.raises(EOFError):
        pipe.recv()


@pytest.mark.parametrize("method", METHODS)
def test_workers_end_when_their_parent_is_killed(method, fork, monkeypatch):
    monkeypatch.setattr(torch.utils.data._utils.worker, "MP_STATUS_CHECK_INTERVAL", 0.2)  # 5 s
    read_end, write_end = os.pipe()  # open in the workers too, so that it ends when they do
    process, pipe = fork(load, "finish", method)
    os.close(write_end)
    receive(pipe)
    os.killpg(process.pid, signal.SIGTERM)
    process.kill()
    try:
        assert not select.select([read_end], [], [], 0)[0]
        assert select.select([read_end], [], [], 12)[0]
        assert os.read(read_end, 1) == b""
    finally:
        os.close(read_end)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_many_workers_end_together_when_their_parent_is_killed(fork, monkeypatch):
    """Each has the pipes of those before it, and so cannot learn from its own pipe that the parent has ended."""
    monkeypatch.setattr(torch.utils.data._utils.worker, "MP_STATUS_CHECK_INTERVAL", 60)
    read_end, write_end = os.pipe()
    process, pipe = fork(load, "finish", "fork", 8)
    os.close(write_end)
    receive(pipe)
    process.kill()
    try:
        assert select.select([read_end], [], [], 6)[0]
    finally:
        os.close(read_end)
