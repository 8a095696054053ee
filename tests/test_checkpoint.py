"""Checkpoint files: whole or absent, safe to load, timm's own keys; weights in every layout; one line for misfits."""

import argparse
import os
import pickle
import re
from urllib.error import URLError

import pytest
import safetensors.torch
import timm
import torch
from helpers import TINY_MODEL
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3

import checkpoint
from models import build_model

TINY = {"name": "deit_tiny_patch16_224_diverse", "num_classes": 7, **TINY_MODEL}


def model_of(seed=0, **kwargs):
    torch.manual_seed(seed)
    return build_model(**TINY | kwargs)


def state_of(seed=0, steps=0, opt="adamw", sched="cosine", scaler=False, ema=True, **kwargs):
    """A TrainState after a few optimizer steps, one per epoch."""
    model = model_of(seed, **kwargs)
    optimizer = timm.optim.create_optimizer_v2(model, opt=opt, lr=0.01, momentum=0.9)
    scheduler, _ = create_scheduler_v2(optimizer, sched=sched, num_epochs=10, warmup_epochs=2)
    average = ModelEmaV3(model, decay=0.5) if ema else None
    state = checkpoint.TrainState(model, average, optimizer, scheduler, torch.amp.GradScaler("cpu", enabled=scaler))
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
    state.scheduler.step(state.epoch, metric=state.epoch)
    state.epoch += 1


def assert_equal(first, second):
    """Nested dicts and lists of tensors and numbers are the same, bit for bit."""
    assert type(first) is type(second)
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_equal(first[key], second[key])
    elif isinstance(first, list | tuple):
        for one, other in zip(first, second, strict=True):
            assert_equal(one, other)
    elif torch.is_tensor(first):
        assert torch.equal(first, second)
    else:
        assert first == second


def contents(state):
    parts = (state.model, state.model_ema.module, state.optimizer, state.loss_scaler)
    schedule = {key: value for key, value in state.scheduler.state_dict().items() if key != "metric"}
    return [*(part.state_dict() for part in parts), schedule, state.epoch, state.best]


def one_line(caught, *named):
    """The message of a SystemExit, after checking its form."""
    line = str(caught.value)
    assert line.startswith("error: ") and "\n" not in line
    for word in named:
        assert str(word) in line
    return line


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
    state.save(tmp_path, {"acc1": 50.0, "acc1_ema": 40.0}, args)
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
        state.save(tmp_path, {"acc1": acc1, "acc1_ema": acc1_ema}, {})
    assert state.best == {"acc1": 20.0, "acc1_ema": 40.0}
    epochs = {path.name: torch.load(path)["epoch"] for path in tmp_path.iterdir()}
    assert epochs == {"checkpoint.pth": 2, "checkpoint_best.pth": 1, "checkpoint_best_ema.pth": 2}


def test_without_an_average_none_is_written(tmp_path):
    state = state_of(ema=False)
    state.save(tmp_path, {"acc1": 0.0}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pth", "checkpoint_best.pth"]
    assert "model_ema" not in torch.load(tmp_path / "checkpoint.pth")


def test_plain_timm_loads_the_best_files(tmp_path):
    state = state_of(steps=1)
    state.save(tmp_path, {"acc1": 1.0, "acc1_ema": 1.0}, {})
    kwargs = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 3, "num_classes": 7}
    for file, model in (("checkpoint_best.pth", state.model), ("checkpoint_best_ema.pth", state.model_ema.module)):
        loaded = timm.create_model("deit_tiny_patch16_224", checkpoint_path=str(tmp_path / file), **kwargs)
        assert_equal(loaded.state_dict(), model.state_dict())


def half_written(state, file):
    file.write(b"half of it")
    raise OSError("No space left on device")


def refuse(*_):
    raise OSError("power cut")


@pytest.mark.parametrize(("where", "name", "broken"), [(torch, "save", half_written), (os, "replace", refuse)])
def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch, where, name, broken):
    path = tmp_path / "checkpoint.pth"
    checkpoint.save({"model": {"weight": torch.ones(3)}}, path)
    monkeypatch.setattr(where, name, broken)
    with pytest.raises(OSError):
        checkpoint.save({"model": {"weight": torch.zeros(3)}}, path)
    assert_equal(checkpoint.load(str(path), "--resume"), {"model": {"weight": torch.ones(3)}})


