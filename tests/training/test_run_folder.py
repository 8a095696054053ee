"""The run folder: one run at a time, errors in one line on all ranks, and the files that describe a run."""

import errno
import json
import os
import signal
import socket
import time

import forking
import pytest
import yaml
from forking import exit_code, receive
from helpers import TINY, one_line, run_main, world

import main
from training import run_folder
from utils import joined_world


def lock(folder, resume="auto"):
    return run_folder.lock_run_folder(str(folder), world(), resume)


# The lock


def hold(pipe, folder):
    with lock(folder):
        pipe.send("locked")
        pipe.poll(60)


def hold_with_a_child(pipe, folder):
    with lock(folder):
        child = forking.FORK.Process(target=time.sleep, args=(60,))
        child.start()
        pipe.send(child.pid)
        pipe.poll(60)


def test_a_locked_folder_refuses_another_process_and_names_its_owner(fork, tmp_path):
    process, pipe = fork(hold, tmp_path)
    receive(pipe)
    with pytest.raises(SystemExit) as stop, lock(tmp_path):
        pass
    owner = f"process {process.pid} on host {socket.gethostname()}"
    assert stop.value.code.startswith(f"error: --output-dir {tmp_path} is in use by {owner}; ")
    assert "\n" not in stop.value.code
    pipe.send("end")
    assert exit_code(process) == 0
    with lock(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith("process ")
    assert (tmp_path / ".lock").exists()


def test_a_killed_process_releases_its_lock(fork, tmp_path):
    process, pipe = fork(hold, tmp_path)
    receive(pipe)
    process.kill()
    process.join()
    assert (tmp_path / ".lock").exists()
    with lock(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on host ")


def test_forked_children_do_not_keep_the_lock(fork, tmp_path):
    process, pipe = fork(hold_with_a_child, tmp_path)
    child = receive(pipe)
    try:
        process.kill()
        process.join()
        os.kill(child, 0)
        with lock(tmp_path):
            assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on host ")
    finally:
        os.kill(child, signal.SIGKILL)


def test_the_end_of_a_forked_child_does_not_release_the_lock(fork, tmp_path):
    def check(pipe):
        with pytest.raises(SystemExit), lock(tmp_path):
            pass
        pipe.send("refused")

    with lock(tmp_path):
        child = forking.FORK.Process(target=int)
        child.start()
        assert exit_code(child) == 0
        assert receive(fork(check)[1]) == "refused"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS])
def test_without_locks_the_run_continues_with_a_warning(number, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fcntl.flock", lambda *_: raise_error(number))
    with lock(tmp_path) as folder:
        assert folder == tmp_path
    warning = capsys.readouterr().err
    assert warning.startswith(f"warning: --output-dir {tmp_path} ")
    assert warning.count("\n") == 1


def test_other_errors_of_a_lock_are_reported(tmp_path, monkeypatch):
    monkeypatch.setattr("fcntl.flock", lambda *_: raise_error(errno.EIO))
    with pytest.raises(SystemExit) as caught, lock(tmp_path):
        pass
    one_line(caught, tmp_path, "cannot be written", os.strerror(errno.EIO))


def raise_error(number):
    raise OSError(number, os.strerror(number))


# The folder


def test_the_folder_is_made_and_temporary_files_are_removed(tmp_path):
    folder = tmp_path / "new" / "run"
    with lock(folder):
        assert [path.name for path in folder.iterdir()] == [".lock"]
    (folder / "checkpoint.pth.tmp").touch()
    with lock(folder):
        assert [path.name for path in folder.iterdir()] == [".lock"]


def test_only_temporary_files_are_removed(tmp_path):
    for name in ("a.pth.tmp", "b.tmp", "checkpoint.pth", "tmp", "c.tmp.damaged"):
        (tmp_path / name).touch()
    (tmp_path / "folder.tmp").mkdir()
    assert run_folder.remove_temporary_files(tmp_path) == [tmp_path / "a.pth.tmp", tmp_path / "b.tmp"]
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint.pth", "tmp", "c.tmp.damaged", "folder.tmp"}
    assert run_folder.remove_temporary_files(tmp_path) == []


def test_a_run_in_use_keeps_its_temporary_files(fork, tmp_path):
    _, pipe = fork(hold, tmp_path)
    receive(pipe)
    (tmp_path / "checkpoint.pth.tmp").touch()
    with pytest.raises(SystemExit), lock(tmp_path):
        pass
    assert (tmp_path / "checkpoint.pth.tmp").exists()


def test_without_a_folder_nothing_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with lock("") as folder:
        run_folder.write_description(folder, {"lr": 1}, "terms", world())
    assert folder is None and not list(tmp_path.iterdir())
    assert not run_folder.needs_last_files("", "checkpoint.pth", True)


@pytest.mark.parametrize(
    ("resume", "is_refused"),
    [("", True), ("other/checkpoint.pth", True), ("run/checkpoint_best.pth", False), ("auto", False)],
)
def test_a_folder_that_holds_a_run_is_for_that_run_alone(tmp_path, monkeypatch, resume, is_refused):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.txt").touch()
    if not is_refused:
        with lock("run", resume):
            pass
        return
    with pytest.raises(SystemExit) as caught, lock("run", resume):
        pass
    one_line(caught, "--output-dir run", "--resume auto")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["log.txt"]


def open_on_rank(pipe, rank, store, folder):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    with joined_world("cpu", f"file://{store}") as world:
        try:
            with run_folder.lock_run_folder(folder, world) as path:
                pipe.send(path)
        except SystemExit as stop:
            pipe.send(stop.code)


@pytest.mark.parametrize("name", ["run", "file/run"])
def test_the_main_process_alone_has_the_folder_and_its_errors_end_all(name, fork, tmp_path):
    (tmp_path / "file").touch()
    folder = tmp_path / name
    pipes = [fork(open_on_rank, rank, tmp_path / "store", str(folder))[1] for rank in range(2)]
    first, second = (receive(pipe) for pipe in pipes)
    if name == "run":
        assert (first, second) == (folder, None)
    else:
        assert first == second and first.startswith(f"error: --output-dir {folder} cannot be written")


def test_a_run_locks_its_folder_before_it_builds_anything(tmp_path, monkeypatch):
    monkeypatch.setattr(main, "build_data", lambda *_: pytest.fail("the data is built"))
    with lock(tmp_path), pytest.raises(SystemExit) as caught:
        run_main(*TINY, "--output-dir", tmp_path, "--resume", "auto")
    one_line(caught, "--output-dir", "is in use")


# Its files


def test_what_describes_a_run(tmp_path):
    with lock(tmp_path) as folder:
        run_folder.write_summary(folder, 3, 60, {"acc1": 50.0})
        assert json.loads((tmp_path / "summary.json").read_text()) == {
            "epochs": 3, "training_seconds": 60, "test_acc1": 50.0,
        }  # fmt: skip
        checkpoint = str(tmp_path / "checkpoint.pth")
        assert not run_folder.needs_last_files(str(tmp_path), checkpoint, False)
        run_folder.write_description(folder, {"lr": 0.1, "drop": 0}, "term  coef", world())
        assert run_folder.needs_last_files(str(tmp_path), checkpoint, False)
        assert not run_folder.needs_last_files(str(tmp_path / "other"), checkpoint, False)
    assert list(yaml.safe_load((tmp_path / "args.yaml").read_text()).items()) == [("lr", 0.1), ("drop", 0)]
    assert (tmp_path / "objective.txt").read_text() == "term  coef\n"
