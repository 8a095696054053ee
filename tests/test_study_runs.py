"""Studies of real training: stopped and continued, side by side, with torchrun, and the report at the end."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from cutting import content, records
from helpers import REPOSITORY, log_of, run_main
from studying import forked_runs, tiny_runs, write_study

from studies.commands import Settings
from studies.jobs import Jobs
from studies.run_state import check_flags


def test_a_stopped_study_ends_like_one_that_was_not_stopped(tmp_path, few_digits):
    """Two rows x two seeds; a signal comes when the third run has trained an epoch."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for folder in (whole, stopped):
        folder.mkdir()
    for run in tiny_runs(whole, seeds=[1]):
        run_main(*run.words)
    runs = tiny_runs(stopped, seeds=[0, 1])
    third = runs[2]

    def received():
        return "SIGTERM" if (third.folder / "log.txt").exists() else None

    with forked_runs() as (start, started):
        outcome = Jobs(Settings(), start, received, sleep=lambda seconds: time.sleep(0.01)).run(runs)
        assert outcome == ([], ["plain/seed1", "mixing/seed1"], "SIGTERM")
        assert not (third.folder / "summary.json").exists() and not runs[3].folder.exists()
        for run in runs:
            check_flags(run, 1)
        assert Jobs(Settings(num_jobs=2), start, lambda: None).run(runs) == ([], [], None)
    names = [run.name for run in runs]
    assert [of.name for of in started] == [*names[:3], *names[2:]]
    for run in runs[2:]:
        uninterrupted = whole / "out" / run.row / "seed1"
        assert content(run.folder) == content(uninterrupted)
        assert records(run.folder) == records(uninterrupted)


def start_study(*words):
    """study.py in another process group than the test, which ends it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return subprocess.Popen(
        [sys.executable, "study.py", *map(str, words)], cwd=REPOSITORY, env=environment | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def processes_of(folder):
    """Running processes whose command names a folder."""
    found = []
    for path in os.scandir("/proc"):
        try:
            with open(f"{path.path}/cmdline", "rb") as file:
                if str(folder) in file.read().decode(errors="replace"):
                    found.append(int(path.name))
        except (OSError, ValueError):
            continue
    return found


def wait_until(condition, process=None):
    deadline = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < deadline and (process is None or process.poll() is None)
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--jobs", "2"], ["--nproc-per-node", "2"]], ids=["jobs", "torchrun"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_study_is_stopped_and_continued(words, number, tmp_path):
    """Its processes save and end at a signal, also at the one that kills the study alone, and the runs resume."""
    out = tmp_path / "out"
    epochs = 12
    path = write_study(tmp_path, seeds=[0])
    command = [path, out, *words, "--epochs", epochs]
    process = start_study(*command)
    wait_until(lambda: (out / "plain" / "seed0" / "checkpoint.pth").exists(), process)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == (75 if number != signal.SIGKILL else -signal.SIGKILL), printed
    if number != signal.SIGKILL:
        assert printed.splitlines()[-1] == f"{out}: stopped; start the same command again to continue"
        assert processes_of(out) == []
    wait_until(lambda: not processes_of(out))
    assert not (out / "plain" / "seed0" / "summary.json").exists()
    process = start_study(*command)
    printed, _ = process.communicate(timeout=400)
    assert process.returncode == 0, printed
    assert "plain/seed0: resumes" in printed
    for row in ("plain", "mixing"):
        assert [record["epoch"] for record in log_of(out / row / "seed0")] == [*range(epochs)]
        assert json.loads((out / row / "seed0" / "summary.json").read_text())["epochs"] == epochs


@pytest.mark.slow
def test_one_command_trains_analyses_and_reports(tmp_path):
    path = write_study(
        tmp_path, seeds=[0, 1], analyze="--num-images 16", rows={"plain": {}, "bad": {"model": "no_vit"}}
    )
    lines_of_runs = tmp_path / "records.jsonl"
    words = [path, tmp_path / "out", "--jobs", 2, "--no-keep-weights", "--report", "--collect", lines_of_runs]
    process = start_study(*words)
    printed, _ = process.communicate(timeout=400)
    lines = printed.splitlines()
    assert (process.returncode, lines[-1]) == (1, "failed: bad/seed0 bad/seed1"), printed
    (reason,) = [line for line in lines if line.startswith("bad/seed0: failed")]
    assert "error: " in reason and "no_vit" in reason
    assert [json.loads(line)["row"] for line in lines_of_runs.read_text().splitlines()] == ["plain", "plain"]
    page = (tmp_path / "out" / "report" / "report.md").read_text()
    assert "2 of 4 runs are finished" in page
    for seed in (0, 1):
        folder = tmp_path / "out" / "plain" / f"seed{seed}"
        assert (folder / "redundancy.json").exists() and not [*folder.glob("*.pth")]
