"""Weights in every layout of timm and DeiT; one line for damage and misfits."""

import argparse
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock
from urllib.error import URLError

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from helpers import TINY, assert_equal, make_image_folder, model_of, run_main
from matplotlib import pyplot as plt
from timm.models import register_model
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler

import analyze
from models import build_model, weights
from reports import figures
from training import checkpoint, resuming

# Damaged and foreign files

CONTENTS = {
    "list": [1, 2],
    "tensor": torch.zeros(3),
    "number as model": {"model": 3},
    "numbers as weights": {"model": {"head.weight": 3}},
    "no weights": {"model": {}},
}


def damaged(path, kind):
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("no checkpoint\n" * 100)
    elif kind == "zeros":
        path.write_bytes(b"\x00" * 50)
    elif kind == "truncated":
        torch.save({"model": model_of().state_dict()}, path)
        path.write_bytes(path.read_bytes()[:-20_000])
    elif kind in CONTENTS:
        torch.save(CONTENTS[kind], path)
    return str(path)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("kind", ["missing", "folder", "empty", "text", "zeros", "truncated", *CONTENTS])
def test_damaged_files(tmp_path, kind, suffix):
    path = damaged(tmp_path / f"file.{suffix}", kind)
    with pytest.raises(ValueError) as as_weights:
        weights.load_weights(model_of(), path)
    with pytest.raises(SystemExit) as as_run:
        checkpoint.load_model_and_ema(model_of(), None, resuming.load(path), path)
    for line, start in ((str(as_weights.value), ""), (as_run.value.code, "error: --resume ")):
        assert line.startswith(f"{start}{path}") and "\n" not in line
        assert "code" not in line and "weights_only" not in line and "load failed" not in line


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


def deit_checkpoint(folder, model, average):
    """What DeiT's main.py writes each epoch; returns the path."""
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=1e-3)
    scheduler, _ = create_scheduler_v2(optimizer, num_epochs=3)
    train_step(model, optimizer)
    checkpoint = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": scheduler.state_dict(),
        "epoch": 2,
        "model_ema": average.module.state_dict(),
        "scaler": NativeScaler("cpu").state_dict(),
        "args": argparse.Namespace(model="deit", lr=5e-4, opt_betas=None, output_dir="out", train_mode=True),
    }
    torch.save(checkpoint, folder / "checkpoint.pth")
    return str(folder / "checkpoint.pth")


def timm_checkpoint(folder, model, average):
    """What timm's train.py writes; returns the path."""
    optimizer = timm.optim.create_optimizer_v2(model, opt="sgd", lr=1e-3, momentum=0.9)
    train_step(model, optimizer)
    args = argparse.Namespace(model="deit", opt_betas=[0.9, 0.99], img_size=(32, 32), model_kwargs={"depth": 2})
    saver = CheckpointSaver(model, optimizer, args, average, NativeScaler("cpu"), checkpoint_dir=str(folder))
    saver.save_checkpoint(2, metric=np.float64(71.5))
    return str(folder / "model_best.pth.tar")


def train_step(model, optimizer):
    """So that the optimizer has a state to write."""
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()


WRITERS = {"deit": deit_checkpoint, "timm": timm_checkpoint}


@pytest.mark.parametrize("layout", [*LAYOUTS, "safetensors"])
def test_layouts_of_weights(tmp_path, layout):
    source, model = model_of(1), model_of(2)
    path = str(tmp_path / "weights.pth")
    if layout == "safetensors":
        path = str(tmp_path / "weights.safetensors")
        safetensors.torch.save_file(source.state_dict(), path)
    else:
        torch.save(LAYOUTS[layout](source.state_dict()), path)
    assert weights.load_weights(model, path) == []
    assert_equal(model.state_dict(), source.state_dict())


@pytest.mark.parametrize("layout", ["deit", "timm"])
def test_real_checkpoints_of_deit_and_timm(tmp_path, layout):
    """With the optimizer and all else that their trainers write."""
    source, average = model_of(1), ModelEmaV3(model_of(3))
    path = WRITERS[layout](tmp_path, source, average)
    for use_ema, stored in ((False, source), (True, average.module)):
        model = model_of(2)
        assert weights.load_weights(model, path, use_ema=use_ema) == []
        assert_equal(model.state_dict(), stored.state_dict())
    assert weights.origin(path) == ({}, None, [], False)


@pytest.mark.parametrize("layout", ["deit", "timm"])
def test_commands_take_checkpoints_of_deit_and_timm(tmp_path, capsys, monkeypatch, layout):
    path = WRITERS[layout](tmp_path, model_of(1, num_classes=10), ModelEmaV3(model_of(3, num_classes=10)))
    folder = make_image_folder(tmp_path / "images")
    data = ("--data-set", "IMNET", "--data-path", folder, "--num-classes", "10", "--batch-size", "4")
    teacher = ("--distillation-type", "soft", "--teacher-path", path, "--teacher-model", "deit_tiny_patch16_224_tiny")
    run_main(*TINY, *data, "--finetune", path, *teacher)
    assert "test accuracy: raw" in capsys.readouterr().out
    monkeypatch.setattr(figures, "save", lambda figure, path: plt.close(figure))
    flags = (*TINY, *data, "--ema", "--output-dir", tmp_path / "out")
    analyze.main([path, *map(str, flags)])
    assert "written to" in capsys.readouterr().out


