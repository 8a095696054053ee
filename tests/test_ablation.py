"""The ablation scripts: the runs that they start, and the flags and terms of each."""

import re
import shlex

import pytest
from ablation_checkout import FIVE, GRID, PRINT, SCRIPTS, TRAIN, make_checkout
from helpers import REPOSITORY

from diversity import PRESETS, REGULARIZERS
from training import arguments


@pytest.fixture(scope="session")
def all_runs(tmp_path_factory):
    """{script: {run folder: flags}} of every configuration, from one dry run of each script."""
    checkout = make_checkout(tmp_path_factory.mktemp("ablation"))
    return {script: checkout.dry_run(script) for script in SCRIPTS}


def differing(one, other):
    return {name for name, value in vars(one).items() if value != getattr(other, name)}


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
    assert differing(args, paper) == {"config", "preset", "output_dir", "redundancy_every"}


def test_digits_has_the_recipe_of_the_quickstart(all_runs):
    args = all_runs["ablate_digits.sh"]["out/all/seed0"]
    text = (REPOSITORY / "script" / "quickstart.sh").read_text().replace("\\\n", " ")
    (command,) = re.findall(r"^\.venv/bin/python main\.py (.*)$", text, flags=re.MULTILINE)
    quickstart = arguments.parse_args(shlex.split(command.replace('"$@"', "")))
    assert differing(args, quickstart) == {"config", "preset", "output_dir", "redundancy_every", "resume"}


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
