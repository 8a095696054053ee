"""script/resize_imagenet.sh: the same command continues a copy, after an error, a signal or a kill."""

import os
import re
import signal
import time

import forking
import pytest
from resizing import SIDE, add, files_of, resize


def test_a_second_run_skips_what_exists(source, tmp_path, capsys):
    copy = tmp_path / "copy"
    resize(source, copy, SIDE)
    first = files_of(copy)
    (copy / "train" / "cat" / "3.jpg").unlink()
    inodes = {name: (copy / name).stat().st_ino for name in files_of(copy)}
    add(copy / "train" / "cat" / "3.jpg.tmp", b"by a killed run")
    capsys.readouterr()
    resize(source, copy, SIDE)
    assert files_of(copy) == first
    assert all((copy / name).stat().st_ino == inode for name, inode in inodes.items())
    assert capsys.readouterr().out == "1 images resized, 0 files copied, 0 unreadable images copied, 26 files skipped\n"


def at_call(number, do):
    """Replaces os.replace, which the workers call for each file: `do()` before one call of them."""
    calls, replace = forking.FORK.Value("i", 0), os.replace

    def replacement(*names):
        with calls.get_lock():
            calls.value += 1
            is_due = calls.value == number
        if is_due:
            do()
        replace(*names)

    return replacement


@pytest.mark.parametrize("number", [1, 18])
def test_a_kill_leaves_complete_files_and_no_process(source, tmp_path, monkeypatch, number):
    reader, writer = os.pipe()  # ends when all processes have ended

    def kill():
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)  # until it notices

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", at_call(number, kill))
        process = forking.FORK.Process(target=resize, args=(source, tmp_path / "copy", SIDE))
        process.start()
    os.close(writer)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert os.read(reader, 1) == b""
    os.close(reader)
    left = files_of(tmp_path / "copy")
    finished = {name for name in left if not name.endswith(".tmp")}
    resize(source, tmp_path / "copy", SIDE)
    resize(source, tmp_path / "reference", SIDE)
    expected = files_of(tmp_path / "reference")
    assert finished < left.keys() and finished < expected.keys()  # else it was killed at another moment
    assert all(left[name] == expected[name] for name in finished)
    assert files_of(tmp_path / "copy") == expected


def resize_and_report(pipe, *words):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the suite runs in the background
    try:
        resize(*words)
    except SystemExit as stop:
        pipe.send(stop.code)


def full_disk():
    raise OSError(28, "No space left on device")


FAILURES = {
    "Ctrl-C": (lambda: os.kill(os.getppid(), signal.SIGINT), "interrupted"),
    "SIGTERM": (lambda: os.kill(os.getppid(), signal.SIGTERM), "interrupted"),
    "full disk": (full_disk, r"\S+/source/\S+ cannot be copied to \S+/copy: .*No space left on device"),
    "killed worker": (lambda: os.kill(os.getpid(), signal.SIGKILL), ".*worker was killed.* memory .*"),
}


@pytest.mark.parametrize(("do", "reason"), FAILURES.values(), ids=FAILURES)
def test_a_run_that_fails_ends_in_one_line_and_continues(source, tmp_path, monkeypatch, do, reason):
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", at_call(4, do))
        process, pipe = forking.start(resize_and_report, source, tmp_path / "copy", SIDE)
    assert re.fullmatch(f"error: {reason}; the same command continues from here", forking.receive(pipe))
    assert forking.exit_code(process) == 0
    resize(source, tmp_path / "copy", SIDE)
    assert len(files_of(tmp_path / "copy")) == 27
