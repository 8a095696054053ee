"""The runs of a study: trained and analysed in turn or side by side, within a budget of time."""

import datetime
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import Popen
from typing import NamedTuple

from studies.commands import Settings
from studies.plan import PlannedRun
from studies.run_state import ANALYZED, State, epochs_left, seconds_taken, weights_of, write_analyzed
from training.stopping import RESUMABLE

CONSOLE = "console.log"
"""The output of a run that has others beside it."""
POLL_SECONDS = 0.1


class Outcome(NamedTuple):
    """How a study ended.

    Attributes:
        failed: runs that ended with an error.
        left: runs that were stopped, or not started.
        signal: what stopped the study; None if no signal did.
    """

    failed: list[str]
    left: list[str]
    signal: str | None


class Job:
    """A run that is trained or analysed.

    Attributes:
        commands: what is left to start.
        step: "train" or "analyze", which `process` does since `step_began`.
        epochs: the fraction of the run's epochs that were left when the job began.
    """

    def __init__(self, run: PlannedRun, commands: dict[str, list[str]], now: float):
        self.run, self.commands, self.began, self.step_began = run, commands, now, now
        self.epochs = epochs_left(run) if "train" in commands else 0.0
        self.step, self.process = "", None


class Jobs:
    """The runs of a study, as many at a time as `settings` say.

    Args:
        start: starts a command of a run; its output goes to a file, or to this process's for None.
        received: the name of the signal that stops the study, or None.
        on_finished: called with each run that is finished and analysed.
        clock: the time in seconds.
        sleep: waits for a number of seconds.
    """

    def __init__(
        self,
        settings: Settings,
        start: Callable[[PlannedRun, list[str], Path | None], Popen],
        received: Callable[[], str | None],
        on_finished: Callable[[PlannedRun], None] = lambda run: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self.settings, self.start, self.received, self.on_finished = settings, start, received, on_finished
        self.clock, self.sleep = clock, sleep
        self.running: list[Job] = []
        self.failed: list[str] = []
        self.left: list[str] = []
        self.signal: str | None = None
        self.is_stopping = False
        self.longest = 0.0  # seconds of a run
        self.began = clock()

    def run(self, runs: Sequence[PlannedRun]) -> Outcome:
        """Start what is left of each run, and return when all have ended; a run that fails does not stop the others.

        A signal stops all runs, and so does the end of the budget: they save, and resume when the study starts again.
        """
        self.longest = max((seconds_taken(run.folder) for run in runs), default=0.0)
        waiting = [*runs]
        while waiting or self.running:
            for job in [*self.running]:
                if (code := job.process.poll()) is not None:
                    self._step_ended(job, code)
            self._stop_if_needed()
            while waiting and not self.is_stopping and len(self.running) < self.settings.num_jobs:
                self._begin(waiting.pop(0))
            if self.running:
                self.sleep(POLL_SECONDS)
            elif self.is_stopping:
                break
        self.left += [run.name for run in waiting if self.settings.state(run) != State.FINISHED]
        return Outcome(self.failed, self.left, self.signal)

    def _begin(self, run: PlannedRun):
        state, job = self.settings.state(run), Job(run, self.settings.commands(run), self.clock())
        needed, left = self.longest * job.epochs, self._seconds_left()
        if not job.commands:
            self._remove_weights(run)
        elif needed > left:
            self.left.append(run.name)
            return tell(f"{run.name}: not started: it needs about {_time(needed)}, and {_time(left)} are left")
        tell(f"{run.name}: {state.value}")
        if job.commands:
            self.running.append(job)
            self._start_step(job)

    def _start_step(self, job: Job):
        job.step = next(iter(job.commands))
        job.step_began = self.clock()
        if job.step == "train":
            (job.run.folder / ANALYZED).unlink(missing_ok=True)
        log = job.run.folder / CONSOLE if self.settings.num_jobs > 1 else None
        job.process = self.start(job.run, job.commands.pop(job.step), log)

    def _step_ended(self, job: Job, code: int):
        run, now = job.run, self.clock()
        if code == 0 and job.step == "analyze":
            write_analyzed(run.folder, self.settings.analyze, now - job.step_began)
        if code == 0 and job.commands and not self.is_stopping:
            return self._start_step(job)
        self.running.remove(job)
        seconds = now - job.began
        if code == 0 and not job.commands:
            self._remove_weights(run)
            self.longest = max(self.longest, seconds_taken(run.folder), seconds if job.epochs == 1 else 0.0)
            tell(f"{run.name}: finished in {_time(seconds)}")
            self.on_finished(run)
        elif self.is_stopping or code == RESUMABLE:
            self.left.append(run.name)
            tell(f"{run.name}: stopped after {_time(seconds)}")
            if not self.is_stopping:  # the signal was sent to the run alone
                self.signal = f"a signal to {run.name}"
        else:
            self.failed.append(run.name)
            how = f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
            tell(f"{run.name}: failed after {_time(seconds)} ({how}){self._last_line(run)}")

    def _stop_if_needed(self):
        """Stop all runs when a signal has come, or the budget is used up."""
        self.signal = self.signal or self.received()
        if self.is_stopping or not (self.signal or self._seconds_left() <= 0):
            return
        self.is_stopping = True
        tell(f"{self.signal or 'the end of --budget'} stops the study{': its runs save' if self.running else ''}")
        for job in self.running:
            job.process.terminate()

    def _seconds_left(self) -> float:
        budget = self.settings.budget_seconds
        return float("inf") if budget is None else budget - (self.clock() - self.began)

    def _remove_weights(self, run: PlannedRun):
        for path in [] if self.settings.keep_weights else weights_of(run.folder):
            path.unlink()

    def _last_line(self, run: PlannedRun) -> str:
        """Why a run failed, where its output is in a file."""
        path = run.folder / CONSOLE
        if self.settings.num_jobs == 1 or not path.exists():
            return ""
        lines = path.read_text(errors="replace").strip().splitlines()
        errors = [line for line in lines if line.startswith("error:")]
        return f": {(errors or lines or ['no output'])[-1]}; see {path}"


def tell(line: str):
    """Print a line about the study; standard output is that of the runs."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _time(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))
