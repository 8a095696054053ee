"""The ablation scripts: the runs they start, the terms of each, which runs they skip and resume, and interruptions."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import yaml
from helpers import REPOSITORY, TINY, log_of, run_main

from diversity import PRESETS, REGULARIZERS
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
    (folder / "script").symlink_to(REPOSITORY / "script")
    (folder / "main.py").symlink_to(REPOSITORY / "main.py")
    return Checkout(folder=folder)


@pytest.fixture
def checkout(tmp_path):
    return make_checkout(tmp_path)


@pytest.fixture(scope="session")
def all_runs(tmp_path_factory):
    """{script: {run folder: flags}} of every configuration, from one dry run of each script."""
    checkout = make_checkout(tmp_path_factory.mktemp("ablation"))
    return {script: checkout.dry_run(script) for script in SCRIPTS}


def differing(one, other):
    return {name for name, value in vars(one).items() if value != getattr(other, name)}


@pytest.mark.parametrize("path", sorted((REPOSITORY / "script").glob("*.s*")), ids=lambda path: path.name)
def test_scripts_are_valid_shell(path):
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env bash\n# ")
    assert subprocess.run(["bash", "-n", path], capture_output=True).returncode == 0
    assert path.suffix == ".sbatch" or os.access(path, os.X_OK)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_configuration_has_its_terms(script, all_runs):
    runs = all_runs[script]
    assert list(runs) == [f"out/{config}/seed0" for config in GRID]
    released = PRESETS["released"].coefs
    for args, terms in zip(runs.values(), GRID.values(), strict=True):
        expected = {name: released[name] if name in terms else 0 for name in ("mixing", *REGULARIZERS)}
        assert arguments.coefficients(args) == expected
        assert arguments.without_effect(args) == []
        assert args.preset is None  # args.yaml names no preset, since the run does not train one
    assert len({tuple(arguments.coefficients(args).items()) for args in runs.values()}) == len(GRID)
    assert not any(differing(args, runs["out/all/seed0"]) - {f"{term}_coef" for term in FIVE} - {"output_dir"}
                   for args in runs.values())  # fmt: skip
    assert runs["out/all/seed0"].seed == 0


def test_deit_small_has_the_recipe_of_the_paper(checkout, all_runs):
    args = all_runs["ablate_deit_small.sh"]["out/all/seed0"]
    checkout.python(PRINT)
    paper = checkout.flags_of("script/train_paper.sh deit_small_patch16_224_diverse /data")
    assert differing(args, paper) == {"preset", "output_dir", "redundancy_every"}


def test_digits_has_the_recipe_of_the_quickstart(all_runs):
    args = all_runs["ablate_digits.sh"]["out/all/seed0"]
    text = (REPOSITORY / "script" / "quickstart.sh").read_text().replace("\\\n", " ")
    (command,) = re.findall(r"^\.venv/bin/python main\.py (.*)$", text, flags=re.MULTILINE)
    quickstart = arguments.parse_args(shlex.split(command.replace('"$@"', "")))
    assert differing(args, quickstart) == {"preset", "output_dir", "redundancy_every", "resume"}


def test_cifar_has_a_recipe_for_small_images(all_runs):
    args = all_runs["ablate_cifar.sh"]["out/all/seed0"]
    assert (args.data_set, args.data_path, args.train_split, args.val_split) == ("IMNET", "/data", "train", "test")
    assert (args.model, args.model_kwargs["embed_dim"], args.model_kwargs["depth"], args.model_kwargs["num_heads"]) == (
        "deit_tiny_patch16_224_diverse", 96, 6, 3
    )  # fmt: skip
    assert (args.input_size, args.patch_size, args.batch_size) == (32, 4, 128)
    assert (args.epochs, args.warmup_epochs, args.lr, args.unscale_lr) == (30, 3, 1e-3, True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_seeds_configurations_and_flags_are_the_users(script, checkout):
    runs = checkout.dry_run(script, "--epochs", "7", "--min-lr", "0", out="my runs", CONFIGS="all plain", SEEDS="3 0")
    assert list(runs) == [f"my runs/{config}/seed{seed}" for seed in (3, 0) for config in ("all", "plain")]
    assert [args.seed for args in runs.values()] == [3, 3, 0, 0]
    assert {(args.epochs, args.min_lr) for args in runs.values()} == {(7, 0)}


def test_one_process_per_gpu_or_one_process_of_one_thread(checkout):
    def command(script, **variables):
        checkout.python('echo "threads $OMP_NUM_THREADS"\n' + PRINT)
        line = checkout.run(f"script/{script}", *SCRIPTS[script], "out", DRY_RUN="1", CONFIGS="all", **variables).out
        return checkout.run("-c", line).out.splitlines()

    assert command("ablate_deit_small.sh")[4] == "--nproc_per_node=2"
    assert command("ablate_deit_small.sh", NGPU="5")[4] == "--nproc_per_node=5"
    for script in ("ablate_digits.sh", "ablate_cifar.sh"):
        assert command(script)[0] == "threads 1"
        words = command(script, OMP_NUM_THREADS="3")
        assert words[0] == "threads 3"
        assert words[1].endswith("/main.py")


def test_without_a_virtual_environment_python3_is_used(checkout):
    result = checkout.run("script/ablate_digits.sh", "out", DRY_RUN="1", CONFIGS="plain")
    assert shlex.split(result.out)[2] == "python3"


@pytest.mark.parametrize("names", [("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"), ("TASK", "TASKS")])
@pytest.mark.parametrize("tasks", [5, 30])
def test_array_tasks_divide_the_runs(names, tasks, checkout):
    def printed(**variables):
        result = checkout.run("script/ablate_digits.sh", "out", DRY_RUN="1", SEEDS="0 1", **variables)
        assert result.rc == 0
        return result.out.splitlines()

    every = printed()
    assert len(every) == 24
    for task in range(0, tasks, 1 if tasks == 5 else 7):
        assert printed(**dict(zip(names, (str(task), str(tasks)), strict=True))) == every[task::tasks]


def test_task_numbers_of_the_user_override_slurms(checkout):
    """To repeat only tasks 3 and 7 of an array of 12."""
    slurm = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "2"}
    (run,) = checkout.dry_run("ablate_digits.sh", TASKS="12", **slurm)
    assert run == f"out/{list(GRID)[7]}/seed0"


@pytest.mark.parametrize(
    ("task", "tasks"), [("7", "2"), ("2", "2"), ("0", "0"), ("-1", "2"), ("first", "2"), ("0", "x")]
)
def test_a_task_that_would_miss_runs_is_refused(task, tasks, checkout):
    checkout.python(TRAIN)
    result = checkout.run("script/ablate_digits.sh", "out", SLURM_ARRAY_TASK_ID=task, SLURM_ARRAY_TASK_COUNT=tasks)
    assert (result.rc, len(result.lines)) == (2, 1)
    assert result.lines[0].startswith(f"error: there is no task {task} of {tasks}")
    assert not (checkout.folder / "started").exists()


def test_the_sbatch_file_runs_the_imagenet_ablation(checkout, tmp_path):
    spooled = tmp_path / "slurm_script"
    spooled.write_text((REPOSITORY / "script" / "slurm_ablate.sbatch").read_text())
    slurm = {"SLURM_SUBMIT_DIR": str(checkout.folder), "SLURM_ARRAY_TASK_ID": "13", "SLURM_ARRAY_TASK_COUNT": "24"}
    user = {"DATA": "/image net", "OUT": "out", "SEEDS": "0 4"}
    checkout.python(PRINT)
    result = checkout.run(spooled, "--epochs", "9", DRY_RUN="1", **slurm, **user)
    args = checkout.flags_of(result.out)
    assert (args.output_dir, args.data_path, args.seed, args.epochs) == ("out/only_mixing/seed4", "/image net", 4, 9)
    (array,) = re.findall(r"^#SBATCH --array=0-(\d+)$", spooled.read_text(), flags=re.MULTILINE)
    assert int(array) == len(GRID) - 1
    result = checkout.run(spooled, **slurm, DATA="/data")
    assert (result.rc, result.lines[0][:6]) == (2, "usage:")


@pytest.mark.parametrize("script", [*SCRIPTS, "ablate.sh"])
def test_too_few_arguments(script, checkout):
    result = checkout.run(f"script/{script}", *SCRIPTS.get(script, ["out"]))
    assert (result.rc, len(result.lines)) == (2, 1)
    assert result.lines[0].startswith("usage:")


def test_the_earlier_name_of_the_variable_is_understood(checkout):
    runs = checkout.dry_run("ablate_digits.sh", CELLS="all plain")
    assert list(runs) == ["out/all/seed0", "out/plain/seed0"]


def test_an_unknown_configuration_is_named_before_anything_starts(checkout):
    checkout.python(TRAIN)
    result = checkout.run("script/ablate_digits.sh", "out", CONFIGS="plain only")
    assert (result.rc, len(result.lines)) == (2, 1)
    assert "no configuration only; there are plain only_mixing" in result.lines[0]
    assert not (checkout.folder / "started").exists()


@pytest.mark.parametrize(
    "flag", ["--seed=1", "--output-dir", "--output_dir", "--emb_cos_within_coef", "--attn-so-coef=1", "--preset",
             "--config", "--resume"]
)  # fmt: skip
def test_flags_that_the_script_sets_are_refused(flag, checkout):
    checkout.python(TRAIN)
    result = checkout.run("script/ablate_digits.sh", "out", flag, "1")
    assert (result.rc, len(result.lines)) == (2, 1)
    assert result.lines[0].startswith(f"error: {flag.split('=')[0]} ")
    assert not (checkout.folder / "started").exists()


@pytest.mark.parametrize("dry", ["", "1"])
def test_finished_runs_are_skipped_and_interrupted_ones_resume(dry, checkout):
    """Finished: skipped. With a checkpoint, if only the one before the last: resumed. With a log alone: started."""
    names = ("finished", "interrupted", "died")
    configs = ("plain", "only_mixing", "all")
    folders = {name: checkout.folder / "out" / config / "seed0" for name, config in zip(names, configs, strict=True)}
    for folder in folders.values():
        folder.mkdir(parents=True)
        (folder / "log.txt").write_text("old")
    (folders["finished"] / "summary.json").touch()
    (folders["interrupted"] / "checkpoint.1.pth").touch()
    checkout.python(PRINT)
    result = checkout.run("script/ablate_digits.sh", "out", CONFIGS=" ".join(configs), DRY_RUN=dry)
    assert result.rc == 0
    for line, state in zip(result.lines, ("finished, skipped", "interrupted, resumes", "starts"), strict=True):
        assert line.endswith(state)
    if dry:
        runs = [*map(checkout.flags_of, result.out.splitlines())]
    else:
        runs = [arguments.parse_args(part.splitlines()) for part in re.split(r".*/main\.py\n", result.out)[1:]]
    assert [(run.output_dir, run.resume) for run in runs] == [(f"out/{config}/seed0", "auto") for config in configs[1:]]


def test_a_failed_run_is_named_and_the_others_run(checkout):
    fail = 'case "$*" in *only_mixing/seed0* | *all/seed1*) exit 7;; esac'
    checkout.python(f"{fail}\n{TRAIN}")
    choice = {"CONFIGS": "plain only_mixing all", "SEEDS": "0 1"}
    result = checkout.run("script/ablate_digits.sh", "out", **choice)
    assert result.rc == 1
    assert result.lines[-1] == "failed: only_mixing/seed0 all/seed1"
    started = (checkout.folder / "started").read_text().splitlines()
    assert started == ["out/plain/seed0", "out/all/seed0", "out/plain/seed1", "out/only_mixing/seed1"]
    checkout.python(TRAIN)
    assert checkout.run("script/ablate_digits.sh", "out", **choice).rc == 0
    assert (checkout.folder / "started").read_text().splitlines()[4:] == ["out/only_mixing/seed0", "out/all/seed1"]


@pytest.mark.parametrize(("name", "status"), [("INT", 130), ("TERM", 143)])
def test_a_signal_ends_all_runs_and_not_only_one(name, status, checkout):
    checkout.python(f"trap '' {name}; echo begun; kill -{name} 0; exit 1")  # 0: the whole group, as from a terminal
    result = checkout.run("script/ablate_digits.sh", "out", CONFIGS="plain all")
    assert (result.rc, result.out) == (status, "begun\n")


def test_a_run_that_was_stopped_and_saved_stops_the_others(checkout):
    checkout.python("echo begun; exit 75")
    result = checkout.run("script/ablate_digits.sh", "out", CONFIGS="plain all")
    assert (result.rc, result.out) == (75, "begun\n")


def test_a_configuration_trains_with_its_terms(checkout, few_digits):
    """Real training with the flags of two commands, in this process."""
    checkout.python(PRINT)
    choice = {"CONFIGS": "plain level_embedding", "DRY_RUN": "1"}
    result = checkout.run("script/ablate_digits.sh", checkout.folder / "out", *TINY, "--aa", "none", **choice)
    for line, config in zip(result.out.splitlines(), choice["CONFIGS"].split(), strict=True):
        run_main(*checkout.words_of(line))
        assert_trained(checkout.folder / "out" / config / "seed0", config, epochs=1)


def assert_trained(folder, config, epochs):
    """A run has finished its epochs with exactly the terms of its configuration."""
    assert json.loads((folder / "summary.json").read_text())["epochs"] == epochs
    records = log_of(folder)
    assert [record["epoch"] for record in records] == list(range(epochs))
    assert {name for name in FIVE if f"train_{name}" in records[-1]} == set(GRID[config])
    kept = yaml.safe_load((folder / "args.yaml").read_text())
    assert {name for name in FIVE if kept[f"{name}_coef"]} == set(GRID[config])


@pytest.mark.slow
def test_a_killed_ablation_is_continued(checkout):
    """Real training: the second of two runs is killed after its first epoch, and the same command continues it."""
    checkout.python(REAL)
    configs, epochs = ("plain", "level_embedding"), 3
    command = ["script/ablate_digits.sh", "out", *TINY, "--epochs", str(epochs), "--aa", "none"]
    first, killed = folders = [checkout.folder / "out" / config / "seed0" for config in configs]
    process = checkout.start(command, CONFIGS=" ".join(configs))
    try:
        deadline = time.monotonic() + 100
        while not ((killed / "checkpoint.pth").exists() and (killed / "log.txt").exists()):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        end(process)
        process.communicate()
    assert (first / "summary.json").exists()
    assert not (killed / "summary.json").exists()

    finished = (first / "log.txt").stat().st_mtime_ns
    result = checkout.run(*command, CONFIGS=" ".join(configs))
    assert result.rc == 0, result.lines
    states = [line for line in result.lines if line.startswith("out/")]
    assert states == ["out/plain/seed0: finished, skipped", "out/level_embedding/seed0: interrupted, resumes"]
    assert (first / "log.txt").stat().st_mtime_ns == finished
    for folder, config in zip(folders, configs, strict=True):
        assert_trained(folder, config, epochs)
