"""How a run is stopped so that it can continue: signals, and ranks that stop at the same step."""

import contextlib
import datetime
import os
import signal
import time

import torch
import torch.distributed as dist

from utils import STOP_SIGNALS, World

RESUMABLE = 75  # exit code, EX_TEMPFAIL of sysexits.h: stopped by a signal after saving; start again to continue
LIMIT_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)  # a scheduler's, some of them again and again
SAME_STOP_SECONDS = 2.0  # a terminal, torchrun and SLURM each forward a stop, so one stop sends several signals


class StopSignals:
    """Context manager that records the `STOP_SIGNALS`, which then do not end the process.

    A signal that comes more than `SAME_STOP_SECONDS` after the first one ends the process at once, without any cleanup
    and with exit code 128 + its number, unless it is one of `LIMIT_SIGNALS`. As always in Python, a signal is handled
    after the C function that the main thread is running. SIGHUP remains ignored where `nohup` has had it ignored.

    Args:
        has_folder: whether the run can be saved; otherwise the signals end it as they end any program.

    Attributes:
        received: name of the first signal, or None.
    """

    def __init__(self, has_folder: bool = True):
        self.has_folder = has_folder
        self.received: str | None = None
        self._first = 0.0
        self._previous = {}

    def __enter__(self) -> "StopSignals":
        has_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        for number in STOP_SIGNALS if self.has_folder else ():
            if number != signal.SIGHUP or not has_nohup:
                self._previous[number] = signal.signal(number, self._record)
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _record(self, number: int, _frame):
        now = time.monotonic()
        if self.received is None:
            self.received, self._first = signal.Signals(number).name, now
            line = f"{self.received} received: saving at the next step; a second signal exits at once\n"
            with contextlib.suppress(OSError):  # print could wait for a lock that the interrupted code holds
                os.write(2, line.encode())
        elif now - self._first > SAME_STOP_SECONDS and number not in LIMIT_SIGNALS:
            os._exit(128 + number)


class Agreement:
    """Flags that count for all ranks if one rank sets them. They are exchanged between CPUs, without waiting for a GPU.

    All ranks create it, and call its methods in the same order with the same number of flags.

    A rank waits 30 minutes for the slowest one.
    """

    def __init__(self, world: World):
        wait = datetime.timedelta(minutes=30)
        self.group = dist.new_group(backend="gloo", timeout=wait) if world.size > 1 else None
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def vote(self, *flags: bool) -> tuple[bool, ...]:
        """Whether any rank set each flag; waits for all ranks."""
        return self._wait(self._start(flags)) if self.group else flags

    def exchange(self, *flags: bool) -> tuple[bool, ...]:
        """Start a vote, and return the result of the previous call's vote, which has had a step's time to arrive.

        The first call returns False for each flag. A single process gets the flags of this call.
        """
        if not self.group:
            return flags
        previous, self._pending = self._pending, self._start(flags)
        return self._wait(previous) if previous else (False,) * len(flags)

    def finish(self) -> tuple[bool, ...]:
        """The result of the last `exchange`'s vote; empty if it is known already or there was none."""
        previous, self._pending = self._pending, None
        return self._wait(previous) if previous else ()

    def _start(self, flags: tuple[bool, ...]) -> tuple[dist.Work, torch.Tensor]:
        votes = torch.tensor(flags, dtype=torch.int32)
        return dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.group, async_op=True), votes

    @staticmethod
    def _wait(started: tuple[dist.Work, torch.Tensor]) -> tuple[bool, ...]:
        work, votes = started
        work.wait()
        return tuple(bool(vote) for vote in votes.tolist())
