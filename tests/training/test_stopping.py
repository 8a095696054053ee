"""Signals and the agreement of ranks, in real processes that end in bounded time."""

import os
import signal
import time

import pytest
import torch
from cutting import InputRecorder
from forking import exit_code, receive
from helpers import TINY, few_digits, run_main

from training import stopping
from training.stopping import Agreement, StopSignals
from utils import World, joined_world, run_command

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


ALL = ["SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU"]
"""What terminals (INT, QUIT, HUP), schedulers (TERM, USR1, USR2, XCPU) and torchrun (TERM, INT, HUP, QUIT) send."""


@pytest.mark.parametrize("name", ALL)
def test_the_first_signal_is_recorded_and_reported(name, fork, tmp_path, capfd):
    process, pipe = fork(wait_for_signals, tmp_path / "cleanup")
    receive(pipe)
    os.kill(process.pid, signal.Signals[name])
    time.sleep(0.1)
    pipe.send("end")
    assert receive(pipe) == name
    assert exit_code(process) == 0
    line = f"{name} received: saving at the next step; a second signal exits at once\n"
    assert capfd.readouterr().err.count(line) == 1


def test_one_stop_may_send_several_signals_but_a_later_one_exits_at_once(fork, tmp_path):
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


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_a_scheduler_may_repeat_that_a_limit_is_near(name, fork, tmp_path, monkeypatch):
    monkeypatch.setattr(stopping, "SAME_STOP_SECONDS", 0.0)
    process, pipe = fork(wait_for_signals, tmp_path / "cleanup")
    receive(pipe)
    for _ in range(3):
        os.kill(process.pid, signal.Signals[name])
        time.sleep(0.05)
    pipe.send("end")
    assert receive(pipe) == name
    assert exit_code(process) == 0


def ignoring_hangups(pipe, cleanup):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    wait_for_signals(pipe, cleanup)


def test_nohup_keeps_a_run_alive(fork, tmp_path):
    process, pipe = fork(ignoring_hangups, tmp_path / "cleanup")
    receive(pipe)
    os.kill(process.pid, signal.SIGHUP)
    time.sleep(0.1)
    pipe.send("end")
    assert receive(pipe) is None
    assert exit_code(process) == 0


def test_a_suspended_run_continues(fork, tmp_path):
    process, pipe = fork(wait_for_signals, tmp_path / "cleanup")
    receive(pipe)
    os.kill(process.pid, signal.SIGSTOP)  # what SIGTSTP does too, except to processes without a terminal
    pipe.send("end")
    assert not pipe.poll(0.2)
    os.kill(process.pid, signal.SIGCONT)
    assert receive(pipe) is None
    assert exit_code(process) == 0


def test_without_a_signal_nothing_is_recorded_and_the_handlers_are_restored():
    numbers = [signal.Signals[name] for name in ALL]
    before = [signal.getsignal(number) for number in numbers]
    with StopSignals() as stop:
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert stop.received is None
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_run_without_a_folder_ends_as_any_program(fork):
    def run(pipe):
        def at(*moment):
            if moment == ("step", 0, 2):
                os.kill(os.getpid(), signal.SIGTERM)

        InputRecorder(setattr, at)
        with few_digits():
            try:
                run_command(lambda: run_main(*TINY, "--preset", "released"))
            except SystemExit as stop:
                pipe.send(stop.code)

    process, pipe = fork(run)
    assert receive(pipe, 60) == 128 + signal.SIGTERM
    assert exit_code(process) == 0


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


def test_a_flag_of_any_rank_is_set_on_all_ranks_one_exchange_later(two_ranks):
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
