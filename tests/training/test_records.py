"""Files of a run that grow: log.txt and TensorBoard's events. What a disk does not take is written later."""

import errno
import io
import os

import pytest
from helpers import log_of, world
from matplotlib import pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training import events, records
from training.log import RunLog
from training.records import GrowingFile


def refuse(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["fsync", "write", "open"])
def test_what_cannot_be_written_follows_later_and_is_reported_once(call, tmp_path, monkeypatch, capsys):
    file = GrowingFile(tmp_path / "log.txt")
    file.add(b"first\n")
    file.flush()
    with monkeypatch.context() as patch:
        if call == "fsync":
            patch.setattr(os, "fsync", refuse)
        else:
            opened = refuse if call == "open" else HalfFull
            patch.setattr(records, "open", opened, raising=False)
        for line in (b"second\n", b"third\n"):
            file.add(line)
            file.flush()
            assert file.path.read_bytes() == b"first\n"  # no incomplete line
        with pytest.raises(OSError):
            file.close()
    assert capsys.readouterr().err == (
        f"error: {file.path} cannot be written: No space left on device; training continues, it follows later\n"
    )
    file.add(b"fourth\n")
    file.close()
    assert file.path.read_bytes() == b"first\nsecond\nthird\nfourth\n" and not file.unwritten


class HalfFull(io.FileIO):
    """A file that takes three bytes, then no more."""

    room = 3

    def __init__(self, path, mode, buffering):
        super().__init__(path, mode)

    def write(self, data):
        if not self.room:
            refuse()
        self.room = 0
        return super().write(data[:3])


def test_a_disk_that_takes_little_at_a_time(tmp_path, monkeypatch):
    class Slow(HalfFull):
        def write(self, data):
            return io.FileIO.write(self, data[:2])

    monkeypatch.setattr(records, "open", Slow, raising=False)
    file = GrowingFile(tmp_path / "log.txt")
    file.add(b"a line\n")
    file.close()
    assert file.path.read_bytes() == b"a line\n"


def test_lines_that_an_earlier_process_could_not_write_are_in_the_log_of_the_next(tmp_path, monkeypatch):
    first = RunLog(tmp_path, world(), tensorboard=False)
    first.epoch({"epoch": 0}, 9)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        first.epoch({"epoch": 1}, 19)
    unwritten = first.unwritten
    assert unwritten == '{"epoch": 1}\n' and log_of(tmp_path) == [{"epoch": 0}]
    RunLog(tmp_path, world(), tensorboard=False, epoch=2, step=20, unwritten=unwritten)
    assert log_of(tmp_path) == [{"epoch": 0}, {"epoch": 1}]
    first.epoch({"epoch": 2}, 29)  # had it been written after the save that the next process resumes from
    RunLog(tmp_path, world(), tensorboard=False, epoch=2, step=20, unwritten=unwritten)
    assert log_of(tmp_path) == [{"epoch": 0}, {"epoch": 1}]


def points(folder, name):
    accumulated = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in accumulated.Scalars(name)]


def test_points_and_figures_are_in_tensorboard_after_a_full_disk(tmp_path, monkeypatch, capsys):
    log = RunLog(tmp_path, world(), tensorboard=True)
    log.scalars({"loss": 3.0}, 1)
    log.flush()
    numbers = plt.get_fignums()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        log.scalars({"loss": 2.0}, 2)
        log.figure("drawn", lambda: plt.subplots(figsize=(2, 1))[0], 2)
        log.flush()
        log.flush()
        assert points(tmp_path, "loss") == [(1, 3.0)]
    log.scalars({"loss": 1.0}, 3)
    log.close()
    assert points(tmp_path, "loss") == [(1, 3.0), (2, 2.0), (3, 1.0)]
    (image,) = EventAccumulator(str(tmp_path)).Reload().Images("drawn")
    assert (image.step, image.width / image.height) == (2, 2) and plt.get_fignums() == numbers
    assert capsys.readouterr().err.count("cannot be written: No space left on device; training continues") == 1


def test_points_of_an_earlier_process_after_the_start_are_dropped_within_the_same_second(tmp_path, monkeypatch):
    monkeypatch.setattr(events.time, "time", lambda: 1_000_000_000.0)
    for start in (0, 2, 1):
        log = RunLog(tmp_path, world(), tensorboard=True, step=start)
        for step in range(start, 4):
            log.scalars({"loss": 10.0 * start + step}, step)
        log.close()
    assert points(tmp_path, "loss") == [(0, 0.0), (1, 11.0), (2, 12.0), (3, 13.0)]


def test_points_reach_the_disk_within_a_minute(tmp_path, monkeypatch):
    log = RunLog(tmp_path, world(), tensorboard=True)
    now = events.time.monotonic()
    monkeypatch.setattr(events.time, "monotonic", lambda: now)
    log.scalars({"loss": 1.0}, 1)
    assert not [*tmp_path.glob("events*")]
    now += 61
    log.scalars({"loss": 2.0}, 2)
    assert points(tmp_path, "loss") == [(1, 1.0), (2, 2.0)]
