"""Sealed files: read by torch and timm, every change noticed; failures and stops at any point leave a whole file."""

import errno
import gc
import os
import subprocess
import sys
import textwrap
import threading
import tracemalloc
import weakref
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import timm
import torch

from training import checkpoint_files as files
from training.run_folder import remove_temporary_files

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def quick_flushes(monkeypatch):
    """A flush that is not done is not seen here, but for the order of the calls."""
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


# reading


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_a_sealed_file(tmp_path, mmap):
    path = written(tmp_path, 1, 1)
    loaded = torch.load(path, weights_only=True, mmap=mmap)
    assert loaded["epoch"] == 1
    for name, tensor in state_of(1)["model"].items():
        assert torch.equal(loaded["model"][name], tensor)


def test_timm_and_zip_tools_read_a_sealed_file(tmp_path):
    path = written(tmp_path, 1, 1)
    assert torch.equal(timm.models.load_state_dict(str(path), weights_only=True)["weight"], torch.ones(3, 5))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"sha256:")


def test_the_file_is_torchs_own_but_for_the_seal(tmp_path):
    files.write(state_of(1), tmp_path / "sealed.pth")
    with open(tmp_path / "plain.pth", "wb") as file:
        torch.save(state_of(1), file)
    sealed, plain = (tmp_path / "sealed.pth").read_bytes(), (tmp_path / "plain.pth").read_bytes()
    assert sealed[: len(plain) - 2] == plain[:-2]
    assert len(sealed) == len(plain) + 71


# verification


def test_every_changed_byte_is_noticed(tmp_path):
    path = written(tmp_path, 1, 1)
    whole = path.read_bytes()
    with open(path, "r+b", buffering=0) as file:
        for position, byte in enumerate(whole):
            for change in (0x01, 0x20, 0xFF) if position > len(whole) - 100 else (0x01,):  # 0x20: a is A
                os.pwrite(file.fileno(), bytes([byte ^ change]), position)
                with pytest.raises(files.DamagedFile) as caught:
                    files.verify(path)
                assert not isinstance(caught.value, files.UnsealedFile)
            os.pwrite(file.fileno(), bytes([byte]), position)
    files.verify(path)


def test_every_truncation_and_every_addition_is_noticed(tmp_path):
    path = written(tmp_path, 1, 1)
    whole = path.read_bytes()
    sizes = {*range(0, len(whole), 7), *range(len(whole) - 100, len(whole))}
    for other in [*(whole[:size] for size in sizes), whole + b"\0", whole + whole, b"\0" * len(whole)]:
        path.write_bytes(other)
        with pytest.raises(files.DamagedFile, match=r"does not end with a checksum|does not match") as caught:
            files.verify(path)
        assert not isinstance(caught.value, files.UnsealedFile)


def test_a_file_without_a_seal_is_told_apart(tmp_path):
    torch.save(state_of(1), tmp_path / "plain.pth")
    with pytest.raises(files.UnsealedFile, match="no checksum"):
        files.verify(tmp_path / "plain.pth")


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


# rotation


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


# failures


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


class Disk:
    """Stands for a raw file: takes `room` bytes, then raises `error`; at most `most` bytes a call."""

    def __init__(self, room=2**40, error=None, most=2**30):
        self.room, self.error, self.most = room, error, most

    def open(self, *args, **kwargs):
        self.file = open(*args, **kwargs)  # noqa: SIM115
        return self

    def write(self, data):
        size = min(len(data), self.most, self.room)
        if size == 0 and self.error:
            raise self.error
        self.room -= size
        return self.file.write(data[:size])

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_full_disk_leaves_the_old_files(tmp_path, monkeypatch, code):
    path = written(tmp_path, 3, 2)
    before, size = folder_of(tmp_path), path.stat().st_size
    for room in [*range(0, size, 37), size - 72, size - 71, size - 1]:
        disk = Disk(room, OSError(code, os.strerror(code)))
        monkeypatch.setattr(files, "open", disk.open, raising=False)
        with pytest.raises(OSError) as caught:
            files.write(state_of(4), path, 2)
        assert caught.value.errno == code
        assert disk.file.closed
        assert folder_of(tmp_path) == before


