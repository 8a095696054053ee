"""A run's state: what is saved when, in timm's own keys, how it is found and continued; one line for misfits."""

import copy
import errno
import os
import time

import pytest
import timm
import torch
from helpers import assert_equal, model_of, one_line, world
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3

from training import checkpoint, checkpoint_files, resuming, saving
from training.log import RunLog
from training.schedule import Schedule
from training.stopping import StopSignals


def state_of(seed=0, steps=0, opt="adamw", sched="cosine", scaler=False, ema=True, fused=None, **kwargs):
    """A TrainState after a few optimizer steps, one per epoch."""
    model = model_of(seed, **kwargs)
    options = {} if fused is None else {"fused": fused}
    optimizer = timm.optim.create_optimizer_v2(model, opt=opt, lr=0.01, momentum=0.9, **options)
    schedule = Schedule(create_scheduler_v2(optimizer, sched=sched, num_epochs=10, warmup_epochs=2)[0], epochs=10)
    average = ModelEmaV3(model, decay=0.5) if ema else None
    state = checkpoint.TrainState(model, average, optimizer, schedule, torch.amp.GradScaler("cpu", enabled=scaler))
    for _ in range(steps):
        train(state)
    return state


def train(state):
    torch.manual_seed(100 + state.epoch)
    state.model.train()(torch.randn(4, 3, 32, 32)).square().sum().backward()
    state.optimizer.step()
    state.optimizer.zero_grad()
    if state.model_ema is not None:
        state.model_ema.update(state.model)
    state.scheduler.step(float(state.epoch))
    state.epoch += 1


def saver_of(state, folder, args=None, **options):
    log = RunLog(None, world(), tensorboard=False)
    return saving.Saver(state, lambda: {"args": args or {}}, folder, log, world(), StopSignals(), **options)


def save(state, folder, accuracies, args=None):
    """What the end of an epoch writes."""
    state.epoch -= 1  # `train` has counted it
    saver = saver_of(state, folder, args)
    saver.end_epoch(state.next_epoch(accuracies))
    saver.close()


def contents(state):
    parts = (state.model, state.model_ema.module, state.optimizer, state.loss_scaler)
    return [*(part.state_dict() for part in (*parts, state.scheduler)), state.epoch, state.best]


# Writing


def test_files_load_without_running_code(tmp_path):
    state = state_of(steps=2)
    args = {
        "lr": 1e-3,
        "scale": [0.08, 1.0],
        "model_kwargs": {"depth": 2},
        "finetune": "",
        "clip_grad": None,
        "eval": False,
    }
    save(state, tmp_path, {"acc1": 50.0, "acc1_ema": 40.0}, args)
    files = {path.name: torch.load(path, weights_only=True) for path in tmp_path.iterdir()}
    assert sorted(files) == ["checkpoint.pth", "checkpoint_best.pth", "checkpoint_best_ema.pth"]
    assert_equal(files["checkpoint.pth"]["model"], state.model.state_dict())
    assert_equal(files["checkpoint_best.pth"]["model"], state.model.state_dict())
    assert_equal(files["checkpoint_best_ema.pth"]["model"], state.model_ema.module.state_dict())
    assert [files[name]["acc1"] for name in ("checkpoint_best.pth", "checkpoint_best_ema.pth")] == [50.0, 40.0]
    assert all(file["epoch"] == 1 and file["args"] == args for file in files.values())


def test_best_files_keep_the_best(tmp_path):
    state = state_of()
    accuracies = [(10.0, 30.0), (20.0, 30.0), (15.0, 40.0)]
    for acc1, acc1_ema in accuracies:
        train(state)
        save(state, tmp_path, {"acc1": acc1, "acc1_ema": acc1_ema})
    assert state.best == {"acc1": 20.0, "acc1_ema": 40.0}
    epochs = {path.name: torch.load(path)["epoch"] for path in tmp_path.iterdir()}
    best = {"checkpoint_best.pth": 1, "checkpoint_best_ema.pth": 2}
    assert epochs == {"checkpoint.pth": 2, "checkpoint.1.pth": 1, **best}


def test_without_an_average_none_is_written(tmp_path):
    state = state_of(steps=1, ema=False)
    save(state, tmp_path, {"acc1": 0.0})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pth", "checkpoint_best.pth"]
    assert "model_ema" not in torch.load(tmp_path / "checkpoint.pth")


