"""Checkpoint files: torch and timm read them, damage is found, and the previous ones are kept."""

import errno
import hashlib
import os
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from written_checkpoints import epoch_in, refuse, state_of, written

from training import checkpoint_files as files
from training.run_folder import remove_temporary_files

pytestmark = pytest.mark.usefixtures("quick_flushes")


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
