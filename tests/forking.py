"""Functions of a test in forked processes, which it talks to through pipes and waits for in bounded time."""

import multiprocessing

FORK = multiprocessing.get_context("fork")


def start(function, *args):
    """Call `function(pipe, *args)` in a forked process; returns the process and this end of its pipe."""
    here, there = FORK.Pipe()
    process = FORK.Process(target=function, args=(there, *args))
    process.start()
    there.close()
    return process, here


def receive(pipe, seconds=20):
    """What the process sends next."""
    assert pipe.poll(seconds), "nothing came in time"
    return pipe.recv()


def exit_code(process, seconds=20):
    process.join(seconds)
    assert not process.is_alive()
    return process.exitcode