@pytest.mark.parametrize("most", [1, 10, 1000])
def test_a_disk_that_takes_little_at_a_time_is_written_in_full(tmp_path, monkeypatch, most):
    monkeypatch.setattr(files, "open", Disk(most=most).open, raising=False)
    path = written(tmp_path, 1, 1)
    monkeypatch.undo()
    assert epoch_in(path) == 1


def test_a_disk_that_takes_nothing_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "open", Disk(room=100).open, raising=False)
    with pytest.raises(OSError) as caught:
        written(tmp_path, 1, 1)
    assert caught.value.errno == errno.EIO
    assert folder_of(tmp_path) == {}


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


def test_a_folder_that_cannot_be_flushed_is_told_with_the_new_file_in_place(tmp_path, monkeypatch):
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


CRASH = """
    import os, shutil, sys, torch
    from pathlib import Path
    from training import checkpoint_files as files

    os.fsync = os.fstat  # quicker; a process that ends loses nothing
    originals = {name: getattr(os, name) for name in ("fsync", "link", "replace")}

    def state(epoch): return {"model": {"weight": torch.full((3, 5), float(epoch))}, "epoch": epoch}

    def refuse(*args): raise PermissionError

    class Disk:
        writes = 0
        def __init__(self, *args, **kwargs): self.file = open(*args, **kwargs); passed()
        def seek(self, *args): return point(self.file.seek)(*args)
        def write(self, data):
            self.writes += 1
            return (self.file.write if self.writes % 10 else point(self.file.write))(data)
        def __getattr__(self, name): return getattr(self.file, name)
        def __enter__(self): return self
        def __exit__(self, *error): self.file.close()

    def point(call):
        def stopping(*args):
            result = call(*args)
            passed()
            return result
        return stopping

    def passed():
        global left
        left -= 1
        if left == 0:
            os._exit(9)

    def stop_everywhere(path, keep):
        for epoch in range(1, keep + 1):
            files.write(state(epoch), path / "0" / "checkpoint.pth", keep)
        for stop in range(1, 1000):  # each time one point later, in a child, until the write is through
            folder = path / str(stop)
            shutil.copytree(path / "0", folder)
            child = os.fork()
            if not child:
                global left
                left = stop
                files.open = Disk
                for name in originals:
                    setattr(os, name, point(getattr(os, name)))
                files.write(state(9), folder / "checkpoint.pth", keep)
                os._exit(0)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert code in (0, 9), code
            if not code:
                return

    for links in (True, False):
        os.link = originals["link"] if links else refuse
        for keep in (1, 2, 3):
            folder = Path(sys.argv[1], f"{keep}-{links}")
            (folder / "0").mkdir(parents=True)
            stop_everywhere(folder, keep)
"""


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Folders of writes that were stopped, each one a point later than the one before."""
    folder = tmp_path_factory.mktemp("stopped")
    subprocess.run([sys.executable, "-c", textwrap.dedent(CRASH), folder], cwd=ROOT, check=True, timeout=300)
    return folder


@pytest.mark.parametrize("hard_links", [True, False])
@pytest.mark.parametrize("keep", [1, 2, 3])
def test_a_stop_anywhere_leaves_a_whole_file(stopped, keep, hard_links):
    folders = sorted((stopped / f"{keep}-{hard_links}").iterdir(), key=lambda folder: int(folder.name))[1:]
    assert len(folders) > 8
    outcomes = []
    for folder in folders:
        path = folder / "checkpoint.pth"
        epochs = [epoch_in(file) for file in files.candidates(path)]  # every one of them is whole
        assert epochs[0] in (keep, 9) and epochs == sorted(epochs, reverse=True)
        assert path.exists() or (not hard_links and keep > 1)
        outcomes.append(epochs[0])
        remove_temporary_files(folder)
        assert [epoch_in(file) for file in files.candidates(path)] == epochs
        files.write(state_of(10), path, keep)  # the next run goes on from there, and loses nothing it could keep
        remove_temporary_files(folder)
        kept = [epoch_in(file) for file in files.candidates(path)]
        assert kept == sorted({10, *epochs}, reverse=True)[:keep]
    assert outcomes == sorted(outcomes) and {*outcomes} == {keep, 9}


# copies and names


def test_a_copy_does_not_follow_the_original():
    whole = torch.arange(12.0).reshape(3, 4)
    original = OrderedDict(
        whole=whole,
        row=whole[1],
        turned=whole.t(),
        same=whole,
        spread=torch.ones(1).expand(3),
        parameter=torch.nn.Parameter(torch.ones(2)),
        nested=[torch.tensor(1), (torch.tensor(2), {"x": torch.zeros(2)}), [3]],
        plain={"lr": 0.1, "name": "a", "none": None},
        empty=torch.empty(0, 3),
        half=torch.ones(2, dtype=torch.bfloat16),
    )
    original._metadata = {"version": 1}
    copies = files.copied(original)
    assert type(copies) is OrderedDict and copies._metadata == {"version": 1}
    assert [*copies] == [*original]
    expected = torch.arange(12.0).reshape(3, 4)
    with torch.no_grad():
        for tensor in (whole, original["parameter"], original["nested"][0], original["nested"][1][1]["x"]):
            tensor.add_(100)
        original["nested"][1][0].fill_(9)
    original["nested"][2].append(4)
    original["plain"]["lr"] = 5
    original["plain"]["more"] = 1
    del original["half"]
    assert torch.equal(copies["whole"], expected) and torch.equal(copies["same"], expected)
    assert torch.equal(copies["row"], expected[1]) and torch.equal(copies["turned"], expected.t())
    assert copies["row"].untyped_storage().nbytes() == 16  # the row alone, not what it is a view of
    assert torch.equal(copies["spread"], torch.ones(3))
    assert torch.equal(copies["parameter"], torch.ones(2)) and not copies["parameter"].requires_grad
    first, second, third = copies["nested"]
    assert first == 1 and isinstance(second, tuple) and second[0] == 2 and third == [3]
    assert torch.equal(second[1]["x"], torch.zeros(2))
    assert copies["plain"] == {"lr": 0.1, "name": "a", "none": None}
    assert copies["empty"].shape == (0, 3) and copies["half"].dtype == torch.bfloat16
    copies["spread"][0] = 7
    assert copies["spread"].tolist() == [7, 1, 1] and original["spread"].tolist() == [1, 1, 1]


def test_a_copy_of_a_training_state_is_the_state():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    tree = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    copies = files.copied(tree)
    torch.testing.assert_close(copies, tree, rtol=0, atol=0)
    before = files.copied(copies)
    optimizer.step()
    torch.testing.assert_close(copies, before, rtol=0, atol=0)
    assert not torch.equal(model[0].weight, copies["model"]["0.weight"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_first_tensor_that_is_not_finite_is_named(value):
    def bad():
        return torch.tensor([[0.0, 1.0], [value, 2.0]])

    good = {"count": torch.tensor([1, 2]), "flag": torch.tensor(True), "lr": float("nan"), "empty": torch.empty(0)}
    assert files.first_non_finite(good | {"w": torch.full((2,), 3e38)}) is None  # whose sum is not finite
    assert files.first_non_finite({"model": good | {"blocks.0.attn.qkv.weight": bad(), "z": bad()}}) == (
        "model.blocks.0.attn.qkv.weight"
    )
    assert files.first_non_finite({"optimizer": {"state": {7: {"exp_avg": bad()}}}}) == "optimizer.state.7.exp_avg"
    assert files.first_non_finite({"a": [torch.ones(1), (good, bad())]}) == "a.1.1"
    assert files.first_non_finite({"a": bad().bfloat16()}) == "a"


# the background writer


@pytest.fixture
def writer():
    errors = []
    writer = files.BackgroundWriter(lambda error: errors.append((error, threading.current_thread())))
    writer.errors = errors
    yield writer
    writer.close()
    assert not any(thread.name == "background writer" for thread in threading.enumerate())


def test_a_job_runs_beside_the_caller_and_one_at_a_time(writer):
    gates = [threading.Event() for _ in range(3)]
    started, threads = [], []

    def job(number):
        started.append(number)
        threads.append(threading.current_thread())
        assert gates[number].wait(20)

    assert not writer.busy
    writer.submit(lambda: job(0))
    assert writer.busy  # and this line is reached while the job waits
    second = threading.Thread(target=lambda: writer.submit(lambda: job(1)))
    second.start()
    second.join(0.2)
    assert second.is_alive() and started == [0]
    gates[0].set()
    second.join(20)
    assert not second.is_alive() and not gates[1].is_set()  # it waited for the first job, not for its own
    gates[1].set()
    writer.wait()
    assert started == [0, 1] and not writer.busy and not any(thread.is_alive() for thread in threads)
    assert threading.current_thread() not in threads and not any(thread.daemon for thread in threads)
    assert writer.errors == []


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), SystemExit("no"), KeyboardInterrupt()])
@pytest.mark.parametrize("call", ["submit", "poll", "wait", "close"])
def test_an_error_is_told_once_in_the_callers_thread(writer, error, call):
    def fail():
        raise error

    writer.submit(fail)
    writer._thread.join()
    assert not writer.errors
    done = []
    if call == "submit":
        writer.submit(lambda: done.append(1))
    else:
        getattr(writer, call)()
    assert writer.errors == [(error, threading.current_thread())]
    writer.submit(lambda: done.append(2))
    writer.poll()
    writer.wait()
    assert len(writer.errors) == 1 and done[-1] == 2


def test_poll_waits_for_nothing(writer):
    gate = threading.Event()
    writer.submit(lambda: gate.wait(20))
    writer.poll()
    assert writer.busy
    gate.set()


def test_a_callback_that_raises_loses_nothing():
    def stop(error):
        raise SystemExit(str(error))

    writer = files.BackgroundWriter(stop)
    writer.submit(refuse(errno.EIO))
    with pytest.raises(SystemExit):
        writer.wait()
    done = []
    writer.submit(lambda: done.append(1))
    writer.close()
    assert done == [1]


def test_a_failed_job_does_not_hold_its_state(writer):
    class State(dict):
        pass

    def submit():
        state = State()
        references.append(weakref.ref(state))

        def job():
            local = state
            raise OSError(errno.EIO, str(local))

        writer.submit(job)

    references = []
    gc.disable()
    try:
        submit()
        writer.wait()
        assert len(writer.errors) == 1 and references[0]() is None
    finally:
        gc.enable()


def test_without_a_thread_the_job_runs_all_the_same(writer, monkeypatch):
    def no_thread(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_thread)
    done = []
    writer.submit(lambda: done.append(1))
    assert done == [1] and not writer.busy
    writer.submit(refuse(errno.EIO))
    writer.wait()
    assert len(writer.errors) == 1


def test_files_written_in_the_background(writer, tmp_path):
    path = tmp_path / "checkpoint.pth"
    weight = torch.zeros(1000)
    for epoch in range(1, 6):
        weight.fill_(epoch)
        state = files.copied({"model": {"weight": weight}, "epoch": epoch})
        writer.submit(lambda state=state: files.write(state, path))
    weight.fill_(-1)
    writer.wait()
    assert [epoch_in(file) for file in files.candidates(path)] == [5, 4]
    assert torch.load(path, weights_only=True)["model"]["weight"].unique().tolist() == [5]
    assert writer.errors == []
