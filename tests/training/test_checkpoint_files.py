"""Checkpoint files: damage is found, the previous ones are kept, and an error or a stop at any point loses none."""

import errno
import hashlib
import io
import os
import threading
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import timm
import torch

import utils
from training import checkpoint_files as files
from training.run_folder import remove_temporary_files


@pytest.fixture(autouse=True)
def quick_flushes(monkeypatch):
    """These tests cannot observe a flush, only the order of the calls."""
    monkeypatch.setattr(os, "fsync", os.fstat)


def state_of(number):
    return {"model": {"weight": torch.full((3, 5), float(number)), "bias": torch.arange(4)}, "epoch": number}


def epoch_in(path):
    files.verify(path)
    return torch.load(path, weights_only=True)["epoch"]


def folder_of(tmp_path):
    """Name and content of every file."""
    return {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def written(tmp_path, count, keep):
    """checkpoint.pth after `count` writes; the epochs start with 1."""
    path = tmp_path / "checkpoint.pth"
    for epoch in range(1, count + 1):
        files.write(state_of(epoch), path, keep)
    return path


# Reading


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_the_file(tmp_path, mmap):
    path = written(tmp_path, 1, 1)
    loaded = torch.load(path, weights_only=True, mmap=mmap)
    assert loaded["epoch"] == 1
    for name, tensor in state_of(1)["model"].items():
        assert torch.equal(loaded["model"][name], tensor)


def test_timm_and_zip_tools_read_the_file(tmp_path):
    path = written(tmp_path, 1, 1)
    assert torch.equal(timm.models.load_state_dict(str(path), weights_only=True)["weight"], torch.ones(3, 5))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


def test_the_file_is_what_torch_saves(tmp_path):
    files.write(state_of(1), tmp_path / "written.pth")
    with open(tmp_path / "plain.pth", "wb") as file:
        torch.save(state_of(1), file)
    assert (tmp_path / "written.pth").read_bytes() == (tmp_path / "plain.pth").read_bytes()


# Verification


def seal(path):
    """Turn a file into the form of earlier versions, a zip file whose comment is a checksum of what precedes it."""
    plain = path.read_bytes()
    assert plain.endswith(b"\0\0")  # the length of the comment
    path.write_bytes(plain[:-2] + b"\x47\0sha256:" + hashlib.sha256(plain).hexdigest().encode())


def is_damage_found(path):
    """If it is not, then torch loads what was written."""
    try:
        files.verify(path)
    except files.DamagedFile as error:
        assert "\n" not in str(error)
        return True
    torch.testing.assert_close(torch.load(path, weights_only=True), state_of(1), rtol=0, atol=0)
    return False


def test_every_changed_byte_of_the_content_is_found(tmp_path):
    """The others, such as the padding between records and the time of writing, change nothing."""
    path = written(tmp_path, 1, 1)
    complete = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        content = sum(info.file_size + len(info.filename) for info in archive.infolist())
    found = 0
    with open(path, "r+b", buffering=0) as file:
        for position, byte in enumerate(complete):
            for change in (0x01, 0xFF):
                os.pwrite(file.fileno(), bytes([byte ^ change]), position)
                found += is_damage_found(path)
            os.pwrite(file.fileno(), bytes([byte]), position)
    assert found > 2 * content
    files.verify(path)


def test_every_truncation_is_found(tmp_path):
    path = written(tmp_path, 1, 1)
    complete = path.read_bytes()
    sizes = {*range(0, len(complete), 7), *range(len(complete) - 100, len(complete))}
    for other in [*(complete[:size] for size in sizes), b"\0" * len(complete), os.urandom(len(complete))]:
        path.write_bytes(other)
        with pytest.raises(files.DamagedFile, match="truncated or damaged"):
            files.verify(path)
    for other in (complete + b"\0", complete + complete):
        path.write_bytes(other)
        is_damage_found(path)


def test_files_of_earlier_versions_and_of_plain_torch_are_intact(tmp_path):
    path = written(tmp_path, 1, 1)
    seal(path)
    assert epoch_in(path) == 1
    torch.save(state_of(2), tmp_path / "plain.pth")
    assert epoch_in(tmp_path / "plain.pth") == 2
    torch.save({"args": Path()}, tmp_path / "objects.pth")
    files.verify(tmp_path / "objects.pth")


def test_damage_of_files_of_earlier_versions_is_found(tmp_path):
    path = written(tmp_path, 1, 1)
    size = path.stat().st_size
    seal(path)
    complete = path.read_bytes()
    for position in range(0, len(complete), 11):
        path.write_bytes(complete[:position] + bytes([complete[position] ^ 0xFF]) + complete[position + 1 :])
        is_damage_found(path)
        path.write_bytes(complete[:position])
        assert is_damage_found(path) or position >= size


def test_torchs_format_before_zip_files_is_not_accepted(tmp_path):
    torch.save(state_of(1), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(files.DamagedFile, match="no checkpoint of this program"):
        files.verify(tmp_path / "old.pth")


def test_what_cannot_be_read_is_one_line(tmp_path):
    for path in (tmp_path, tmp_path / "missing.pth"):
        with pytest.raises(files.DamagedFile, match=r"cannot be read: (Is a directory|No such file)") as caught:
            files.verify(path)
        assert "\n" not in str(caught.value)


def test_verifying_takes_little_memory(tmp_path):
    files.write({"weight": torch.zeros(2**21)}, tmp_path / "big.pth")
    tracemalloc.start()
    try:
        files.verify(tmp_path / "big.pth")
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


# Rotation


@pytest.mark.parametrize("keep", [1, 2, 3, 4])
@pytest.mark.parametrize("hard_links", [True, False])
def test_the_last_ones_are_kept(tmp_path, monkeypatch, keep, hard_links):
    if not hard_links:
        monkeypatch.setattr(os, "link", refuse(errno.EPERM))
    path = tmp_path / "checkpoint.pth"
    for epoch in range(1, 7):
        files.write(state_of(epoch), path, keep)
        expected = [*range(epoch, max(0, epoch - keep), -1)]
        names = ["checkpoint.pth", "checkpoint.1.pth", "checkpoint.2.pth", "checkpoint.3.pth"][: len(expected)]
        assert [file.name for file in files.candidates(path)] == names
        assert [epoch_in(file) for file in files.candidates(path)] == expected
        assert {file.name for file in tmp_path.iterdir()} == {*names}


def test_a_gap_is_filled_before_a_file_is_dropped(tmp_path):
    path = written(tmp_path, 3, 3)
    files.set_aside(tmp_path / "checkpoint.1.pth")
    files.write(state_of(4), path, 3)
    assert [epoch_in(file) for file in files.candidates(path)] == [4, 3, 1]


def test_a_damaged_file_set_aside_takes_no_good_ones_place(tmp_path):
    path = written(tmp_path, 2, 2)
    path.write_bytes(b"damaged")
    aside = files.set_aside(path)
    assert aside.name == "checkpoint.pth.damaged" and aside.read_bytes() == b"damaged"
    assert [epoch_in(file) for file in files.candidates(path)] == [1]
    files.write(state_of(3), path, 2)
    assert [epoch_in(file) for file in files.candidates(path)] == [3, 1]


def test_a_rotation_that_was_stopped_is_not_done_twice(tmp_path):
    path = written(tmp_path, 2, 2)
    (tmp_path / "checkpoint.1.pth").rename(tmp_path / "checkpoint.2.pth")
    os.link(path, tmp_path / "checkpoint.1.pth")
    files.write(state_of(3), path, 3)
    assert [epoch_in(file) for file in files.candidates(path)] == [3, 2, 1]


def test_an_old_file_that_cannot_be_removed_is_no_failed_save(tmp_path, monkeypatch):
    path = written(tmp_path, 2, 2)

    def refuse(self, missing_ok=False):
        raise OSError(errno.EBUSY, "busy")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        files.write(state_of(3), path, 2)
    assert [epoch_in(file) for file in files.candidates(path)] == [3, 2]
    assert remove_temporary_files(tmp_path)


def test_fewer_to_keep_removes_nothing(tmp_path):
    path = written(tmp_path, 3, 3)
    files.write(state_of(4), path, 1)
    assert [epoch_in(file) for file in files.candidates(path)] == [4, 2, 1]


def test_candidates_are_ordered_by_number_and_by_name_alone(tmp_path):
    for name in ("10.pth", "2.pth", "1.pth", "01.pth", "1.pth.tmp", "1.pth.damaged", "x.pth", "0.pth"):
        (tmp_path / f"checkpoint.{name}").touch()
    (tmp_path / "checkpoint_best.5.pth").touch()
    (tmp_path / "checkpoint.3.pth").mkdir()
    names = [path.name for path in files.candidates(tmp_path / "checkpoint.pth")]
    assert names == ["checkpoint.1.pth", "checkpoint.2.pth", "checkpoint.10.pth"]
    assert files.candidates(tmp_path / "none" / "checkpoint.pth") == []


# Errors


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


def refuse(code):
    def call(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    return call


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
