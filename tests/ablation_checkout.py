"""The ablation scripts in a folder with another Python, and the grid of their configurations."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

from helpers import REPOSITORY

from training import arguments

SCRIPTS = {"ablate_deit_small.sh": ["/data"], "ablate_cifar.sh": ["/data"], "ablate_digits.sh": []}
"""{script: its arguments before OUT}"""


EMBEDDING = ["emb_cos_within", "emb_contrast_cross"]
LEVELS = {"mixing": ["mixing"], "embedding": EMBEDDING, "attention": ["attn_cos_within"],
          "weight": ["weight_mha_cond_orth"]}  # fmt: skip
FIVE = [term for terms in LEVELS.values() for term in terms]
GRID = {
    "plain": [],
    **{f"only_{term}": [term] for term in FIVE},
    "level_embedding": EMBEDDING,
    **{f"without_{level}": [term for term in FIVE if term not in terms] for level, terms in LEVELS.items()},
    "all": FIVE,
}


STEERING = re.compile("SLURM_|(CONFIGS|CELLS|SEEDS|TASKS?|DRY_RUN|NGPU|OMP_NUM_THREADS)$")

PRINT = 'for word in "$@"; do printf "%s\\n" "$word"; done'
TRAIN = 'for run in "$@"; do :; done; mkdir -p "$run"; echo "$run" >> started; touch "$run/summary.json"'  # OUT is last
REAL = f'exec {sys.executable} "$@"'


class Checkout(SimpleNamespace):
    """A folder with the scripts, in which they run. Its Python is a shell script that a test writes."""

    def python(self, text):
        path = self.folder / ".venv" / "bin" / "python"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'#!/bin/sh\nif [ "$1" = -c ]; then echo 2; exit; fi  # GPUs\n{text}\n')
        path.chmod(0o755)

    def start(self, command, **variables):
        """Start a process in a new process group; of the variables that the scripts read it has only the given ones."""
        env = {name: value for name, value in os.environ.items() if not STEERING.match(name)} | variables
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        # a suite that runs in the background of a shell ignores SIGINT, and so would bash
        command = ["env", "--default-signal=INT", "bash", *map(str, command)]
        return subprocess.Popen(command, cwd=self.folder, env=env, **options)

    def run(self, *command, **variables):
        process = self.start(command, **variables)
        try:
            out, err = process.communicate(timeout=120)
        finally:
            end(process)
        return SimpleNamespace(rc=process.returncode, out=out, lines=err.splitlines())

    def dry_run(self, script, *flags, out="out", **variables):
        """{run folder: flags} of the commands that a script prints. Each is then run with a Python that prints."""
        self.python(PRINT)
        result = self.run(f"script/{script}", *SCRIPTS.get(script, []), *([out] if out else []), *flags,
                          DRY_RUN="1", **variables)  # fmt: skip
        assert result.rc == 0, result.lines
        parsed = [self.flags_of(line) for line in result.out.splitlines()]
        assert len({args.output_dir for args in parsed}) == len(parsed)
        return {args.output_dir: args for args in parsed}

    def flags_of(self, line, **variables):
        return arguments.parse_args(self.words_of(line, **variables))

    def words_of(self, line, **variables):
        """The words that main.py gets from a command, which is run with a Python that prints."""
        words = self.run("-c", line, **variables).out.splitlines()
        (main,) = [number for number, word in enumerate(words) if word.endswith("/main.py")]
        return words[main + 1 :]


def end(process):
    """Kill what is left of a process group that `Checkout.start` started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def make_checkout(parent):
    folder = parent / "check out"
    folder.mkdir()
    for name in ("script", "recipes"):
        (folder / name).symlink_to(REPOSITORY / name)
    (folder / "main.py").symlink_to(REPOSITORY / "main.py")
    return Checkout(folder=folder)
