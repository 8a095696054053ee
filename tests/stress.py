"""Kill a training run again and again, and check that it ends as the run that nobody killed.

    python tests/stress.py --kills 200 --seed 0 [--keep DIR]

A tiny ViT trains on the digits with all that draws random numbers switched on, once uninterrupted and then from life to
life: every life is a process that starts with `--resume auto`, and ends in one of these ways.

    SIGKILL  at any moment
    SIGTERM  at any moment, on which it must save and leave with code 75; in some lives SIGKILL follows at once
    a call   it kills itself before, after or halfway through some call of fsync, replace, link, unlink or a raw write,
             most of them within a save: of a checkpoint, of the best ones, in their rotation

A run that has come to its end is compared with the uninterrupted one, and the next one begins in a new folder. Checked:

    after each life  The newest checkpoint is whole, as are the best ones, and the life began at the newest one of the
                     life before. Of the optimizer steps done since the newest one, no more than --save-every-steps
                     ended while no save was being written: a save begins when it is due and the one before is on disk.
                     Leaving with code 75 loses none. Loader workers go with their parent.
    after each run   Weights, average, optimizer, schedule and counters of the last checkpoint, and the best
                     checkpoints, are the same bit for bit; so are log.txt, TensorBoard's points as its own reader
                     has them, and summary.json, but for times.
"""

import argparse
import collections
import hashlib
import itertools
import json
import logging
import multiprocessing
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.sharedctypes import RawArray, RawValue
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy and torch start threads, which a fork would lose
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402

import main  # noqa: E402
from training import checkpoint, checkpoint_files, run_folder  # noqa: E402
from training.stopping import RESUMABLE  # noqa: E402

SAVE_EVERY = 3  # optimizer steps, 45 of which are an epoch: saves fall on its last one, too
FLAGS = (
    *("--data-set", "DIGITS", "--device", "cpu", "--input-size", "32", "--batch-size", "14", "--accum-steps", "2"),
    *("--model", "deit_tiny_patch16_224_diverse", "--patch-size", "8"),
    *("--model-kwargs", "depth=2", "embed_dim=24", "num_heads=3"),
    *("--preset", "released", "--drop", "0.1", "--drop-path", "0.2", "--reprob", "0.5", "--model-ema-decay", "0.9"),
    *("--lr", "2e-3", "--unscale-lr", "--warmup-epochs", "1", "--log-interval", "2", "--resume", "auto"),
    *("--save-every-steps", str(SAVE_EVERY), "--save-every-minutes", "0", "--keep-checkpoints", "3"),
)
LONGEST_LIFE = 25  # optimizer steps until a signal, on average half as many
CALLS = {"fsync": 12, "replace": 18, "link": 6, "unlink": 6, "write": 4000}  # those of five or six saves
CALLS_FOR_BEST = {"fsync": 2, "replace": 2, "write": 390}  # those of the two best checkpoints of an epoch
ENDS = (*["SIGKILL"] * 4, "SIGTERM", *CALLS)
WORKERS_LEAVE = 20  # seconds; a loader worker looks for its parent every five
HANGS = 300  # seconds
TIMES = ("images_per_s", "data_wait", "training_seconds")  # endings of the names of what a clock tells


@dataclass
class Plan:
    """How a life is to end; by default at the end of its run.

    Attributes:
        signal: SIGKILL or SIGTERM, sent by the parent; None for none.
        in_startup: when, as a share of the time that a life takes to its first step; None for later.
        steps: when, in the time of a step, from the first one on.
        then_kill: seconds from SIGTERM to SIGKILL; None for none.
        call, number, where: what the life kills itself at, such as the 3rd "link", and "before" it, "after" it or
            "half" way through it; an empty `call` for nothing.
        best: whether only calls that write best checkpoints count.
        workers: of its loader.
    """

    signal: int | None = None
    in_startup: float | None = None
    steps: float = 0.0
    then_kill: float | None = None
    call: str = ""
    number: int = 0
    where: str = ""
    best: bool = False
    workers: int = 0


def plans(draw: random.Random) -> Iterator[Plan]:
    """Lives that are to be killed; any ten from a multiple of ten on have every kind of end."""
    while True:
        for end in draw.sample(ENDS, len(ENDS)):
            (workers,) = draw.choices([0, 1, 2], [75, 15, 10])
            if end in CALLS:
                best = end in CALLS_FOR_BEST and draw.random() < 0.4
                number = draw.randint(1, (CALLS_FOR_BEST if best else CALLS)[end])
                where = draw.choice(["before", "half", "after"] if end == "write" else ["before", "after"])
                yield Plan(call=end, number=number, where=where, best=best, workers=workers)
            else:
                in_startup = draw.random() if draw.random() < 0.1 else None
                then_kill = draw.uniform(0, 0.15) if end == "SIGTERM" and draw.random() < 0.4 else None
                steps = draw.uniform(0, LONGEST_LIFE)
                yield Plan(signal.Signals[end], in_startup, steps, then_kill, workers=workers)