def test_plain_timm_loads_the_best_files(tmp_path):
    state = state_of(steps=1)
    save(state, tmp_path, {"acc1": 1.0, "acc1_ema": 1.0})
    kwargs = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 3, "num_classes": 7}
    for file, model in (("checkpoint_best.pth", state.model), ("checkpoint_best_ema.pth", state.model_ema.module)):
        loaded = timm.create_model("deit_tiny_patch16_224", checkpoint_path=str(tmp_path / file), **kwargs)
        assert_equal(loaded.state_dict(), model.state_dict())


def test_weights_that_are_not_finite_are_not_saved(tmp_path, capsys):
    state = state_of(steps=1)
    save(state, tmp_path, {"acc1": 1.0, "acc1_ema": 1.0})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    train(state)
    state.model.blocks[1].mlp.fc1.weight.data[0, 0] = float("nan")
    with pytest.raises(SystemExit, match=r"last checkpoint could not be written: model\.blocks\.1\.mlp\.fc1\.weight"):
        save(state, tmp_path, {"acc1": 2.0, "acc1_ema": 2.0})
    assert "blocks.1.mlp.fc1.weight is not finite; training continues" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_failed_save_is_reported_and_the_next_one_tries_again(tmp_path, monkeypatch, capsys):
    state = state_of(steps=1)
    saver = saver_of(state, tmp_path, steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        saver.after_step()
        saver.writer.wait()
    assert capsys.readouterr().err == (
        f"error: no checkpoint saved in {tmp_path}: [Errno 28] No space left on device; "
        "training continues, the next save tries again\n"
    )
    assert not list(tmp_path.iterdir())
    saver.after_step()
    saver.close()
    assert torch.load(tmp_path / checkpoint.LAST)["epoch"] == 0


def test_best_weights_that_could_not_be_written_are_written_with_the_next_save(tmp_path, monkeypatch):
    state = state_of(steps=1)
    best, best_ema = (copy.deepcopy(part.state_dict()) for part in (state.model, state.model_ema.module))
    saver = saver_of(state, tmp_path, steps=1)
    state.epoch -= 1
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        saver.end_epoch(state.next_epoch({"acc1": 50.0, "acc1_ema": 40.0}))
        saver.writer.wait()
    assert not list(tmp_path.iterdir())
    train(state)
    saver.after_step()
    saver.close()
    for name, weights, acc1 in (("acc1", best, 50.0), ("acc1_ema", best_ema, 40.0)):
        stored = torch.load(tmp_path / checkpoint.BEST[name])
        assert_equal(stored["model"], weights)
        assert (stored["acc1"], stored["epoch"]) == (acc1, 0)
    assert torch.load(tmp_path / checkpoint.LAST)["best"] == {"acc1": 50.0, "acc1_ema": 40.0}
    assert not saver.unwritten_best


def test_a_last_save_that_fails_ends_the_run_with_an_error(tmp_path, monkeypatch, capsys):
    saver = saver_of(state_of(steps=1), tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    saver.end_epoch([])
    with pytest.raises(SystemExit, match=r"error: the last checkpoint could not be written: .*No space left"):
        saver.close()
    assert capsys.readouterr().err.count("no checkpoint saved") == 1  # the second attempt is that of the last line


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(("steps", "saved_at"), [(0, []), (1, [1, 2, 3, 4, 5, 6]), (3, [3, 6])])
def test_saves_come_every_so_many_steps(tmp_path, steps, saved_at):
    state = state_of()
    saver = saver_of(state, tmp_path, steps=steps, keep=9)
    for step in range(1, 7):
        state.step = step
        saver.after_step()
        saver.writer.wait()
    stored = [torch.load(path)["step"] for path in checkpoint_files.candidates(tmp_path / checkpoint.LAST)]
    assert stored == saved_at[::-1]


def test_saves_come_every_so_many_minutes(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(saving.time, "monotonic", lambda: now)
    state = state_of()
    saver = saver_of(state, tmp_path, minutes=10, keep=9)
    for minute in range(1, 31):
        state.step, now = minute, 60.0 * minute
        saver.after_step()
        saver.writer.wait()
    stored = [torch.load(path)["step"] for path in checkpoint_files.candidates(tmp_path / checkpoint.LAST)]
    assert stored == [30, 20, 10]


def test_what_is_saved_is_the_state_of_that_moment(tmp_path):
    state = state_of(steps=1)
    saver = saver_of(state, tmp_path)
    saver.writer.submit(lambda: time.sleep(0.3))
    expected = copy.deepcopy(state.model.state_dict())
    saver.end_epoch([])
    train(state)
    saver.close()
    assert_equal(torch.load(tmp_path / checkpoint.LAST)["model"], expected)


def test_the_newest_complete_checkpoint_is_found(tmp_path, capsys):
    assert resuming.find_newest(tmp_path) is None
    state = state_of()
    for _ in range(3):
        train(state)
        save(state, tmp_path, {"acc1": 0.0, "acc1_ema": 0.0})
    newest, previous = checkpoint_files.candidates(tmp_path / checkpoint.LAST)
    assert resuming.find_newest(tmp_path) == newest
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    assert resuming.find_newest(tmp_path) == previous
    assert torch.load(previous)["epoch"] == 1
    assert "damaged checkpoint" in capsys.readouterr().err and not newest.exists()
    assert (tmp_path / "checkpoint.pth.damaged").read_bytes() == content
    torch.save({"model": {}}, newest)
    assert resuming.find_newest(tmp_path) == newest


# Resuming


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler")
@pytest.mark.parametrize(("opt", "sched"), [("adamw", "cosine"), ("sgd", "plateau")])
@pytest.mark.parametrize("scaler", [False, True])
def test_a_restored_state_is_the_saved_one(tmp_path, opt, sched, scaler):
    saved = state_of(steps=3, opt=opt, sched=sched, scaler=scaler)
    if scaler:
        saved.loss_scaler.load_state_dict(saved.loss_scaler.state_dict() | {"scale": 128.0, "_growth_tracker": 5})
    save(saved, tmp_path, {"acc1": 12.5, "acc1_ema": 25.0})
    path = str(tmp_path / checkpoint.LAST)
    restored = state_of(seed=1, opt=opt, sched=sched, scaler=scaler)
    restored.restore(resuming.load(path), path)
    assert_equal(contents(saved), contents(restored))
    assert (restored.epoch, restored.best) == (3, {"acc1": 12.5, "acc1_ema": 25.0})
    for state in (saved, restored):
        train(state)
    assert_equal(contents(saved), contents(restored))


def saved_run(tmp_path, **kwargs):
    save(state_of(steps=1, **kwargs), tmp_path, {"acc1": 1.0, "acc1_ema": 1.0})
    return str(tmp_path / checkpoint.LAST)


def test_an_average_that_was_not_kept_starts_from_the_weights(tmp_path):
    path = saved_run(tmp_path, ema=False)
    state = state_of(seed=1)
    state.restore(resuming.load(path), path)
    assert_equal(state.model_ema.module.state_dict(), state.model.state_dict())


def test_loss_scaling_may_start_with_the_resumed_run(tmp_path):
    path = saved_run(tmp_path, scaler=False)
    state = state_of(seed=1, scaler=True)
    state.restore(resuming.load(path), path)
    assert state.epoch == 1


def test_best_weights_alone_cannot_be_resumed(tmp_path):
    saved_run(tmp_path)
    path = str(tmp_path / checkpoint.BEST["acc1"])
    with pytest.raises(SystemExit) as caught:
        resuming.find_checkpoint(path, "", world())
    one_line(caught, path, "optimizer", "--finetune")


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"embed_dim": 48}, "blocks.0.attn.proj.bias is [24] in the file and [48] in the model, and "),
        ({"depth": 3}, "blocks.2.attn.proj.bias is not in the file"),
        ({"depth": 1}, "blocks.1.attn.proj.bias is not in the model"),
        ({"num_classes": 5}, "head.bias is [7] in the file and [5] in the model"),
        ({"opt": "sgd"}, "optimizer"),
    ],
    ids=str,
)
def test_a_run_of_another_shape_cannot_be_resumed(tmp_path, kwargs, named):
    path = saved_run(tmp_path)
    state = state_of(**kwargs)
    with pytest.raises(SystemExit) as caught:
        state.restore(resuming.load(path), path)
    one_line(caught, "--resume", path, named)


@pytest.mark.parametrize(("written", "own"), [(False, True), (True, False)])
def test_a_run_resumes_with_a_fused_optimizer_or_without(written, own):
    """The flag of this run counts, and it is there before the state is, whose place depends on it."""
    first, then = state_of(steps=2, fused=written), state_of(fused=own)
    seen, load = [], then.optimizer.load_state_dict
    then.optimizer.load_state_dict = lambda state: seen.append(state["param_groups"][0]["fused"]) or load(state)
    then.restore(first.state_dict(world()), "x")
    assert seen == [own] and then.optimizer.param_groups[0]["fused"] == own
    assert_equal(then.optimizer.state_dict()["state"], first.optimizer.state_dict()["state"])
