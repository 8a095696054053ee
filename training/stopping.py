"""How a run is stopped so that it can continue: signals, and ranks that stop at the same step."""

import contextlib
import datetime
import os
import signal
import time

import torch
import torch.distributed as dist

from utils import World

RESUMABLE = 75  # exit code, EX_TEMPFAIL of sysexits.h: stopped by a signal after saving; start again to continue
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME_STOP_SECONDS = 2.0  # terminals, torchrun and SLURM each pass one stop on, so it comes several times


class StopSignals:
    """While entered, SIGTERM, SIGINT and SIGUSR1 are noted instead of ending the process.

    A second signal, later than `SAME_STOP_SECONDS` after the first, ends the process at once with 128 + its number and
    without any cleanup. As always in Python, both wait for the call into C that the main thread is in.

    Attributes:
        received: name of the first signal, or None.
    """

    def __init__(self):
        self.received: str | None = None
        self._first = 0.0
        self._previous = {}

    def __enter__(self) -> "StopSignals":
        self._previous = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame):
        now = time.monotonic()
        if self.received is None:
            self.received, self._first = signal.Signals(number).name, now
            line = f"{self.received} received: saving at the next step; a second signal leaves at once\n"
            with contextlib.suppress(OSError):  # print could find its own lock taken by the code that was interrupted
                os.write(2, line.encode())
        elif now - self._first > SAME_STOP_SECONDS:
            os._exit(128 + number)


class Agreement:
    """Flags that are set for all ranks as soon as one rank sets them; told between CPUs, without waiting for a GPU.

    All ranks make it, and call its methods in the same order with the same number of flags.

    Args:
        world: this process.
        timeout: how long a rank waits for the slowest.
    """

    def __init__(self, world: World, timeout: datetime.timedelta = datetime.timedelta(minutes=30)):
        self.group = dist.new_group(backend="gloo", timeout=timeout) if world.size > 1 else None
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def vote(self, *flags: bool) -> tuple[bool, ...]:
        """Whether any rank set each flag; waits for all ranks."""
        return self._result(self._start(flags)) if self.group else flags

    def exchange(self, *flags: bool) -> tuple[bool, ...]:
        """Once a step: `vote`'s result for the flags of the previous call, at first all False, without waiting for it.

        A single process gets back the flags of this call.
        """
        if not self.group:
            return flags
        before, self._pending = self._pending, self._start(flags)
        return self._result(before) if before else (False,) * len(flags)

    def finish(self) -> tuple[bool, ...]:
        """The result for the flags of the last `exchange`; empty if that is known already or there was none."""
        before, self._pending = self._pending, None
        return self._result(before) if before else ()

    def _start(self, flags: tuple[bool, ...]) -> tuple[dist.Work, torch.Tensor]:
        votes = torch.tensor(flags, dtype=torch.int32)
        return dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.group, async_op=True), votes

    @staticmethod
    def _result(started: tuple[dist.Work, torch.Tensor]) -> tuple[bool, ...]:
        work, votes = started
        work.wait()
        return tuple(bool(vote) for vote in votes.tolist())