class Progress:
    """What a life tells its parent, in memory that both have.

    Attributes:
        steps_per_epoch: 0 until it is known.
    """

    def __init__(self, most_steps: int = 10**5):
        self.steps_per_epoch = 0
        self._first, self._done = RawValue("q"), RawValue("q")
        self._writing = RawArray("b", most_steps)

    def begin(self, done: int):
        """Before a life that starts after `done` optimizer steps of the run."""
        self._first.value, self._done.value = 0, done

    def step(self, epoch: int, step: int, writing: bool):
        """In a life, after an optimizer step, the `step`-th of an epoch: whether a save is being written."""
        done = epoch * self.steps_per_epoch + step
        self._writing[done] = writing
        self._first.value = self._first.value or done
        self._done.value = done  # last, since the process may be killed between two lines

    @property
    def done(self) -> int:
        """Optimizer steps of the run."""
        return self._done.value

    @property
    def first(self) -> int:
        """The first step of the life, counted from 1 in the run; 0 before there is one."""
        return self._first.value

    def idle_since(self, step: int) -> int:
        """Steps after `step` that ended while no save was being written."""
        return sum(not self._writing[i] for i in range(step + 1, self.done + 1))


def live(folder: Path, epochs: int, plan: Plan, progress: Progress):
    """One life, in a process of its own."""
    with open(output_of(folder), "ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    print(f"--- process {os.getpid()}: {plan}", flush=True)
    after_step = checkpoint.Saver.after_step

    def told(saver):
        progress.step(saver.state.epoch, saver.state.step, saver.writer.busy)
        after_step(saver)

    checkpoint.Saver.after_step = told
    if plan.call:
        arrange_end(plan)
    own = ["--epochs", epochs, "--num-workers", plan.workers, "--output-dir", folder]
    main.command_line([*FLAGS, *map(str, own)])


def arrange_end(plan: Plan):
    """Have this process kill itself at a call, as planned."""
    counting, calls = not plan.best, 0
    write = checkpoint_files.write

    def watched_write(state, path, keep):
        nonlocal counting
        counting = not plan.best or path.name in checkpoint.BEST.values()
        write(state, path, keep)
        counting = not plan.best

    checkpoint_files.write = watched_write
    owner, name = (checkpoint_files, "_write_all") if plan.call == "write" else (os, plan.call)
    call = getattr(owner, name)

    def counted(*args, **kwargs):
        nonlocal calls
        calls += counting
        if not counting or calls != plan.number:
            return call(*args, **kwargs)
        if plan.where == "half":
            file, data = args
            call(file, memoryview(data)[: len(data) // 2])
        elif plan.where == "after":
            call(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, counted)


class Lives:
    """Starts lives and ends them.

    Attributes:
        startup: seconds from the last life's start to its first step.
        step_time: seconds of an optimizer step, all else of a run included.
    """

    def __init__(self, progress: Progress, epochs: int):
        self.progress, self.epochs = progress, epochs
        self.startup = self.step_time = 0.0
        self._families: list[tuple[float, int]] = []

    def live(self, folder: Path, plan: Plan) -> int:
        """Live one; returns its exit code, negative for a signal.

        Raises:
            SystemExit: it hangs.
        """
        assert threading.active_count() == torch.get_num_threads() == 1  # a fork takes no other thread along
        sys.stdout.flush()
        family, inherited = os.pipe()  # it ends when the life and all its loader workers have
        arguments = (folder, self.epochs, plan, self.progress)
        life = multiprocessing.get_context("fork").Process(target=live, args=arguments)
        begun = time.monotonic()
        life.start()
        os.close(inherited)
        try:
            self._end(life, plan, begun)
        finally:
            life.kill()
            self._families.append((time.monotonic(), family))
        return life.exitcode

    def _end(self, life: multiprocessing.Process, plan: Plan, begun: float):
        first_step = signalled = None
        while life.exitcode is None:
            now = time.monotonic()
            if first_step is None and self.progress.first:
                first_step, self.startup = now, now - begun
            if plan.signal and signalled is None:
                is_due = first_step is not None and now >= first_step + plan.steps * self.step_time
                if is_due or (plan.in_startup is not None and now >= begun + plan.in_startup * self.startup):
                    os.kill(life.pid, plan.signal)
                    signalled = now
            if signalled is not None and plan.then_kill is not None and now >= signalled + plan.then_kill:
                life.kill()
            if now > begun + HANGS:
                raise SystemExit(f"error: a life has not ended after {HANGS} s: {plan}")
            time.sleep(0.002)

    def lingering(self, timeout: float) -> int:
        """Lives that ended longer than `WORKERS_LEAVE` ago and have left a worker, after a wait for the others."""
        late, waiting = 0, []
        for ended, family in self._families:
            due = ended + WORKERS_LEAVE - time.monotonic()
            has_left, _, _ = select.select([family], [], [], min(max(due, 0), timeout))
            if not has_left and due > timeout:
                waiting.append((ended, family))
                continue
            late += not has_left
            os.close(family)
        self._families = waiting
        return late


def output_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.txt")


def steps_saved(folder: Path, steps_per_epoch: int) -> int:
    """Optimizer steps of the run in the newest checkpoint, as the next life will find it.

    Raises:
        checkpoint_files.DamagedFile: that one, or a best one, is not whole.
    """
    candidates = checkpoint_files.candidates(folder / checkpoint.LAST)
    best = [folder / name for name in checkpoint.BEST.values() if (folder / name).exists()]
    for path in candidates[:1] + best:
        checkpoint_files.verify(path)
    if not candidates:
        return 0
    whole = torch.load(candidates[0], weights_only=True)
    return (whole["epoch"] + 1) * steps_per_epoch + whole["step"]


def outcome(folder: Path) -> dict:
    """What a run has left, without times, by where it is found."""
    last = torch.load(folder / checkpoint.LAST, weights_only=True)
    best = [torch.load(folder / name, weights_only=True) for name in checkpoint.BEST.values()]
    parts = {name: value for name, value in last.items() if name not in ("args", "seconds")}
    parts["best checkpoints"] = [{name: value for name, value in one.items() if name != "args"} for one in best]
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    scalars = (name for name in events.Tags()["scalars"] if not name.endswith(TIMES))
    return {
        "checkpoint": {name: digest(value) for name, value in parts.items()},
        "log.txt": [untimed(json.loads(line)) for line in (folder / "log.txt").read_text().splitlines()],
        "TensorBoard": {name: [(event.step, event.value) for event in events.Scalars(name)] for name in scalars},
        "summary.json": untimed(json.loads((folder / "summary.json").read_text())),
        "other files": sorted(path.name for path in folder.glob("*") if path.suffix in (".tmp", ".damaged")),
    }


def untimed(record: dict) -> dict:
    return {name: value for name, value in record.items() if not name.endswith(TIMES)}


def digest(tree) -> str:
    """Of nested dicts and lists of tensors and numbers, their order and types included."""
    state = hashlib.sha256()
    if isinstance(tree, torch.Tensor):
        state.update(f"{tree.dtype} {tuple(tree.shape)}".encode() + tree.contiguous().numpy().tobytes())
    elif isinstance(tree, dict):
        state.update(repr([(name, digest(value)) for name, value in tree.items()]).encode())
    elif isinstance(tree, list | tuple):
        state.update(repr([digest(value) for value in tree]).encode())
    else:
        state.update(repr(tree).encode())
    return state.hexdigest()


def difference(first, second, name: str = "") -> str:
    """The first place where two nested values differ, in a few words; empty where they are the same."""
    if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        pairs = [(f"{name} {key}", first[key], second[key]) for key in first]
    elif isinstance(first, list) and isinstance(second, list):
        pairs = [(f"{name}[{i}]", *two) for i, two in enumerate(itertools.zip_longest(first, second))]
    else:
        return "" if first == second or first != first != second != second else f"{name}: {first} is not {second}"
    return next(filter(None, (difference(one, other, place) for place, one, other in pairs)), "")


class Stress:
    """Runs that are killed, one after the other, and what was found.

    Attributes:
        kills: how many of each kind.
        violations: one line each.
        most_lost, most_idle: optimizer steps that a kill has cost, and those of them done while no save was written.
    """

    def __init__(self, folder: Path, epochs: int):
        self.folder, self.progress = folder, Progress()
        self.lives = Lives(self.progress, epochs)
        self.kills = collections.Counter()
        self.violations: list[str] = []
        self.num_lives = self.num_runs = self.num_wrong = self.most_lost = self.most_idle = 0
        self.begun = time.monotonic()
        self.reference = self._uninterrupted(epochs)

    def _uninterrupted(self, epochs: int) -> dict:
        folder = self.folder / "uninterrupted"
        if code := self.lives.live(folder, Plan()):
            raise SystemExit(f"error: the uninterrupted run ended with {code}, see {output_of(folder)}")
        self.progress.steps_per_epoch = self.progress.done
        self.lives.step_time = (time.monotonic() - self.begun) / (epochs * self.progress.done)
        return outcome(folder)

    def run(self, plans: Iterator[Plan], num_kills: int):
        """One run from its start to its end, with kills as long as there are fewer than `num_kills`."""
        self.num_runs += 1
        folder, saved, code = self.folder / f"run{self.num_runs}", 0, None
        while code != 0:
            plan = next(plans) if self.kills.total() < num_kills else Plan()
            self.progress.begin(saved)
            code = self.lives.live(folder, plan)
            if code not in (0, -signal.SIGKILL, -signal.SIGTERM, RESUMABLE):
                raise SystemExit(f"error: a life ended with {code}, see {output_of(folder)}")
            self.num_lives += 1
            if code:
                self.kills[plan.call or signal.Signals(plan.signal).name] += 1
            saved = self._check_life(folder, plan, code, saved)
            if self.num_lives % 10 == 0:
                print(f"{self.num_lives:4} lives: {self}", flush=True)
        self._check_run(folder)

    def _check_life(self, folder: Path, plan: Plan, code: int, saved: int) -> int:
        """Steps that are saved now."""
        before, done = saved, self.progress.done
        try:
            saved = steps_saved(folder, self.progress.steps_per_epoch)
        except checkpoint_files.DamagedFile as error:
            raise SystemExit(f"error: {folder} holds a damaged checkpoint: {error}; {plan}") from None
        lost, idle = done - saved, self.progress.idle_since(saved)
        self.most_lost, self.most_idle = max(self.most_lost, lost), max(self.most_idle, idle)
        where = f"{folder.name} at step {done}, {plan}"
        if self.progress.first not in (0, before + 1):
            self._violation(f"{where}: began with step {self.progress.first}, but {before} were saved")
        if lost < 0:
            self._violation(f"{where}: {saved} steps are saved, but only {done} were done")
        if idle > SAVE_EVERY:
            self._violation(f"{where}: {lost} steps lost, {idle} of them while no save was being written")
        if code == RESUMABLE and lost:
            self._violation(f"{where}: {lost} steps lost in an orderly stop")
        if code == -signal.SIGTERM and self.progress.first and not (folder / run_folder.SUMMARY).exists():
            self._violation(f"{where}: SIGTERM ended a life that should have saved")
        if late := self.lives.lingering(0):
            self._violation(f"{late} lives have left a loader worker for longer than {WORKERS_LEAVE} s")
        return saved

    def _check_run(self, folder: Path):
        found = outcome(folder)
        self.num_wrong += found["checkpoint"] != self.reference["checkpoint"]
        for source, expected in self.reference.items():
            if told := difference(found[source], expected):
                self._violation(f"{folder.name}, {source}:{told}")

    def finish(self):
        """Wait for the last loader workers."""
        if late := self.lives.lingering(WORKERS_LEAVE):
            self._violation(f"{late} lives have left a loader worker for longer than {WORKERS_LEAVE} s")

    def _violation(self, line: str):
        self.violations.append(line)
        print(f"VIOLATION: {line}", flush=True)

    def __str__(self):
        kinds = ", ".join(f"{name} {count}" for name, count in sorted(self.kills.items()))
        return (
            f"{self.kills.total()} kills ({kinds}) in {self.num_runs} runs; {self.num_wrong} wrong digests, "
            f"{len(self.violations)} violations, most steps lost {self.most_lost}, "
            f"{self.most_idle} of them with no save under way; {time.monotonic() - self.begun:.0f} s"
        )


def stress():
    """Kill as often as the command line says; a violation ends in one line and a non-zero exit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="lives that do not come to their end")
    parser.add_argument("--seed", type=int, default=0, help="of how they end; the moments also depend on the machine")
    parser.add_argument("--epochs", type=int, default=6, help="of each run")
    parser.add_argument("--keep", type=Path, default=None, metavar="DIR", help="a new folder for the runs; None = none")
    args = parser.parse_args()
    folder = args.keep or Path(tempfile.mkdtemp(prefix="stress-"))
    folder.mkdir(parents=True, exist_ok=args.keep is None)
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of every life that has dropped rows
    test = Stress(folder, args.epochs)
    deaths = plans(random.Random(args.seed))
    while test.kills.total() < args.kills:
        test.run(deaths, args.kills)
    test.finish()
    print(f"total: {test}")
    if test.violations:
        raise SystemExit(f"error: {len(test.violations)} violations; the runs are in {folder}")
    if args.keep is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    stress()
