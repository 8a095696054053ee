"""Saving beside training: copies that do not follow the original, and one job at a time in a thread."""

import errno
import gc
import os
import threading
import weakref
from collections import OrderedDict

import pytest
import torch

from training import checkpoint_files
from training.background import BackgroundWriter, copy_to_cpu, first_non_finite


def refuse(code):
    def call(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    return call


# Copies and names


def test_a_copy_does_not_follow_the_original():
    complete = torch.arange(12.0).reshape(3, 4)
    original = OrderedDict(
        complete=complete,
        row=complete[1],
        turned=complete.t(),
        same=complete,
        spread=torch.ones(1).expand(3),
        parameter=torch.nn.Parameter(torch.ones(2)),
        nested=[torch.tensor(1), (torch.tensor(2), {"x": torch.zeros(2)}), [3]],
        plain={"lr": 0.1, "name": "a", "none": None},
        empty=torch.empty(0, 3),
        half=torch.ones(2, dtype=torch.bfloat16),
    )
    original._metadata = {"version": 1}
    copies = copy_to_cpu(original)
    assert type(copies) is OrderedDict and copies._metadata == {"version": 1}
    assert [*copies] == [*original]
    expected = torch.arange(12.0).reshape(3, 4)
    with torch.no_grad():
        for tensor in (complete, original["parameter"], original["nested"][0], original["nested"][1][1]["x"]):
            tensor.add_(100)
        original["nested"][1][0].fill_(9)
    original["nested"][2].append(4)
    original["plain"]["lr"] = 5
    original["plain"]["more"] = 1
    del original["half"]
    assert torch.equal(copies["complete"], expected) and torch.equal(copies["same"], expected)
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
    copies = copy_to_cpu(tree)
    torch.testing.assert_close(copies, tree, rtol=0, atol=0)
    before = copy_to_cpu(copies)
    optimizer.step()
    torch.testing.assert_close(copies, before, rtol=0, atol=0)
    assert not torch.equal(model[0].weight, copies["model"]["0.weight"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_first_tensor_that_is_not_finite_is_named(value):
    def bad():
        return torch.tensor([[0.0, 1.0], [value, 2.0]])

    good = {"count": torch.tensor([1, 2]), "flag": torch.tensor(True), "lr": float("nan"), "empty": torch.empty(0)}
    assert first_non_finite(good | {"w": torch.full((2,), 3e38)}) is None  # whose sum is not finite
    assert first_non_finite({"model": good | {"blocks.0.attn.qkv.weight": bad(), "z": bad()}}) == (
        "model.blocks.0.attn.qkv.weight"
    )
    assert first_non_finite({"optimizer": {"state": {7: {"exp_avg": bad()}}}}) == "optimizer.state.7.exp_avg"
    assert first_non_finite({"a": [torch.ones(1), (good, bad())]}) == "a.1.1"
    assert first_non_finite({"a": bad().bfloat16()}) == "a"


# The background writer


@pytest.fixture
def writer():
    errors = []
    writer = BackgroundWriter(lambda error: errors.append((error, threading.current_thread())))
    writer.errors = errors
    yield writer
    writer.wait()
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
@pytest.mark.parametrize("call", ["submit", "poll", "wait"])
def test_an_error_is_reported_once_in_the_callers_thread(writer, error, call):
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

    writer = BackgroundWriter(stop)
    writer.submit(refuse(errno.EIO))
    with pytest.raises(SystemExit):
        writer.wait()
    done = []
    writer.submit(lambda: done.append(1))
    writer.wait()
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


def test_without_a_thread_the_job_still_runs(writer, monkeypatch):
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
        state = copy_to_cpu({"model": {"weight": weight}, "epoch": epoch})
        writer.submit(lambda state=state: checkpoint_files.write(state, path))
    weight.fill_(-1)
    writer.wait()
    assert [torch.load(file)["epoch"] for file in checkpoint_files.candidates(path)] == [5, 4]
    assert torch.load(path, weights_only=True)["model"]["weight"].unique().tolist() == [5]
    assert writer.errors == []
