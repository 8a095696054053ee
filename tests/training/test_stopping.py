"""Signals, agreement of ranks, loader workers: real processes that end in bounded time."""

import os
import select
import signal
import time

import pytest
import torch
from forking import exit_code, receive
from torch.utils.data import DataLoader

from pipeline.workers import ignore_signals
from training import stopping
from training.stopping import Agreement, StopSignals
from utils import World, joined_world

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


# Signals


def wait_for_signals(pipe, cleanup):
    try:
        with StopSignals() as stop:
            pipe.send("ready")
            while not pipe.poll(0.02):
                pass
            pipe.send(stop.received)
    finally:
        cleanup.write_text("done")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_the_first_signal_is_noted_and_said(name, fork, tmp_path, capfd):
    process, pipe = fork(wait_for_signals, tmp_path / "cleanup")
    receive(pipe)
    os.kill(process.pid, signal.Signals[name])
    time.sleep(0.1)
    pipe.send("end")
    assert receive(pipe) == name
    assert exit_code(process) == 0
    line = f"{name} received: saving at the next step; a second signal leaves at once\n"
    assert capfd.readouterr().err.count(line) == 1


def test_the_same_stop_may_come_several_times_but_a_later_one_leaves_at_once(fork, tmp_path):
    process, pipe = fork(wait_for_signals, tmp_path / "cleanup")
    receive(pipe)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
        os.kill(process.pid, number)
        time.sleep(0.1)
    assert process.is_alive()
    time.sleep(stopping.SAME_STOP_SECONDS)
    os.kill(process.pid, signal.SIGTERM)
    assert exit_code(process, seconds=2) == 128 + signal.SIGTERM
    assert not (tmp_path / "cleanup").exists()


def test_without_a_signal_nothing_is_noted_and_the_handlers_come_back():
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    with StopSignals() as stop:
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert stop.received is None
    assert [signal.getsignal(number) for number in numbers] == before


# Agreement


def rank(pipe, number, store, function, *args):
    os.environ |= {"RANK": str(number), "WORLD_SIZE": "2", "LOCAL_RANK": str(number), "LOCAL_WORLD_SIZE": "2"}
    with joined_world("cpu", f"file://{store}") as world:
        pipe.send(function(pipe, world, Agreement(world), *args))


@pytest.fixture
def two_ranks(fork, tmp_path):
    """Starts a function on two gloo ranks; returns their processes and pipes."""
    return lambda function, *args: [fork(rank, number, tmp_path / "store", function, *args) for number in range(2)]


def step_until_stopped(pipe, world, agreement):
    pipe.send("ready")
    with StopSignals() as stop:
        for step in range(10_000):
            time.sleep(0.01 * world.rank)  # ranks are not equally fast
            stopped, _ = agreement.exchange(stop.received is not None, False)
            if stopped:
                agreement.finish()
                return step, stop.received


def test_a_signal_to_one_rank_stops_both_at_the_same_step(two_ranks):
    (_, first), (process, second) = two_ranks(step_until_stopped)
    receive(first), receive(second)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGTERM)
    (step, not_received), (same_step, received) = receive(first), receive(second)
    assert step == same_step > 0
    assert (not_received, received) == (None, "SIGTERM")


def agree(pipe, world, agreement):
    first, second = world.rank == 0, world.rank == 1
    votes = [agreement.vote(first, second, False), agreement.vote(False, False, second)]
    exchanged = [agreement.exchange(second and step == 2, first and step == 3) for step in range(5)]
    exchanged.append(agreement.finish())
    exchanged.append(agreement.finish())
    agreement.exchange(False, second)
    return votes, exchanged, agreement.finish()


def test_each_flag_is_set_where_any_rank_sets_it_one_exchange_later(two_ranks):
    no, results = (False, False), [receive(pipe) for _, pipe in two_ranks(agree)]
    votes = [(True, True, False), (False, False, True)]
    exchanged = [no, no, no, (True, False), (False, True), no, ()]
    assert results == [(votes, exchanged, (False, True))] * 2


def exchange_with_a_slow_rank(pipe, world, agreement):
    agreement.vote(False)
    time.sleep(1.0 * world.rank)
    started = time.monotonic()
    agreement.exchange(True)
    seconds = time.monotonic() - started
    return seconds, agreement.finish()


def test_an_exchange_does_not_wait_for_the_slowest_rank(two_ranks):
    (seconds, flags), _ = [receive(pipe) for _, pipe in two_ranks(exchange_with_a_slow_rank)]
    assert seconds < 0.7
    assert flags == (True,)


def test_a_single_process_agrees_with_itself():
    agreement = Agreement(ALONE)
    assert agreement.vote(True, False) == (True, False)
    assert agreement.exchange(False, True) == (False, True)
    assert agreement.finish() == ()


# Loader workers


class Pids:
    def __len__(self):
        return 40

    def __getitem__(self, index):
        return os.getpid()


def load(pipe, how):
    """An epoch of a loader with two workers in a process group of its own, which the test signals after a batch."""
    os.setsid()
    with StopSignals():
        batches = iter(DataLoader(Pids(), batch_size=2, num_workers=2, worker_init_fn=ignore_signals))
        pids = set(next(batches).tolist()) | set(next(batches).tolist())
        pipe.send(pids)
        pipe.recv()
        if how == "leave":
            load.batches = batches  # still at work when the process exits
            return
        later = set(torch.cat(list(batches)).tolist())
        pipe.send(later)


def test_workers_outlive_a_stop_of_the_group_and_end_with_their_loader(fork, capfd):
    process, pipe = fork(load, "finish")
    pids = receive(pipe)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.killpg(process.pid, number)
    time.sleep(0.2)
    pipe.send("go on")
    assert receive(pipe) == pids
    assert len(pids) == 2
    assert exit_code(process, seconds=8) == 0
    assert capfd.readouterr().err.count("received") == 1  # the workers have nothing to say


def test_a_process_that_leaves_workers_behind_at_its_exit_does_not_hang(fork):
    process, pipe = fork(load, "leave")
    receive(pipe)
    pipe.send("leave")
    assert exit_code(process, seconds=8) == 0


def test_workers_end_when_their_parent_is_killed(fork):
    read_end, write_end = os.pipe()  # open in the workers too, so that its end is theirs
    process, pipe = fork(load, "finish")
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
