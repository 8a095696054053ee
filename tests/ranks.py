"""Programs run as forked processes of a test, which share its imports: a start takes a tenth of a second, not seconds.

One test starts torchrun itself; the others start their ranks or torchrun here.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed.run
from helpers import REPOSITORY


class Finished(NamedTuple):
    """What the ranks of a program returned.

    Attributes:
        returncodes: the exit code of each rank; -N for one that signal N ended.
        stdout, stderr: what they wrote, rank after rank.
    """

    returncodes: list[int]
    stdout: str
    stderr: str

    @property
    def returncode(self) -> int:
        """0 where all ranks succeeded, otherwise the code of the first that failed."""
        return next(filter(None, self.returncodes), 0)


def run_ranks(count: int, program: str | Path, *words, timeout: float = 240) -> Finished:
    """Run `python PROGRAM WORDS` as `count` ranks of one group, with one thread each.

    Each rank has its own session, as under torchrun. Those that still run after `timeout` seconds are killed.
    """
    context, port = multiprocessing.get_context("fork"), free_port()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        processes = []
        for rank in range(count):
            environment = environment_of(rank, count, port)
            files = folder / f"{rank}.out", folder / f"{rank}.err"
            processes.append(context.Process(target=_run, args=(program, words, environment, *files)))
            processes[-1].start()
        try:
            for process in processes:
                process.join(timeout)
            late = [rank for rank, process in enumerate(processes) if process.is_alive()]
        finally:
            for process in processes:
                if process.is_alive():
                    os.killpg(process.pid, signal.SIGKILL)
                    process.join()
        texts = ["".join(file.read_text() for file in sorted(folder.glob(f"*.{end}"))) for end in ("out", "err")]
    assert not late, f"ranks {late} had not ended after {timeout} s; standard error: {texts[1]}"
    return Finished([process.exitcode for process in processes], *texts)


def run_forked(program: str | Path, *words, timeout: float = 240) -> Finished:
    """Run `python PROGRAM WORDS` as a process without a group."""
    return run_ranks(1, program, *words, timeout=timeout)


def run_torchrun(count: int, *words) -> Finished:
    """Run `torchrun WORDS` in a forked process; it forks its `count` ranks."""
    launch = ("--standalone", f"--nproc_per_node={count}", "--run-path", "--start-method=fork")
    return run_forked(torch.distributed.run.__file__, *launch, *words)


def _run(program, words, environment: dict[str, str], out: Path, err: Path):
    os.setsid()
    for number, path in ((1, out), (2, err)):
        file = path.open("w", buffering=1)
        os.dup2(file.fileno(), number)
        setattr(sys, {1: "stdout", 2: "stderr"}[number], file)
    os.chdir(REPOSITORY)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
    os.environ |= environment
    torch.set_num_threads(1)
    sys.argv = [str(program), *map(str, words)]
    runpy.run_path(str(program), run_name="__main__")


def environment_of(rank: int, count: int, port: int) -> dict[str, str]:
    """torchrun's variables of a rank; none for a single process."""
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in group.items()} if count > 1 else {}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
