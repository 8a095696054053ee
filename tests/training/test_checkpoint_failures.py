"""An error or a stop at any point of writing a checkpoint file loses none of the earlier ones."""

import errno
import io
import os
import stat
import threading
from pathlib import Path

import pytest
import torch
from written_checkpoints import epoch_in, folder_of, refuse, state_of, written

import utils
from training import checkpoint_files as files
from training.run_folder import remove_temporary_files

pytestmark = pytest.mark.usefixtures("quick_flushes")


def test_a_file_is_flushed_before_any_name_changes_and_the_folder_after(tmp_path, monkeypatch):
    path = written(tmp_path, 3, 3)
    calls = []

    def flush(descriptor):
        status = os.fstat(descriptor)
        names = [file.name for file in tmp_path.iterdir() if os.path.samestat(status, file.stat())]
        calls.append(("flush", *names))
        if names:
            files.verify(tmp_path / names[0])  # nothing is missing from what is flushed

    def renamed(kind, call):
        def recorded(source, target):
            call(source, target)
            calls.append((kind, source.name, target.name))

        monkeypatch.setattr(os, kind, recorded)

    monkeypatch.setattr(os, "fsync", flush)
    renamed("link", os.link)
    renamed("replace", os.replace)
    files.write(state_of(4), path, 3)
    assert calls == [
        ("flush", "checkpoint.pth.tmp"),
        ("replace", "checkpoint.2.pth", "checkpoint.2.pth.tmp"),
        ("replace", "checkpoint.1.pth", "checkpoint.2.pth"),
        ("link", "checkpoint.pth", "checkpoint.1.pth"),
        ("replace", "checkpoint.pth.tmp", "checkpoint.pth"),
        ("flush",),
    ]


def nth(call, number, then):
    """`call`, whose `number`-th use is `then` instead."""
    uses = []

    def counted(*args, **kwargs):
        uses.append(args)
        return (then if len(uses) == number else call)(*args, **kwargs)

    return counted


class Disk(io.FileIO):
    """A file that takes `room` bytes, then raises `error`; at most `most` bytes a call."""

    room, error, most = 2**40, None, 2**30

    def write(self, data):
        size = min(len(data), self.most, self.room)
        if size == 0 and self.error:
            raise self.error
        self.room -= size
        return super().write(data[:size])