def test_a_save_is_flushed_before_it_is_renamed(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda *a: (calls.append("fsync"), fsync(*a)))
    monkeypatch.setattr(os, "replace", lambda *a: (calls.append("replace"), replace(*a)))
    checkpoint.save({"model": {}}, tmp_path / "checkpoint.pth")
    assert calls[:2] == ["fsync", "replace"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pth"]


# Resuming


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler")
@pytest.mark.parametrize(("opt", "sched"), [("adamw", "cosine"), ("sgd", "plateau")])
@pytest.mark.parametrize("scaler", [False, True])
def test_a_restored_state_is_the_saved_one(tmp_path, opt, sched, scaler):
    saved = state_of(steps=3, opt=opt, sched=sched, scaler=scaler)
    if scaler:
        saved.loss_scaler.load_state_dict(saved.loss_scaler.state_dict() | {"scale": 128.0, "_growth_tracker": 5})
    saved.save(tmp_path, {"acc1": 12.5, "acc1_ema": 25.0}, {})
    path = str(tmp_path / checkpoint.LAST)
    restored = state_of(seed=1, opt=opt, sched=sched, scaler=scaler)
    restored.restore(checkpoint.load(path, "--resume"), path)
    assert_equal(contents(saved), contents(restored))
    assert (restored.epoch, restored.best) == (3, {"acc1": 12.5, "acc1_ema": 25.0})
    for state in (saved, restored):
        train(state)
    assert_equal(contents(saved), contents(restored))


def saved_run(tmp_path, **kwargs):
    state_of(steps=1, **kwargs).save(tmp_path, {"acc1": 1.0, "acc1_ema": 1.0}, {})
    return str(tmp_path / checkpoint.LAST)


def test_an_average_that_was_not_kept_starts_from_the_weights(tmp_path):
    path = saved_run(tmp_path, ema=False)
    state = state_of(seed=1)
    state.restore(checkpoint.load(path, "--resume"), path)
    assert_equal(state.model_ema.module.state_dict(), state.model.state_dict())


def test_loss_scaling_may_start_with_the_resumed_run(tmp_path):
    path = saved_run(tmp_path, scaler=False)
    state = state_of(seed=1, scaler=True)
    state.restore(checkpoint.load(path, "--resume"), path)
    assert state.epoch == 1


def test_best_weights_alone_cannot_be_resumed(tmp_path):
    saved_run(tmp_path)
    path = str(tmp_path / checkpoint.BEST["acc1"])
    with pytest.raises(SystemExit) as caught:
        state_of().restore(checkpoint.load(path, "--resume"), path)
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
        state.restore(checkpoint.load(path, "--resume"), path)
    one_line(caught, "--resume", path, named)


# Damaged and foreign files


class Code:
    """A pickle that would make a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def damaged(tmp_path, kind):
    path = tmp_path / "file.pth"
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("no checkpoint\n" * 100)
    elif kind == "truncated":
        torch.save({"model": model_of().state_dict()}, path)
        path.write_bytes(path.read_bytes()[:-20_000])
    elif kind == "code":
        torch.save({"model": model_of().state_dict(), "args": Code(tmp_path / "ran")}, path)
    elif kind == "old pickle":
        path.write_bytes(pickle.dumps({"model": Code(tmp_path / "ran")}, protocol=2))
    elif kind in CONTENTS:
        torch.save(CONTENTS[kind], path)
    return path


CONTENTS = {
    "list": [1, 2],
    "tensor": torch.zeros(3),
    "number as model": {"model": 3},
    "numbers as weights": {"model": {"head.weight": 3}},
    "no weights": {"model": {}},
}
DAMAGES = ["missing", "folder", "empty", "text", "truncated", "code", "old pickle", *CONTENTS]


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_files_as_weights(tmp_path, kind):
    path = damaged(tmp_path, kind)
    with pytest.raises(SystemExit) as caught:
        checkpoint.load_weights(model_of(), str(path), "--finetune")
    one_line(caught, "--finetune", path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_files_as_a_run(tmp_path, kind):
    path = damaged(tmp_path, kind)
    with pytest.raises(SystemExit) as caught:
        checkpoint.load_model_and_ema(model_of(), None, checkpoint.load(str(path), "--resume"), str(path))
    one_line(caught, "--resume", path)
    assert not (tmp_path / "ran").exists()


def test_damaged_safetensors(tmp_path):
    path = tmp_path / "file.safetensors"
    path.write_bytes(b"\x00" * 50)
    with pytest.raises(SystemExit) as caught:
        checkpoint.load_weights(model_of(), str(path), "--finetune")
    one_line(caught, "--finetune", path)


# Weights to start from

LAYOUTS = {
    "bare": lambda weights: weights,
    "model": lambda weights: {"model": weights, "epoch": 3},
    "state_dict": lambda weights: {"state_dict": weights, "arch": "deit"},
    "module": lambda weights: {"module." + name: value for name, value in weights.items()},
    "compiled": lambda weights: {"state_dict": {"_orig_mod." + name: value for name, value in weights.items()}},
    "deit": lambda weights: {"model": weights, "args": argparse.Namespace(lr=1e-3, scale=[0.08, 1])},
    "with average": lambda weights: {
        "model": weights,
        "model_ema": {name: value + 1 for name, value in weights.items()},
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_weights(tmp_path, layout):
    source, model = model_of(1), model_of(2)
    torch.save(LAYOUTS[layout](source.state_dict()), tmp_path / "weights.pth")
    assert checkpoint.load_weights(model, str(tmp_path / "weights.pth"), "--finetune") == []
    assert_equal(model.state_dict(), source.state_dict())


def test_safetensors(tmp_path):
    source, model = model_of(1), model_of(2)
    safetensors.torch.save_file(source.state_dict(), tmp_path / "weights.safetensors")
    assert checkpoint.load_weights(model, str(tmp_path / "weights.safetensors"), "--finetune") == []
    assert_equal(model.state_dict(), source.state_dict())


def saved_weights(tmp_path, model):
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    return str(tmp_path / "weights.pth")


@pytest.mark.parametrize(
    ("kwargs", "heads"),
    [
        ({}, ("head",)),
        ({"name": "deit_tiny_distilled_patch16_224"}, ("head", "head_dist")),
    ],
)
def test_a_head_of_another_size_is_dropped_and_said(tmp_path, kwargs, heads):
    source, model = model_of(1, **kwargs), model_of(2, num_classes=5, **kwargs)
    own = {name: value.clone() for name, value in model.state_dict().items()}
    notes = checkpoint.load_weights(model, saved_weights(tmp_path, source), "--finetune")
    dropped = {f"{head}.{part}" for head in heads for part in ("weight", "bias")}
    assert {note.split()[0] for note in notes} == dropped
    assert all("dropped" in note and "[7" in note and "[5" in note for note in notes)
    for name, value in model.state_dict().items():
        assert torch.equal(value, own[name] if name in dropped else source.state_dict()[name])


def test_the_head_of_a_convolutional_net_is_dropped_too(tmp_path):
    source, model = (build_model("resnet10t", num_classes, 32) for num_classes in (7, 5))
    notes = checkpoint.load_weights(model, saved_weights(tmp_path, source), "--finetune")
    assert sorted(note.split()[0] for note in notes) == ["fc.bias", "fc.weight"]
    assert torch.equal(model.conv1[0].weight, source.conv1[0].weight)


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224_diverse", "deit_tiny_distilled_patch16_224"])
def test_position_embedding_is_resampled_and_said(tmp_path, name):
    source, model = model_of(1, name=name, input_size=48), model_of(2, name=name)
    notes = checkpoint.load_weights(model, saved_weights(tmp_path, source), "--finetune")
    prefix = model.num_prefix_tokens
    assert notes == [f"pos_embed resampled to [1, {prefix + 16}, 24]"]
    assert torch.equal(model.pos_embed[:, :prefix], source.pos_embed[:, :prefix])
    grid = source.pos_embed[:, prefix:].reshape(1, 6, 6, 24).permute(0, 3, 1, 2)
    resampled = torch.nn.functional.interpolate(grid, size=(4, 4), mode="bicubic", antialias=True)
    torch.testing.assert_close(model.pos_embed[:, prefix:], resampled.flatten(2).mT)
    assert torch.equal(model.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)


def test_patch_embedding_is_resampled_and_said(tmp_path):
    source, model = model_of(1, input_size=64, patch_size=16), model_of(2)
    notes = checkpoint.load_weights(model, saved_weights(tmp_path, source), "--finetune")
    assert notes == ["patch_embed.proj.weight resampled to [24, 3, 8, 8]"]
    assert not torch.equal(model.patch_embed.proj.weight, model_of(2).patch_embed.proj.weight)


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"embed_dim": 48}, "blocks.0.attn.proj.bias is [24] in the file and [48] in the model, and "),
        ({"depth": 3}, "blocks.2.attn.proj.bias is not in the file, and "),
        ({"depth": 1}, "blocks.1.attn.proj.bias is not in the model, and "),
        ({"name": "deit_tiny_distilled_patch16_224"}, "dist_token"),
        ({"name": "resnet10t"}, "does not fit ResNet"),
    ],
    ids=str,
)
def test_weights_of_another_shape(tmp_path, kwargs, named):
    path = saved_weights(tmp_path, model_of())
    model = build_model("resnet10t", 7, 32) if kwargs.get("name") == "resnet10t" else model_of(**kwargs)
    with pytest.raises(SystemExit) as caught:
        checkpoint.load_weights(model, path, "--finetune")
    one_line(caught, "--finetune", path, named)


def test_a_teacher_keeps_its_head(tmp_path):
    path = saved_weights(tmp_path, model_of())
    with pytest.raises(SystemExit) as caught:
        checkpoint.load_weights(model_of(num_classes=5), path, "--teacher-path", new_head=False)
    one_line(caught, "--teacher-path", path, "head.bias is [7] in the file and [5] in the model")


def test_a_failed_load_leaves_the_model_alone(tmp_path):
    path = saved_weights(tmp_path, model_of(1, depth=3))
    model = model_of(2)
    with pytest.raises(SystemExit):
        checkpoint.load_weights(model, path, "--finetune")
    assert_equal(model.state_dict(), model_of(2).state_dict())


def test_weights_from_an_address(tmp_path, monkeypatch):
    source, model = model_of(1), model_of(2)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(
        torch.hub, "download_url_to_file", lambda url, path, progress: torch.save(source.state_dict(), path)
    )
    checkpoint.load_weights(model, "https://example.org/weights.pth", "--teacher-path")
    assert_equal(model.state_dict(), source.state_dict())


def test_an_address_out_of_reach(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise URLError("no route")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(SystemExit, match=re.escape("--teacher-path https://example.org/weights.pth")) as caught:
        checkpoint.load_weights(model_of(), "https://example.org/weights.pth", "--teacher-path")
    one_line(caught)
