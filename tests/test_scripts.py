"""The shell scripts: the launchers start the paper's recipe, the quickstart parses; the package installs alone."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from helpers import REPOSITORY, TINY, run_main

import diversity
from training import arguments

LAUNCHERS = {
    "run_deit_tiny_diverse.sh": "deit_tiny_patch16_224_diverse",
    "run_deit_small_diverse.sh": "deit_small_patch16_224_diverse",
    "run_deit_small_24layer_diverse.sh": "deit_small_layer24_patch16_224_diverse",
    "run_deit_base_diverse.sh": "deit_base_patch16_224_diverse",
    "run_deit_small_baseline.sh": "deit_small_patch16_224",
}
PAPER = {
    "mixing": 1, "emb_cos_within": 0.5, "emb_contrast_cross": 0.5, "attn_cos_within": 1e-4, "weight_mha_cond_orth": 5e-4
}  # fmt: skip


def launch(script, *flags, tmp_path, **environment):
    """The command that a launcher starts, run in a copy whose Python prints its arguments."""
    copy = tmp_path / "checkout"
    (copy / ".venv" / "bin").mkdir(parents=True)
    for folder in ("script", "recipes"):
        (copy / folder).symlink_to(REPOSITORY / folder)
    python = copy / ".venv" / "bin" / "python"
    count_gpus = 'if [ "$1" = -c ]; then echo 2; exit; fi'
    python.write_text(f'#!/bin/sh\n{count_gpus}\nfor word in "$@"; do printf "%s\\n" "$word"; done\n')
    python.chmod(0o755)
    env = {**os.environ, **environment}
    command = ["bash", copy / "script" / script, *flags]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("path", sorted((REPOSITORY / "script").glob("*.s*")), ids=lambda path: path.name)
def test_scripts_are_valid_shell(path):
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env bash\n# ")
    assert subprocess.run(["bash", "-n", path], capture_output=True).returncode == 0
    assert path.suffix == ".sbatch" or os.access(path, os.X_OK)


@pytest.mark.parametrize("path", sorted((REPOSITORY / "script").glob("*.sh")), ids=lambda path: path.name)
def test_help_of_a_script_is_its_head_comment(path):
    head = path.read_text().split("\n", 1)[1]
    head = re.match(r"(?:#.*\n)+", head)[0]
    result = subprocess.run(["bash", path, "--help"], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == re.sub(r"^# ?", "", head, flags=re.MULTILINE)


@pytest.mark.parametrize(("script", "model"), LAUNCHERS.items())
def test_launchers_start_the_papers_recipe(script, model, tmp_path):
    words = launch(script, "/data", "--seed", "3", "--batch-size", "64", tmp_path=tmp_path).stdout.split("\n")[:-1]
    assert words[:4] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    assert words[4].endswith("/main.py")
    args = arguments.parse_args(words[5:])
    assert (args.model, args.data_path, args.output_dir) == (model, "/data", f"runs/{model}")
    assert (args.epochs, args.lr, args.seed, args.batch_size) == (300, 5e-4, 3, 64)
    paper = PAPER if model.endswith("_diverse") else {}
    assert arguments.coefficients(args) == {name: paper.get(name, 0) for name in ("mixing", *diversity.REGULARIZERS)}


def test_ngpu_overrides_the_number_of_processes(tmp_path):
    result = launch("run_deit_tiny_diverse.sh", "/data", tmp_path=tmp_path, NGPU="5")
    assert "--nproc_per_node=5" in result.stdout


def test_one_process_starts_without_torchrun(tmp_path):
    words = launch("run_deit_tiny_diverse.sh", "/data", tmp_path=tmp_path, NGPU="1").stdout.splitlines()
    assert words[0].endswith("/main.py") and words[3:5] == ["--model", "deit_tiny_patch16_224_diverse"]


def test_a_launcher_without_data_prints_its_usage(tmp_path):
    result = launch("run_deit_tiny_diverse.sh", tmp_path=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("usage:")


def test_a_run_with_a_launchers_flags(tmp_path, few_digits):
    words = launch(
        "run_deit_tiny_diverse.sh", "none", *TINY, "--output_dir", tmp_path / "run", tmp_path=tmp_path
    ).stdout
    run_main(*words.splitlines()[5:], draw_curves=True)
    assert_complete(tmp_path / "run")


def assert_complete(run):
    """A run of one epoch with the paper's terms has what docs/run-folder.md lists."""
    record = json.loads((run / "log.txt").read_text())
    assert {f"train_{name}" for name in PAPER} <= record.keys()
    page = (REPOSITORY / "docs" / "run-folder.md").read_text()
    rows = re.compile(r"^\| (`.*?`) \|(?! with `--)", flags=re.MULTILINE)  # what no further flag asks for
    before, _, after = page.partition("## log.txt")
    files, keys = rows.findall(before), rows.findall(after.partition("\n## ")[0])
    written = {path.name for path in run.iterdir()}
    absent = {"checkpoint.1.pth", "events.out.tfevents.*", "changes.jsonl"}  # one epoch, unchanged, --no-tensorboard
    absent |= {"skipped_steps.txt", "console.log", "analyzed.json"}  # no step was skipped; no study
    assert set(re.findall("`(.*?)`", "".join(files))) <= written | absent
    assert {key for key in re.findall(r"`(\w+)`", "".join(keys))} <= record.keys()


