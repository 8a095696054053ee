"""Kill a training run again and again, and check that it ends like a run that was not killed.

    python tests/stress.py --kills 200 --seed 0 --ranks 1

A tiny ViT trains on digits with every source of random numbers in use. Each process of a run starts with
`--resume auto` and is killed by SIGKILL: some at a random moment, the others before, within or after a call
that writes a file, most of them within a save. All ranks of a run are killed together. A run that is finished is
compared with one that was not killed, and the next run starts in a new folder. Checked:

    after each kill  All checkpoints are complete. At most --save-every-steps of the steps that are not saved ended
                     while no save was being written: a save starts at its step once the one before is on disk. With
                     several ranks it is one step more, in which they agree.
    after each run   Weights, averaged weights, optimizer, schedule, counters and best checkpoints are the same bit for
                     bit, as are log.txt, TensorBoard's points and summary.json, except for times.
"""

import argparse
import collections
import io
import itertools
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from multiprocessing.sharedctypes import RawArray, RawValue
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy and torch start threads, which a fork would lose
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch  # noqa: E402
import torch.utils.tensorboard  # noqa: E402  once, not in each process
from cutting import outcome  # noqa: E402
from forking import FORK  # noqa: E402
from helpers import TINY, few_digits, run_main  # noqa: E402
from ranks import environment_of, free_port  # noqa: E402

import reports.figures  # noqa: E402, F401  once, not in each process
import utils  # noqa: E402
from training import checkpoint, checkpoint_files, records, saving  # noqa: E402

SAVE_EVERY = 3  # optimizer steps
FLAGS = (
    *(*TINY, "--tensorboard", "--preset", "released", "--accum-steps", "2", "--resume", "auto"),
    *("--drop", "0.1", "--drop-path", "0.2", "--reprob", "0.5", "--model-ema-decay", "0.9"),
    *("--lr", "2e-3", "--unscale-lr", "--warmup-epochs", "1", "--log-interval", "2"),
    *("--save-every-steps", SAVE_EVERY, "--save-every-minutes", "0", "--keep-checkpoints", "3"),
)
CALLS = {"write": 300, "fsync": 12, "replace": 18, "link": 6, "unlink": 6}  # about those of five saves


