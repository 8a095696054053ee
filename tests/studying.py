"""Studies of tiny runs for several test files: their files, their plans, and runs in forked processes."""

import contextlib
import os
from pathlib import Path
from types import SimpleNamespace

import yaml
from forking import FORK
from helpers import run_main

from studies.plan import plan_runs
from studies.study_file import read_study
from utils import run_command

TINY_FLAGS = {
    "data_set": "DIGITS", "device": "cpu", "num_workers": 0, "tensorboard": False, "input_size": 32, "patch_size": 8,
    "epochs": 2, "batch_size": 16, "model": "deit_tiny_patch16_224_diverse",
    "model_kwargs": {"depth": 2, "embed_dim": 24, "num_heads": 3},
}  # fmt: skip
"""`helpers.TINY` as flags of a study, with two epochs."""

ROWS = {"plain": {}, "mixing": {"mixing_coef": 1}}


def write_study(folder: Path, name="study.yaml", **content) -> Path:
    """A study file in a folder, by default of `ROWS` with `TINY_FLAGS`; a key that is None is left out."""
    content = {"flags": TINY_FLAGS, "rows": ROWS} | content
    path = folder / name
    text = yaml.safe_dump({key: value for key, value in content.items() if value is not None}, sort_keys=False)
    path.write_text(text)
    return path


def tiny_runs(folder: Path, *user_flags, **content):
    """The planned runs of `write_study` in folder/out."""
    return plan_runs(read_study(write_study(folder, **content)), folder / "out", user_flags)


class ForkedRun:
    """main.py in a forked process, with the methods of `subprocess.Popen` that a study calls.

    It spares the seconds that a new process takes to import torch.
    """

    def __init__(self, words: list[str], log: Path):
        self.process = FORK.Process(target=self._train, args=(words, log))
        self.process.start()

    @staticmethod
    def _train(words: list[str], log: Path):
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        run_command(lambda: run_main(*words))

    def poll(self) -> int | None:
        return self.process.exitcode

    def terminate(self):
        self.process.terminate()


@contextlib.contextmanager
def forked_runs():
    """A `start` for `Jobs` whose processes end with the block, and the runs that it has started, in order."""
    started = []

    def start(run, command, log):
        (main,) = [number for number, word in enumerate(command) if word.endswith("/main.py")]
        forked = ForkedRun(command[main + 1 :], log or run.folder.with_suffix(".txt"))
        started.append(SimpleNamespace(name=run.name, process=forked.process))
        return forked

    try:
        yield start, started
    finally:
        for of in started:
            of.process.kill()
            of.process.join()
