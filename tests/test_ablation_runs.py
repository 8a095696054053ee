"""The ablation scripts: finished, interrupted, failed and stopped runs, and mistakes on the command line."""

import json
import re
import time

import pytest
import yaml
from ablation_checkout import FIVE, GRID, PRINT, REAL, SCRIPTS, TRAIN, end
from helpers import TINY, log_of, run_main

from training import arguments


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


def test_a_folder_of_another_recipe_is_refused(checkout, few_digits, capsys):
    """Real training and comparison with the flags of two commands, in this process."""
    checkout.python(PRINT)
    command = ("script/ablate_digits.sh", checkout.folder / "out", *TINY, "--aa", "none")
    (first,) = checkout.run(*command, CONFIGS="plain", DRY_RUN="1").out.splitlines()
    words = checkout.words_of(first)
    run_main(*words)
    folder = checkout.folder / "out" / "plain" / "seed0"
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}
    result = checkout.run(*command, "--lr", "1", CONFIGS="plain")
    assert result.lines == [f"{folder}: finished, compared with this command"]
    again = re.split(r".*/main\.py\n", result.out)[1].splitlines()
    with pytest.raises(SystemExit) as caught:
        run_main(*again)
    assert "was trained differently: --lr 0.002 -> 1.0" in str(caught.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"} == before
    run_main(*words)
    assert "has finished its 1 epochs" in capsys.readouterr().out
    checkout.python("exit 1")
    result = checkout.run(*command, CONFIGS="plain")
    assert (result.rc, result.lines[-1]) == (1, "failed: plain/seed0")


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
    assert states == [
        "out/plain/seed0: finished, compared with this command",
        "out/level_embedding/seed0: interrupted, resumes",
    ]
    assert (first / "log.txt").stat().st_mtime_ns == finished
    for folder, config in zip(folders, configs, strict=True):
        assert_trained(folder, config, epochs)
