"""Order, budget, failures and stops of a study's runs, with processes and a clock of the test; states of folders."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import yaml
from helpers import REPOSITORY
from studying import tiny_runs

import study
from reports.run_folders import find_runs
from reports.run_records import write_records
from studies.commands import Settings
from studies.jobs import Jobs
from studies.processes import Processes
from studies.run_state import ANALYZED, State, check_flags, recorded_runs, state_of, write_analyzed
from training import arguments


class Machine:
    """A clock and processes: each run takes the seconds that `takes` has for it, or `usual`, and ends with its code."""

    def __init__(self, usual=60, takes=None, codes=None, training_seconds=None):
        self.now, self.usual, self.takes, self.codes = 1000.0, usual, takes or {}, codes or {}
        self.begun, self.most_at_once, self.processes, self.received = [], 0, [], None
        self.finished = []

    def start(self, run, command, log):
        step = "analyze" if command[1].endswith("analyze.py") else "train"
        process = SimpleNamespace(run=run, step=step, stopped=False, done=False, log=log)
        process.ends = self.now + (self.takes.get(run.name, self.usual) if step == "train" else 5)
        process.poll = lambda: self._poll(process)
        process.terminate = lambda: setattr(process, "stopped", True)
        self.begun.append((step, run.name))
        self.processes.append(process)
        self.most_at_once = max(self.most_at_once, sum(not other.done for other in self.processes))
        return process

    def _poll(self, process):
        code = self.codes.get((process.step, process.run.name), 0)
        if process.stopped:
            process.done = True
            return 75 if process.step == "train" else 143
        if self.now < process.ends:
            return None
        process.done = True
        if code == 0 and process.step == "train":
            finish(process.run)
        return code

    def sleep(self, seconds):
        self.now += seconds

    def run(self, runs, **settings):
        return Jobs(
            Settings(**settings), self.start, lambda: self.received, self.finished.append, lambda: self.now, self.sleep
        ).run(runs)


def finish(run, flags=None, global_batch=None, seconds=0):
    """What a finished run leaves in its folder, as far as a study reads it."""
    begin(run, flags, global_batch)
    (run.folder / "summary.json").write_text(json.dumps({"epochs": run.args.epochs, "training_seconds": seconds}))


def begin(run, flags=None, global_batch=None, epochs=1):
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "args.yaml").write_text(yaml.safe_dump(arguments.repeatable(run.args) | (flags or {})))
    (run.folder / "checkpoint.pth").touch()
    (run.folder / "checkpoint_best.pth").touch()
    (run.folder / "log.txt").write_text("".join(f'{{"epoch": {epoch}}}\n' for epoch in range(epochs)))
    if global_batch:
        (run.folder / "environment.json").write_text(json.dumps([{"data": {}, "global_batch": global_batch}]))


def test_runs_go_side_by_side_and_only_as_many_as_asked(tmp_path, capsys):
    runs = tiny_runs(tmp_path, seeds=[0, 1, 2])
    machine = Machine(takes={"plain/seed0": 200})
    assert machine.run(runs, num_jobs=2) == ([], [], None)
    assert machine.begun == [("train", run.name) for run in runs]
    assert machine.most_at_once == 2
    assert machine.now - 1000 < 5 * 60  # five runs beside the long one
    assert {process.log for process in machine.processes} == {run.folder / "console.log" for run in runs}
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["plain/seed0: starts", "mixing/seed0: starts"] and len(lines) == 12
    one = Machine()
    assert one.run(runs) == ([], [], None) and one.begun == []  # all are finished


def test_a_failed_run_is_named_and_the_others_run(tmp_path, capsys):
    runs = tiny_runs(tmp_path, seeds=[0, 1])
    machine = Machine(codes={("train", "mixing/seed0"): 7, ("train", "plain/seed1"): -9})
    outcome = machine.run(runs)
    assert outcome == (["mixing/seed0", "plain/seed1"], [], None)
    assert len(machine.begun) == 4 and {process.log for process in machine.processes} == {None}
    err = capsys.readouterr().err
    assert "mixing/seed0: failed after 0:01:00 (exit code 7)" in err
    assert "plain/seed1: failed after 0:01:00 (killed by SIGKILL)" in err
    again = Machine()
    assert again.run(runs) == ([], [], None)
    assert again.begun == [("train", "mixing/seed0"), ("train", "plain/seed1")]


def test_the_reason_of_a_failure_is_read_from_its_output(tmp_path, capsys):
    (run,) = tiny_runs(tmp_path, rows={"plain": {}})
    run.folder.mkdir(parents=True)
    (run.folder / "console.log").write_text("begun\nerror: no such file\nbye\n")
    Machine(codes={("train", run.name): 1}).run([run], num_jobs=2)
    expected = f"(exit code 1): error: no such file; see {run.folder}/console.log"
    assert capsys.readouterr().err.splitlines()[-1].endswith(expected)


def test_a_budget_starts_nothing_that_cannot_end_in_it(tmp_path, capsys):
    runs = tiny_runs(tmp_path, seeds=[0, 1, 2])
    machine = Machine(usual=100, takes={"plain/seed0": 60})
    outcome = machine.run(runs, budget_seconds=310)  # 60 + 100 + 100, and 100 do not fit into the 50 that are left
    assert outcome == ([], ["mixing/seed1", "plain/seed2", "mixing/seed2"], None)
    assert [name for _, name in machine.begun] == ["plain/seed0", "mixing/seed0", "plain/seed1"]
    assert "mixing/seed1: not started: it needs about 0:01:40, and 0:00:50 are left" in capsys.readouterr().err
    assert Machine(usual=100).run(runs, budget_seconds=99) == (
        [],
        ["mixing/seed1", "plain/seed2", "mixing/seed2"],
        None,
    )
    # what is left of an interrupted run is half of it
    begin(runs[3], epochs=1)
    machine = Machine(usual=50)
    finish(runs[0], seconds=110)
    outcome = machine.run(runs, budget_seconds=60)
    assert machine.begun == [("train", "mixing/seed1")] and outcome.left == ["plain/seed2", "mixing/seed2"]


def test_at_the_end_of_the_budget_runs_are_stopped(tmp_path, capsys):
    runs = tiny_runs(tmp_path, seeds=[0, 1])
    finish(runs[3])
    machine = Machine(usual=100)  # the first runs of a study take nobody knows how long
    outcome = machine.run(runs, budget_seconds=90, num_jobs=2)
    assert outcome == ([], ["plain/seed0", "mixing/seed0", "plain/seed1"], None)
    assert len(machine.begun) == 2 and machine.now - 1000 < 92
    assert "the end of --budget stops the study: its runs save" in capsys.readouterr().err


@pytest.mark.parametrize("num_jobs", [1, 2])
def test_a_signal_stops_all_runs(num_jobs, tmp_path):
    runs = tiny_runs(tmp_path, seeds=[0, 1])
    machine = Machine()
    sleep = machine.sleep

    def sleep_until_a_signal(seconds):
        sleep(seconds)
        machine.received = "SIGTERM" if machine.now > 1090 else None

    machine.sleep = sleep_until_a_signal
    failed, left, name = machine.run(runs, num_jobs=num_jobs)
    assert (failed, name) == ([], "SIGTERM")
    assert left == [run.name for run in runs[1 if num_jobs == 1 else 2 :]]
    assert all(process.done for process in machine.processes)


def test_a_signal_to_one_run_stops_the_others(tmp_path):
    runs = tiny_runs(tmp_path, seeds=[0, 1])
    machine = Machine(takes={"mixing/seed0": 30}, codes={("train", "mixing/seed0"): 75})
    outcome = machine.run(runs, num_jobs=2)
    assert outcome.failed == [] and "mixing/seed0" in outcome.signal
    assert {*outcome.left} == {run.name for run in runs} and len(machine.begun) == 2


def test_finished_runs_are_analysed_and_then_lose_their_weights(tmp_path):
    runs = tiny_runs(tmp_path, rows={"plain": {}, "mixing": {"mixing_coef": 1}, "fails": {"mixing_coef": 2}})
    plain, mixing, _ = runs
    finish(plain)
    machine = Machine(codes={("analyze", "fails/seed0"): 1})
    settings = {"analyze": ["--num-images", "8"], "keep_weights": False}
    assert machine.run(runs, **settings).failed == ["fails/seed0"]
    assert machine.begun == [("analyze", "plain/seed0"), ("train", "mixing/seed0"), ("analyze", "mixing/seed0"),
                             ("train", "fails/seed0"), ("analyze", "fails/seed0")]  # fmt: skip
    assert [len([*run.folder.glob("checkpoint*.pth")]) for run in runs] == [0, 0, 2]
    assert machine.finished == [plain, mixing]
    assert json.loads((mixing.folder / ANALYZED).read_text())["words"] == ["--num-images", "8"]
    again = Machine()
    assert again.run(runs, **settings).failed == []
    assert again.begun == [("analyze", "fails/seed0")]
    assert Machine().run(runs, analyze=["--num-images", "9"]) == ([], [], None)  # nothing is left to measure


def test_the_time_of_an_analysis_counts(tmp_path):
    runs = tiny_runs(tmp_path, seeds=[0, 1])
    machine = Machine(usual=20)
    outcome = machine.run(runs, analyze=[], budget_seconds=99)
    assert outcome.left == ["mixing/seed1"]  # 3 x (20 + 5), and 25 do not fit into 24
    write_analyzed(runs[0].folder, [], 70)
    assert Machine(usual=20).run(runs, analyze=[], budget_seconds=69).left == ["mixing/seed1"]


def test_states_of_run_folders(tmp_path):
    (run,) = tiny_runs(tmp_path, "--save-predictions", rows={"plain": {}})
    assert state_of(run, None) == State.NEW
    run.folder.mkdir(parents=True)
    (run.folder / "log.txt").touch()
    assert state_of(run, None) == State.NEW
    (run.folder / "checkpoint.1.pth").touch()
    assert state_of(run, []) == State.INTERRUPTED
    finish(run)
    assert state_of(run, None) == State.INTERRUPTED  # predictions.npz is missing
    (run.folder / "predictions.npz").touch()
    assert state_of(run, None) == State.FINISHED
    assert state_of(run, ["--ema"]) == State.TRAINED
    write_analyzed(run.folder, ["--ema"], 1)
    assert state_of(run, ["--ema"]) == State.FINISHED
    assert state_of(run, []) == State.TRAINED


def refusal(run, num_processes=1):
    with pytest.raises(SystemExit) as caught:
        check_flags(run, num_processes)
    line = caught.value.code
    assert line.startswith("error: ") and "\n" not in line and str(run.folder) in line
    return line


def test_a_run_whose_record_is_in_the_file_is_finished(tmp_path, capsys):
    plain, _ = tiny_runs(tmp_path)
    finish(plain)
    file = tmp_path / "records.jsonl"
    (plain.folder / "log.txt").write_text("".join(f'{{"epoch": {i}, "train_loss": 1.0}}\n' for i in range(2)))
    write_records(find_runs([tmp_path / "out"]), file)
    words = [str(tmp_path / "study.yaml"), str(tmp_path / "new"), "--collect", str(file), "--rows", "plain"]
    study.main([*words, "--dry-run"])
    assert not capsys.readouterr().out and not (tmp_path / "new").exists()
    study.main(words)
    assert "plain/seed0: finished, skipped" in capsys.readouterr().err
    assert not [*(tmp_path / "new").rglob("*.pth")] and len(file.read_text().splitlines()) == 1
    (tmp_path / "new" / "plain" / "seed0" / "checkpoint.pth").touch()
    assert study.collect([plain], Settings(analyze=["--ema"]), tmp_path / "others.jsonl") == 0  # it is not analysed
    with pytest.raises(SystemExit, match=r"plain/seed0 of .*: --lr 0.0005 -> 0.25; give the old values"):
        study.main([*words[:1], str(tmp_path / "other"), *words[2:], "--lr", "0.25"])
    assert not (tmp_path / "other").exists()


def test_weights_in_another_folder_are_the_same_flag(tmp_path):
    plain, _ = tiny_runs(tmp_path, "--finetune", "/here/weights.pth")
    finish(plain, {"finetune": "/there/weights.pth"})
    assert check_flags(plain, 1) is None
    (plain.folder / "log.txt").write_text("".join(f'{{"epoch": {i}, "train_loss": 1.0}}\n' for i in range(2)))
    write_records(find_runs([tmp_path / "out"]), tmp_path / "records.jsonl")
    shutil.rmtree(tmp_path / "out")
    assert [*recorded_runs([plain], tmp_path / "records.jsonl")] == ["plain/seed0"]
    finish(plain, {"finetune": "/there/others.pth"})
    assert "--finetune others.pth -> weights.pth" in refusal(plain)


@pytest.mark.parametrize("leave", [finish, begin])
def test_a_run_of_other_flags_is_refused(leave, tmp_path):
    plain, mixing = tiny_runs(tmp_path)
    check_flags(plain, 1)  # there is nothing
    leave(plain, {"num_workers": 7, "output_dir": "elsewhere", "data_path": "moved"}, global_batch=16)
    assert "were trained on data DIGITS (moved), not DIGITS" in check_flags(plain, 1)
    leave(plain, {"num_workers": 7}, global_batch=16)
    assert check_flags(plain, 1) is None
    assert "images per optimizer step 16 -> 32" in refusal(plain, num_processes=2)
    leave(plain, {"lr": 0.25, "model_kwargs": {"depth": 3}})
    assert "--lr 0.25 -> 0.0005" in refusal(plain) and "--model-kwargs depth=3 -> depth=2" in refusal(plain)
    leave(mixing, {"mixing_coef": 0.0})
    assert "--mixing-coef 0.0 -> 1.0" in refusal(mixing)
    for text in ("[", "3", None):
        path = mixing.folder / "args.yaml"
        path.write_text(text) if text else path.unlink()
        assert "has a run whose files cannot be read" in refusal(mixing)


def test_processes_end_with_what_they_have_started(tmp_path):
    """The first one is killed and leaves a process that takes its time to stop; the second one is stopped."""
    left, log = tmp_path / "left", tmp_path / "logs" / "log"
    script = f'echo $$ > {left}; trap "sleep 0.2; echo saved; exit" TERM; while :; do sleep 0.05; done'
    with Processes() as processes:
        killed = processes.start(["sh", "-c", f"setsid sh -c '{script}' & wait"], log, {})
        await_file(left)
        killed.kill()
        killed.wait()
        second = processes.start(["sh", "-c", "echo $NAME; exec sleep 60"], log, {"NAME": "value"})
        await_file(log, "saved\nvalue\n")
    assert second.returncode == -signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(left.read_text()), 0)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has died")
def test_processes_are_stopped_when_the_study_is_killed(tmp_path):
    code = f"""
from pathlib import Path
from studies.processes import Processes
with Processes() as processes:
    script = 'trap "echo saved; exit 75" TERM; echo begun; while :; do sleep 0.05; done'
    processes.start(["sh", "-c", script], Path({str(tmp_path / "log")!r}), {{}}).wait()
"""
    killed = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY)
    try:
        await_file(tmp_path / "log", "begun\n")
    finally:
        killed.kill()
        killed.wait()
    await_file(tmp_path / "log", "begun\nsaved\n")


def await_file(path, text=None):
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_text().endswith("\n") and text in (None, path.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.02)