def use(disk, monkeypatch):
    """Have files written through a kind of `Disk`; returns the list of those that are opened."""
    opened = []

    def open_file(path, mode):
        opened.append(disk(path, mode))
        return io.BufferedWriter(opened[-1])

    monkeypatch.setattr(utils, "open", open_file, raising=False)
    return opened


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("more", [0, 10_000])  # with more than a buffer, the error comes from within torch's writer
def test_a_full_disk_leaves_the_old_files(tmp_path, monkeypatch, code, more):
    path = written(tmp_path, 3, 2)
    before, state = folder_of(tmp_path), state_of(4) | {"more": torch.ones(more)}
    size = path.stat().st_size + 4 * more

    class Full(Disk):
        error = OSError(code, os.strerror(code))

    for room in [*range(0, size, size // 40), size - 72, size - 71, size - 1]:
        Full.room = room
        with monkeypatch.context() as patch:
            opened = use(Full, patch)
            with pytest.raises(OSError) as caught:
                files.write(state, path, 2)
        assert caught.value.errno == code
        assert [file.closed for file in opened] == [True]
        assert folder_of(tmp_path) == before


@pytest.mark.parametrize("size", [1, 10, 1000])
def test_a_disk_that_takes_little_at_a_time_is_written_in_full(tmp_path, monkeypatch, size):
    class Slow(Disk):
        most = size

    with monkeypatch.context() as patch:
        use(Slow, patch)
        path = written(tmp_path, 1, 1)
    assert epoch_in(path) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a Linux device")
def test_a_disk_that_is_really_full(tmp_path):
    path = written(tmp_path, 2, 2)
    before = folder_of(tmp_path)
    (tmp_path / "checkpoint.pth.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError) as caught:
        files.write(state_of(3), path, 2)
    assert caught.value.errno == errno.ENOSPC
    assert folder_of(tmp_path) == before


@pytest.mark.parametrize("stop", [OSError(errno.EIO, "refused"), KeyboardInterrupt()])
@pytest.mark.parametrize("hard_links", [True, False])
@pytest.mark.parametrize("keep", [1, 2, 3, 4])
def test_a_failure_before_the_end_puts_everything_back(tmp_path, monkeypatch, keep, hard_links, stop):
    """A failure of the flush and of every rename, the last one included, which `keep` + `no hard links` make more."""

    def fail(*args, **kwargs):
        raise stop

    path = written(tmp_path, keep, keep)
    before = folder_of(tmp_path)
    if not hard_links:
        monkeypatch.setattr(os, "link", refuse(errno.EPERM))
    renames = keep if hard_links and keep > 1 else keep + (keep > 1)
    calls = [("fsync", 1), *(("replace", number) for number in range(1, renames + 1))]
    if hard_links and keep > 1 and isinstance(stop, KeyboardInterrupt):
        calls.append(("link", 1))
    for name, number in calls:
        with monkeypatch.context() as patch:
            patch.setattr(os, name, nth(getattr(os, name), number, fail))
            with pytest.raises(type(stop)):
                files.write(state_of(9), path, keep)
        assert folder_of(tmp_path) == before, (name, number)
    files.write(state_of(9), path, keep)
    assert [epoch_in(file) for file in files.candidates(path)] == [9, *range(keep, 1, -1)]


def test_a_failure_takes_back_the_first_previous_file(tmp_path, monkeypatch):
    path = written(tmp_path, 1, 2)
    before = folder_of(tmp_path)
    monkeypatch.setattr(os, "replace", refuse(errno.EIO))
    with pytest.raises(OSError):
        files.write(state_of(2), path, 2)
    assert folder_of(tmp_path) == before


def test_a_folder_that_cannot_be_flushed_is_an_error_with_the_new_file_in_place(tmp_path, monkeypatch):
    path = written(tmp_path, 2, 2)
    monkeypatch.setattr(os, "fsync", nth(os.fsync, 2, refuse(errno.EIO)))
    with pytest.raises(OSError):
        files.write(state_of(3), path, 2)
    assert [epoch_in(file) for file in files.candidates(path)] == [3, 2]
    assert len(folder_of(tmp_path)) == 2


@pytest.mark.parametrize("name", ["fsync", "open"])
@pytest.mark.parametrize("code", [errno.EINVAL, errno.EACCES])
def test_a_file_system_that_flushes_no_folders_is_warned_about_once(tmp_path, monkeypatch, capsys, code, name):
    path, call = tmp_path / "checkpoint.pth", getattr(os, name)

    def refuse_folders(target, *flags):
        if tmp_path == target or (name == "fsync" and stat.S_ISDIR(os.fstat(target).st_mode)):
            raise OSError(code, os.strerror(code))
        return call(target, *flags)

    monkeypatch.setattr(os, name, refuse_folders)
    for epoch in range(3):
        files.write(state_of(epoch), path, 2)
    assert [epoch_in(file) for file in files.candidates(path)] == [2, 1]
    err = capsys.readouterr().err
    assert err.startswith(f"warning: the file system of {tmp_path} does not flush folders ({os.strerror(code)})")
    assert err.count("\n") == 1


def test_what_cannot_be_pickled_leaves_the_old_files(tmp_path):
    path = written(tmp_path, 2, 2)
    before = folder_of(tmp_path)
    with pytest.raises((AttributeError, TypeError, RuntimeError)):
        files.write({"model": threading.Lock()}, path, 2)
    assert folder_of(tmp_path) == before


class Stopping:
    """Wraps functions; the process ends right after the `number`-th call of any of them."""

    def __init__(self, number):
        self.left = number

    def __call__(self, function):
        def stopping(*args, **kwargs):
            result = function(*args, **kwargs)
            self.left -= 1
            if self.left == 0:
                os._exit(9)
            return result

        return stopping


def write_and_stop(path, keep, number, monkeypatch):
    """Write in a forked process that ends at a point of the writing; False if there is no such point."""
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, 9), code
        return code == 9
    try:
        stopping = Stopping(number)

        class Stopped(Disk):
            most, write = 300, stopping(Disk.write)

        use(stopping(Stopped), monkeypatch)
        for name in ("fsync", "link", "replace", "unlink"):
            monkeypatch.setattr(os, name, stopping(getattr(os, name)))
        files.write(state_of(9), path, keep)
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.parametrize("hard_links", [True, False])
@pytest.mark.parametrize("keep", [1, 2, 3])
def test_a_stop_anywhere_leaves_a_complete_file(tmp_path, monkeypatch, keep, hard_links):
    """Each write is stopped one point later than the one before, until one is not stopped."""
    if not hard_links:
        monkeypatch.setattr(os, "link", refuse(errno.EPERM))
    outcomes, is_stopped = [], True
    while is_stopped:
        folder = tmp_path / str(len(outcomes))
        folder.mkdir()
        path = written(folder, keep, keep)
        is_stopped = write_and_stop(path, keep, len(outcomes) + 1, monkeypatch)
        epochs = [epoch_in(file) for file in files.candidates(path)]  # every one of them is complete
        assert epochs[0] in (keep, 9) and epochs == sorted(epochs, reverse=True)
        assert path.exists() or (not hard_links and keep > 1)
        outcomes.append(epochs[0])
        remove_temporary_files(folder)
        assert [epoch_in(file) for file in files.candidates(path)] == epochs
        files.write(state_of(10), path, keep)  # the next run continues from there, and loses nothing it could keep
        remove_temporary_files(folder)
        kept = [epoch_in(file) for file in files.candidates(path)]
        assert kept == sorted({10, *epochs}, reverse=True)[:keep]
    assert len(outcomes) > 8
    assert outcomes == sorted(outcomes) and {*outcomes} == {keep, 9}