class Death(NamedTuple):
    """How a process ends: after a number of seconds, call "time", or at a call, such as "before" its 3rd "link"."""

    call: str
    number: float
    moment: str = ""

    def end_at_call(self):
        """Kill this process at the call."""
        numbers = itertools.count(1)
        function = io.FileIO.write if self.call == "write" else getattr(os, self.call, None)

        def killing(*args, **kwargs):
            is_last = next(numbers) == self.number
            if is_last and self.moment == "within":
                file, data = args
                args = file, data[: len(data) // 2]
            result = None if is_last and self.moment == "before" else function(*args, **kwargs)
            if is_last:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        if self.call == "write":
            killing_file = type("KillingFile", (io.FileIO,), {"write": killing})
            utils.open = lambda *args: io.BufferedWriter(killing_file(*args))
            records.open = lambda path, mode, buffering: killing_file(path, mode)
        elif self.call != "time":
            setattr(os, self.call, killing)


NEVER = Death("time", 300)  # a process that has not ended by then is stuck


def deaths(draw: random.Random, seconds: float) -> Iterator[Death]:
    """Deaths in random order, of every kind equally often but "time" twice; `seconds` is the longest time."""
    while True:
        for call in draw.sample([*CALLS, "time", "time"], len(CALLS) + 2):
            if call == "time":
                yield Death("time", draw.uniform(0, seconds))
            else:
                moments = ["before", "after", *["within"] * (call == "write")]
                yield Death(call, draw.randint(1, CALLS[call]), draw.choice(moments))


class Stress:
    """Runs that are killed, and what was found."""

    def __init__(self, folder: Path, epochs: int, ranks: int):
        self.folder, self.epochs, self.ranks, self.num_runs, self.most_lost = folder, epochs, ranks, 0, 0
        self.kills, self.violations, self.begun = collections.Counter(), [], time.monotonic()
        self.done, self.is_idle, self.steps_per_epoch = RawValue("q"), RawArray("b", 10**5), 0  # of a run's steps
        assert self.start(folder / "reference", NEVER) == 0, f"see {folder / 'reference.txt'}"
        self.seconds = time.monotonic() - self.begun
        self.steps_per_epoch = self.done.value
        self.reference = outcome(folder / "reference")

    def start(self, folder: Path, death: Death, workers: int = 0) -> int:
        """The processes of a run until their end, or the main one's death; returns the first exit code other than 0."""
        assert threading.active_count() == torch.get_num_threads() == 1  # a fork has no other thread
        port = free_port()
        processes = [
            FORK.Process(target=self._train, args=(folder, death, workers, environment_of(rank, self.ranks, port)))
            for rank in range(self.ranks)
        ]
        for process in processes:
            process.start()
        processes[0].join(death.number if death.call == "time" else 300)
        for process in processes:
            process.join(60 if processes[0].exitcode == 0 else 0)
            process.kill()
            process.join()
        return next((process.exitcode for process in processes if process.exitcode), 0)

    def _train(self, folder: Path, death: Death, workers: int, environment: dict[str, str]):
        os.environ |= environment
        with open(folder.with_suffix(".txt"), "ab") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        after_step = saving.Saver.after_step

        def watched(saver):
            if saver.world.is_main:
                done = saver.state.epoch * self.steps_per_epoch + saver.state.step
                self.is_idle[done], self.done.value = not saver.writer.busy, done
            after_step(saver)

        saving.Saver.after_step = watched
        death.end_at_call()
        run_main(*FLAGS, "--epochs", self.epochs, "--num-workers", workers, "--output-dir", folder, draw_curves=True)

    def run(self, kills: Iterator[Death], num_kills: int, draw: random.Random):
        """One run from its start to its end, killed as long as there are fewer than `num_kills`."""
        self.num_runs += 1
        folder, code, self.done.value = self.folder / f"run{self.num_runs}", None, 0
        while code != 0:
            death = next(kills) if self.kills.total() < num_kills else NEVER
            code = self.start(folder, death, workers=draw.choice([0, 0, 0, 1]))
            if code not in (0, -signal.SIGKILL):
                raise SystemExit(f"error: a process ended with {code}, see {folder.with_suffix('.txt')}")
            if code:
                self.kills[death.call] += 1
            saved, done = self._saved_steps(folder), self.done.value
            self.most_lost = max(self.most_lost, done - saved)
            if (idle := sum(self.is_idle[saved + 1 : done + 1])) > SAVE_EVERY + (self.ranks > 1):
                self.violations.append(f"{folder.name}, {death}: {idle} steps lost while no save was being written")
            self.done.value = saved  # where the next process starts
        found = outcome(folder)
        self.violations += [f"{folder.name}: {name} differs" for name in found if found[name] != self.reference[name]]
        print(f"{folder.name}: {self}", flush=True)

    def _saved_steps(self, folder: Path) -> int:
        """Optimizer steps in the newest checkpoint; all checkpoints must be complete."""
        candidates = checkpoint_files.candidates(folder / checkpoint.LAST)
        for path in [*candidates, *folder.glob("checkpoint_best*.pth")]:
            checkpoint_files.verify(path)
        newest = torch.load(candidates[0], weights_only=True) if candidates else {"epoch": -1, "step": 0}
        return (newest["epoch"] + 1) * self.steps_per_epoch + newest["step"]

    def __str__(self):
        kinds = ", ".join(f"{name} {count}" for name, count in sorted(self.kills.items()))
        return (
            f"{self.kills.total()} kills ({kinds}) in {self.num_runs} runs; {len(self.violations)} violations, "
            f"at most {self.most_lost} steps lost; {time.monotonic() - self.begun:.0f} s"
        )


def stress():
    """Kill as often as the command line says; violations end in one line each and a non-zero exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="processes to kill")
    parser.add_argument("--seed", type=int, default=0, help="of the deaths; their moments also depend on the machine")
    parser.add_argument("--epochs", type=int, default=6, help="of each run")
    parser.add_argument("--ranks", type=int, default=1, help="processes of each run")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="stress-"))
    draw = random.Random(args.seed)
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of every process that has dropped points
    with few_digits(256):
        test = Stress(folder, args.epochs, args.ranks)
        kills = deaths(draw, test.seconds / 2)
        while test.kills.total() < args.kills:
            test.run(kills, args.kills, draw)
    print("\n".join([*test.violations, f"total: {test}"]))
    if test.violations:
        raise SystemExit(f"error: {len(test.violations)} violations; the runs are in {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    stress()