@pytest.mark.slow
def test_a_launcher_trains_on_the_cpu(tmp_path):
    flags = [*TINY, "--output_dir", tmp_path / "run"]
    result = subprocess.run(
        ["bash", REPOSITORY / "script" / "run_deit_tiny_diverse.sh", "none", *map(str, flags)],
        env={**os.environ, "NGPU": "1", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert_complete(tmp_path / "run")


def test_the_paper_values_in_the_registry_are_the_launchers():
    wired = {name: term.coef for name, term in diversity.REGULARIZERS.items() if term.coef}
    assert wired == {name: coef for name, coef in PAPER.items() if name != "mixing"}


@pytest.mark.parametrize(
    ("words", "passed"),
    [
        ([], []),
        (["--slow"], ["-m", "slow or not slow"]),
        (["tests/diversity", "-k", "cos or so"], ["tests/diversity", "-k", "cos or so"]),
    ],
)
def test_the_test_script_runs_lint_and_pytest(words, passed, tmp_path):
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    (tmp_path / "script").mkdir()
    for name in ("setup.sh", "test.sh"):
        shutil.copy(REPOSITORY / "script" / name, tmp_path / "script")
    for name in ("requirements.txt", "constraints.txt"):
        shutil.copy(REPOSITORY / name, tmp_path)
    installed = [(REPOSITORY / name).read_text() for name in ("requirements.txt", "constraints.txt")]
    (programs.parent / "installed").write_text("".join(installed))
    for name in ("python", "ruff"):
        (programs / name).write_text(f'#!/bin/sh\nprintf "%s\\n" {name} "$@" ""\n')
        (programs / name).chmod(0o755)
    result = subprocess.run(
        ["bash", tmp_path / "script" / "test.sh", *words], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    *lint, pytest_words = [command.splitlines() for command in result.stdout.split("\n\n") if command]
    assert lint == [["ruff", "check", "."], ["ruff", "format", "--check", "--quiet", "."]]
    assert pytest_words == ["python", "-m", "pytest", "--durations=10", "-n", "2", "--dist", "loadfile", *passed]


def test_quickstart_parses():
    text = (REPOSITORY / "script" / "quickstart.sh").read_text().replace("\\\n", " ")
    (command,) = re.findall(r"^\.venv/bin/python main\.py (.*)$", text, flags=re.MULTILINE)
    args = arguments.parse_args(shlex.split(command.replace('"$run"', "runs/x").replace('"$@"', "")))
    assert args.data_set == "DIGITS"
    assert all(coef > 0 for name, coef in arguments.coefficients(args).items() if name in PAPER)


def test_the_package_installs_alone(tmp_path):
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    copy = tmp_path / "source"
    for name in ("pyproject.toml", "README.md", "LICENSE", "diversity"):
        copy.mkdir(exist_ok=True)
        subprocess.run(["cp", "-r", REPOSITORY / name, copy / name], check=True)
    subprocess.run([*command, "--target", tmp_path / "site", copy], check=True, timeout=120)
    code = "import diversity, sys; print(diversity.__file__, 'utils' in sys.modules, 'datasets' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert result.stdout.split() == [str(tmp_path / "site" / "diversity" / "__init__.py"), "False", "False"]
    assert (tmp_path / "site" / "diversity").is_dir()
    assert not (tmp_path / "site" / "models").exists()