@register_model
def deit_tiny_patch16_224_tiny(pretrained=False, **kwargs):
    """A teacher of the size of these tests."""
    return timm.create_model("deit_tiny_patch16_224", patch_size=8, depth=2, embed_dim=24, num_heads=3, **kwargs)


def saved_weights(tmp_path, model):
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    return str(tmp_path / "weights.pth")


CONVNET = {"name": "resnet10t", "num_classes": 7, "input_size": 32}


@pytest.mark.parametrize(
    ("kwargs", "heads", "build"),
    [
        ({}, ("head",), model_of),
        ({"name": "deit_tiny_distilled_patch16_224"}, ("head", "head_dist"), model_of),
        (CONVNET, ("fc",), build_model),
    ],
)
def test_a_head_of_another_size_is_dropped_and_reported(tmp_path, kwargs, heads, build):
    source, model = build(**kwargs), build(**kwargs | {"num_classes": 5})
    own = {name: value.clone() for name, value in model.state_dict().items()}
    notes = weights.load_weights(model, saved_weights(tmp_path, source))
    dropped = {f"{head}.{parameter}" for head in heads for parameter in ("weight", "bias")}
    assert {note.split()[0] for note in notes} == dropped
    assert all("dropped" in note and "[7" in note and "[5" in note for note in notes)
    for name, value in model.state_dict().items():
        assert torch.equal(value, own[name] if name in dropped else source.state_dict()[name])


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224_diverse", "deit_tiny_distilled_patch16_224"])
def test_position_embedding_is_resampled_and_reported(tmp_path, name):
    source, model = model_of(1, name=name, input_size=48), model_of(2, name=name)
    notes = weights.load_weights(model, saved_weights(tmp_path, source))
    prefix = model.num_prefix_tokens
    assert notes == [f"pos_embed resampled to [1, {prefix + 16}, 24]"]
    assert torch.equal(model.pos_embed[:, :prefix], source.pos_embed[:, :prefix])
    grid = source.pos_embed[:, prefix:].reshape(1, 6, 6, 24).permute(0, 3, 1, 2)
    resampled = torch.nn.functional.interpolate(grid, size=(4, 4), mode="bicubic", antialias=True)
    torch.testing.assert_close(model.pos_embed[:, prefix:], resampled.flatten(2).mT)
    assert torch.equal(model.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)


def test_patch_embedding_is_resampled_and_reported(tmp_path):
    source, model = model_of(1, input_size=64, patch_size=16), model_of(2)
    notes = weights.load_weights(model, saved_weights(tmp_path, source))
    assert notes == ["patch_embed.proj.weight resampled to [24, 3, 8, 8]"]
    assert not torch.equal(model.patch_embed.proj.weight, model_of(2).patch_embed.proj.weight)


MISFITS = {
    "blocks.0.attn.proj.bias is [24] in the file and [48] in the model, and ": {"embed_dim": 48},
    "blocks.2.attn.proj.bias is not in the file, and ": {"depth": 3},
    "blocks.1.attn.proj.bias is not in the model, and ": {"depth": 1},
    "dist_token": {"name": "deit_tiny_distilled_patch16_224"},
    "ResNet: blocks.0": CONVNET,
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_weights_of_another_shape(tmp_path, misfit):
    path = saved_weights(tmp_path, model_of(1))
    kwargs = MISFITS[misfit]
    model = build_model(**kwargs) if kwargs is CONVNET else model_of(2, **kwargs)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"^{path} does not fit .*{re.escape(misfit)}"):
        weights.load_weights(model, path)
    assert_equal({**model.state_dict()}, before)


def test_a_teacher_keeps_its_head(tmp_path):
    path = saved_weights(tmp_path, model_of())
    with pytest.raises(ValueError, match=re.escape("head.bias is [7] in the file and [5] in the model")):
        weights.load_weights(model_of(num_classes=5), path, new_head=False)


ADDRESS = "https://example.org/weights.pth"


def test_weights_from_an_address(tmp_path, monkeypatch):
    source, model = model_of(1), model_of(2)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(
        torch.hub, "download_url_to_file", lambda url, path, progress: torch.save(source.state_dict(), path)
    )
    weights.load_weights(model, ADDRESS)
    assert_equal(model.state_dict(), source.state_dict())


def test_an_address_out_of_reach(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", mock.Mock(side_effect=URLError("no route")))
    with pytest.raises(ValueError, match=f"^{ADDRESS} cannot be downloaded: .*no route"):
        weights.load_weights(model_of(), ADDRESS)


def test_two_addresses_that_end_alike_are_two_files(tmp_path, monkeypatch):
    downloaded = []

    def download(url, path, progress):
        downloaded.append(url)
        Path(path).write_text(url)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    addresses = [f"https://example.org/{name}/checkpoint.safetensors?download=true" for name in ("a", "b")]
    for _ in range(2):
        assert [Path(weights.local_file(address)).read_text() for address in addresses] == addresses
    assert downloaded == addresses
    assert all(weights.local_file(address).endswith("-checkpoint.safetensors") for address in addresses)


def test_processes_that_need_one_address_download_it_once(tmp_path, monkeypatch):
    count = []

    def download(url, path, progress):
        count.append(url)
        time.sleep(0.2)
        Path(path).write_text(url)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with ThreadPoolExecutor(4) as pool:
        files = {*pool.map(weights.local_file, [ADDRESS] * 4)}
    assert len(files) == len(count) == 1
