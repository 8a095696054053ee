"""The commands that are left of a run, and how its processes are started."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from studies.plan import PlannedRun
from studies.processes import SAVE_SECONDS
from studies.run_state import State, state_of
from utils import cpu_count

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Settings:
    """How the runs of a study are started.

    Attributes:
        analyze: words for analyze.py on each finished run; None for no analysis.
        keep_weights: whether checkpoints stay when a run is finished and analysed.
        num_jobs: runs side by side.
        num_processes: of each run; more than one are started by torchrun.
        budget_seconds: nothing starts that cannot end in this time, and what runs then is stopped; None for no limit.
    """

    analyze: list[str] | None = None
    keep_weights: bool = True
    num_jobs: int = 1
    num_processes: int = 1
    budget_seconds: float | None = None

    def state(self, run: PlannedRun) -> State:
        """What is left of a run."""
        return state_of(run, self.analyze)

    def commands(self, run: PlannedRun) -> dict[str, list[str]]:
        """{"train" and "analyze", or what is left of them: the command}."""
        state = self.state(run)
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.num_processes}"]
        commands = {}
        if state in (State.NEW, State.INTERRUPTED):
            launch = torchrun if self.num_processes > 1 else []
            commands["train"] = [sys.executable, *launch, str(ROOT / "main.py"), *run.words]
        if state != State.FINISHED and self.analyze is not None:
            words = [str(run.folder), *self.analyze, "--output-dir", str(run.folder), "--device", run.args.device]
            commands["analyze"] = [sys.executable, str(ROOT / "analyze.py"), *words]
        return commands

    def environment(self, run: PlannedRun) -> dict[str, str]:
        """What a run's processes get besides the environment of this one.

        OMP_NUM_THREADS is shared among the jobs. Where it is not set, a process has one thread on a CPU, and all
        processes together have as many as there are cores on a GPU, where threads prepare the batches.
        """
        given = os.environ.get("OMP_NUM_THREADS", "")
        if given.isdecimal():
            threads = int(given) // self.num_jobs
        elif run.args.device != "cpu" and torch.cuda.is_available():
            threads = cpu_count() // (self.num_jobs * self.num_processes)
        else:
            threads = 1
        environment = {"OMP_NUM_THREADS": str(max(1, threads))}
        if self.num_processes > 1:
            environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(SAVE_SECONDS)
        return environment
