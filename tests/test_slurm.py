"""The multi-node batch script, with replacements of SLURM's commands that record the calls."""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "script" / "slurm_deit_small_diverse.sbatch"
COMMANDS = {
    "srun": """
        printf '%s\\n' "$@" > srun.words
        echo "$TORCHRUN_ARGS" > torchrun.args
        echo $$ > srun.pid
        trap 'echo signalled >> events; sleep 0.4; echo saved >> events; exit 1' TERM
        echo started >> events
        [ "$ENDS" = signalled ] || exit "$ENDS"
        for _ in $(seq 200); do sleep 0.05; done
        exit 3
    """,
    "scancel": """
        echo "scancel $*" >> events
        kill -TERM "$(cat srun.pid)"
    """,
    "scontrol": """
        case "$1 $2" in
          "show hostnames") printf 'node07\\nnode08\\n' ;;
          "show job") echo "JobId=$3 JobState=$STATE PreemptEligibleTime=2026-01-01T00:00:00 PreemptTime=$PREEMPTED" ;;
          *) echo "scontrol $*" >> events ;;
        esac
    """,
}


@pytest.fixture
def start(tmp_path):
    """A function that starts the script in `tmp_path`. Processes that are still running after the test are killed."""
    commands, jobs = tmp_path / "bin", []
    commands.mkdir()
    for name, body in COMMANDS.items():
        (commands / name).write_text(f"#!/bin/bash\n{body}")
        (commands / name).chmod(0o755)

    def started(*flags, ends="signalled", **environment):
        slurm = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "node[07-08]", "SLURM_JOB_NUM_NODES": "2"}
        fakes = {"PATH": f"{commands}:{os.environ['PATH']}", "ENDS": str(ends), "STATE": "RUNNING", "PREEMPTED": "None"}
        job = subprocess.Popen(
            ["bash", SCRIPT, *flags],
            cwd=tmp_path,
            env={**os.environ, **slurm, **fakes, "DATA": "/data set", "SLURM_CPUS_PER_TASK": "64", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        jobs.append(job)
        return job

    yield started
    for job in jobs:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()
        job.stdout.close()


def events(folder) -> list[str]:
    return (folder / "events").read_text().splitlines() if (folder / "events").exists() else []


def await_event(folder, name):
    end = time.monotonic() + 5
    while name not in events(folder):
        assert time.monotonic() < end, events(folder)
        time.sleep(0.02)


def test_after_the_warning_the_ranks_save_and_the_job_is_queued_again(start, tmp_path):
    job = start()
    await_event(tmp_path, "started")
    job.send_signal(signal.SIGUSR1)
    await_event(tmp_path, "signalled")
    job.send_signal(signal.SIGUSR1)  # a second one must not reach the ranks, which would end before they have saved
    assert job.wait(timeout=5) == 0
    sequence = ["started", "scancel --signal=TERM 12345", "signalled", "saved", "scontrol requeue 12345"]
    assert events(tmp_path) == sequence


def test_a_sigterm_is_not_sent_to_the_ranks_twice(start, tmp_path):
    job = start()
    await_event(tmp_path, "started")
    job.send_signal(signal.SIGTERM)
    os.kill(int((tmp_path / "srun.pid").read_text()), signal.SIGTERM)  # SLURM's own
    assert job.wait(timeout=5) == 0
    assert events(tmp_path) == ["started", "signalled", "saved", "scontrol requeue 12345"]


def test_a_job_whose_ranks_were_preempted_first_is_queued_again(start, tmp_path):
    job = start(ends=1, PREEMPTED="2026-01-02T00:00:00")
    assert job.wait(timeout=5) == 0
    assert events(tmp_path) == ["started", "scontrol requeue 12345"]


def test_a_cancelled_job_stays_cancelled(start, tmp_path):
    job = start(STATE="COMPLETING")
    await_event(tmp_path, "started")
    job.send_signal(signal.SIGTERM)
    os.kill(int((tmp_path / "srun.pid").read_text()), signal.SIGTERM)
    assert job.wait(timeout=5) == 1
    assert events(tmp_path) == ["started", "signalled", "saved"]


@pytest.mark.parametrize("status", [0, 1, 7])
def test_a_job_that_ends_or_fails_is_not_queued_again(start, tmp_path, status):
    assert start(ends=status).wait(timeout=5) == status
    assert events(tmp_path) == ["started"]


def test_a_run_that_finishes_after_the_warning_is_not_queued_again(start, tmp_path):
    commands = tmp_path / "bin" / "srun"
    commands.write_text(commands.read_text().replace("exit 1' TERM", "exit 0' TERM"))
    job = start()
    await_event(tmp_path, "started")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=5) == 0
    assert events(tmp_path) == ["started", "scancel --signal=TERM 12345", "signalled", "saved"]


def test_every_node_starts_the_papers_run_with_a_rendezvous_on_the_first(start, tmp_path):
    assert start("--seed", "3", ends=0).wait(timeout=5) == 0
    words = (tmp_path / "srun.words").read_text().splitlines()
    run = words.index("script/train_paper.sh")
    assert all(word.startswith("--") for word in words[:run])
    assert words[run + 1 :] == ["deit_small_patch16_224_diverse", "/data set", "--resume", "auto", "--seed", "3"]
    torchrun = (tmp_path / "torchrun.args").read_text().split()
    assert {"--nnodes=2", "--max-restarts=3", "--rdzv-id=12345", "--rdzv-endpoint=node07:22345"} <= set(torchrun)


def test_without_data_it_prints_its_usage(start, tmp_path):
    job = start(DATA="")
    assert job.wait(timeout=5) == 2
    assert job.stdout.read().startswith("usage: DATA=folder sbatch")
    assert events(tmp_path) == []
