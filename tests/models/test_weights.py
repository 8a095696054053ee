"""Weights in every layout of timm and DeiT; files that hold code never run it; one line for damage and misfits."""

import argparse
import io
import json
import pickle
import re
import shutil
import tarfile
import zipfile
from urllib.error import URLError

import numpy as np
import pytest
import safetensors.torch
import timm
import timm.models._hub
import torch
from helpers import (
    BRIEF,
    TINY,
    assert_equal,
    data_options,
    make_image_folder,
    model_of,
    one_line,
    photo,
    run_main,
    run_process,
    world,
)
from huggingface_hub.errors import EntryNotFoundError
from matplotlib import pyplot as plt
from timm.models import register_model
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler

import analyze
import table
from datasets import build_data
from models import build_model, weights
from reports import figures
from training import checkpoint, checkpoint_files

# Damaged and foreign files


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
DAMAGES = ["missing", "folder", "empty", "text", "truncated", *CONTENTS]


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_files_as_weights(tmp_path, kind):
    path = damaged(tmp_path, kind)
    with pytest.raises(SystemExit) as caught:
        weights.load_weights(model_of(), str(path), "--finetune")
    line = one_line(caught, "--finetune", path)
    assert "code" not in line and "weights_only" not in line and "load failed" not in line


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_files_as_a_run(tmp_path, kind):
    path = damaged(tmp_path, kind)
    with pytest.raises(SystemExit) as caught:
        checkpoint.load_model_and_ema(model_of(), None, checkpoint.load(str(path), "--resume"), str(path))
    line = one_line(caught, "--resume", path)
    assert "code" not in line and "weights_only" not in line and "load failed" not in line


def test_damaged_safetensors(tmp_path):
    path = tmp_path / "file.safetensors"
    path.write_bytes(b"\x00" * 50)
    with pytest.raises(SystemExit) as caught:
        weights.load_weights(model_of(), str(path), "--finetune")
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


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_weights(tmp_path, layout):
    source, model = model_of(1), model_of(2)
    torch.save(LAYOUTS[layout](source.state_dict()), tmp_path / "weights.pth")
    assert weights.load_weights(model, str(tmp_path / "weights.pth"), "--finetune") == []
    assert_equal(model.state_dict(), source.state_dict())


@pytest.mark.parametrize("layout", ["deit", "timm"])
def test_real_checkpoints_of_deit_and_timm(tmp_path, layout):
    """Whole ones, with the optimizer and all else that their trainers write."""
    source, average = model_of(1), ModelEmaV3(model_of(3))
    path = WRITERS[layout](tmp_path, source, average)
    for use_ema, stored in ((False, source), (True, average.module)):
        model = model_of(2)
        assert weights.load_weights(model, path, "RUN", use_ema=use_ema) == []
        assert_equal(model.state_dict(), stored.state_dict())
    assert weights.origin(path, "RUN") == ({}, None)


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


def test_numbers_of_numpy_1_are_read(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": model_of(1).state_dict(), "metric": np.float64(71.5)}, path)
    change_pickle(path, lambda old: old.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert weights.read(str(path), "RUN")["metric"] == 71.5


def test_safetensors(tmp_path):
    source, model = model_of(1), model_of(2)
    safetensors.torch.save_file(source.state_dict(), tmp_path / "weights.safetensors")
    assert weights.load_weights(model, str(tmp_path / "weights.safetensors"), "--finetune") == []
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
def test_a_head_of_another_size_is_dropped_and_reported(tmp_path, kwargs, heads):
    source, model = model_of(1, **kwargs), model_of(2, num_classes=5, **kwargs)
    own = {name: value.clone() for name, value in model.state_dict().items()}
    notes = weights.load_weights(model, saved_weights(tmp_path, source), "--finetune")
    dropped = {f"{head}.{part}" for head in heads for part in ("weight", "bias")}
    assert {note.split()[0] for note in notes} == dropped
    assert all("dropped" in note and "[7" in note and "[5" in note for note in notes)
    for name, value in model.state_dict().items():
        assert torch.equal(value, own[name] if name in dropped else source.state_dict()[name])


def test_the_head_of_a_convolutional_net_is_dropped_too(tmp_path):
    source, model = (build_model("resnet10t", num_classes, 32) for num_classes in (7, 5))
    notes = weights.load_weights(model, saved_weights(tmp_path, source), "--finetune")
    assert sorted(note.split()[0] for note in notes) == ["fc.bias", "fc.weight"]
    assert torch.equal(model.conv1[0].weight, source.conv1[0].weight)


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224_diverse", "deit_tiny_distilled_patch16_224"])
def test_position_embedding_is_resampled_and_reported(tmp_path, name):
    source, model = model_of(1, name=name, input_size=48), model_of(2, name=name)
    notes = weights.load_weights(model, saved_weights(tmp_path, source), "--finetune")
    prefix = model.num_prefix_tokens
    assert notes == [f"pos_embed resampled to [1, {prefix + 16}, 24]"]
    assert torch.equal(model.pos_embed[:, :prefix], source.pos_embed[:, :prefix])
    grid = source.pos_embed[:, prefix:].reshape(1, 6, 6, 24).permute(0, 3, 1, 2)
    resampled = torch.nn.functional.interpolate(grid, size=(4, 4), mode="bicubic", antialias=True)
    torch.testing.assert_close(model.pos_embed[:, prefix:], resampled.flatten(2).mT)
    assert torch.equal(model.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)


def test_patch_embedding_is_resampled_and_reported(tmp_path):
    source, model = model_of(1, input_size=64, patch_size=16), model_of(2)
    notes = weights.load_weights(model, saved_weights(tmp_path, source), "--finetune")
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
        weights.load_weights(model, path, "--finetune")
    one_line(caught, "--finetune", path, named)


def test_a_teacher_keeps_its_head(tmp_path):
    path = saved_weights(tmp_path, model_of())
    with pytest.raises(SystemExit) as caught:
        weights.load_weights(model_of(num_classes=5), path, "--teacher-path", new_head=False)
    one_line(caught, "--teacher-path", path, "head.bias is [7] in the file and [5] in the model")


def test_a_failed_load_leaves_the_model_alone(tmp_path):
    path = saved_weights(tmp_path, model_of(1, depth=3))
    model = model_of(2)
    with pytest.raises(SystemExit):
        weights.load_weights(model, path, "--finetune")
    assert_equal(model.state_dict(), model_of(2).state_dict())


def test_weights_from_an_address(tmp_path, monkeypatch):
    source, model = model_of(1), model_of(2)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(
        torch.hub, "download_url_to_file", lambda url, path, progress: torch.save(source.state_dict(), path)
    )
    weights.load_weights(model, "https://example.org/weights.pth", "--teacher-path")
    assert_equal(model.state_dict(), source.state_dict())


def test_an_address_out_of_reach(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise URLError("no route")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(SystemExit, match=re.escape("--teacher-path https://example.org/weights.pth")) as caught:
        weights.load_weights(model_of(), "https://example.org/weights.pth", "--teacher-path")
    one_line(caught)


# Code in files: every test plants some that makes `ran`, and none may


class Code:
    """A pickle of it makes a file where it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return eval, (f"open({str(self.path)!r}, 'w')",)


def change_pickle(path, change):
    """Replace the pickle in a file of torch by `change(pickle)`."""
    with zipfile.ZipFile(path) as old:
        members = {entry.filename: old.read(entry) for entry in old.infolist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, content in members.items():
            new.writestr(name, change(content) if name.endswith("/data.pkl") else content)


def write_zip(path, code):
    torch.save({"model": model_of().state_dict(), "args": code}, path)


def write_legacy(path, code):
    torch.save({"model": model_of().state_dict(), "args": code}, path, _use_new_zipfile_serialization=False)


def write_pickle(protocol):
    return lambda path, code: path.write_bytes(pickle.dumps({"model": {"head.weight": code}}, protocol))


def write_swapped(path, code):
    """Torch's file, its pickle replaced by one that torch would not write."""
    torch.save({"model": model_of().state_dict()}, path)
    change_pickle(path, lambda old: pickle.dumps(code, 2))


def write_npy(path, code):
    with open(path, "wb") as file:
        np.save(file, np.array([code], dtype=object), allow_pickle=True)


def write_npz(path, code):
    """Every name under which timm looks for Flax's weights of a ViT."""
    array = np.array([code], dtype=object)
    with open(path, "wb") as file:
        np.savez(file, **{f"{prefix}embedding/kernel": array for prefix in ("", "opt/target/", "params/")})


def write_tar(path, code):
    """The format of torch before 0.2."""
    with tarfile.open(path, "w") as tar:
        for name in ("storages", "tensors", "pickle"):
            add_member(tar, name, pickle.dumps(code, 2))


def add_member(tar, name, content):
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


def unpickle(path):
    pickle.loads(path.read_bytes())


def load_with_torch(path):
    with open(path, "rb") as file:
        torch.load(file, weights_only=False)


def load_with_numpy(path):
    loaded = np.load(path, allow_pickle=True)
    assert loaded["embedding/kernel"] if path.suffix == ".npz" else loaded


PLANTED = {
    "new.pth": (write_zip, load_with_torch),
    "legacy.pth": (write_legacy, load_with_torch),
    "swapped.pth": (write_swapped, load_with_torch),
    **{f"protocol{number}.pth": (write_pickle(number), unpickle) for number in range(6)},
    "new.safetensors": (write_zip, load_with_torch),
    "pickle.safetensors": (write_pickle(4), unpickle),
    "tar.pth": (write_tar, load_with_torch),
    "array.npy": (write_npy, load_with_numpy),
    "flax.npz": (write_npz, load_with_numpy),
}
"""{file name: (how it is written, what would run its code)}."""

NAMED = [name for name in PLANTED if name not in ("tar.pth", "array.npy", "flax.npz")]
"""Files of which the message says what code they hold; the others are no checkpoints to begin with."""


@pytest.fixture
def plant(tmp_path):
    """Write a file of `PLANTED`; in the end its code must not have run."""

    def plant(name, folder=tmp_path):
        path = folder / name
        PLANTED[name][0](path, Code(tmp_path / "ran"))
        return path

    yield plant
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", PLANTED)
def test_the_planted_code_would_run(tmp_path, name):
    write, load = PLANTED[name]
    write(tmp_path / name, Code(tmp_path / "ran"))
    try:
        load(tmp_path / name)
    except Exception as error:  # of a file that holds nothing but its code
        print(error)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", PLANTED)
def test_code_in_a_checkpoint(plant, name, recwarn):
    path = plant(name)
    for load in (checkpoint.load, weights.read, lambda path, flag: weights.load_weights(model_of(), path, flag)):
        with pytest.raises(SystemExit) as caught:
            load(str(path), "--resume")
        line = one_line(caught, "--resume", path)
        assert "weights_only" not in line.replace("Cannot use ``weights_only=True``", "")
        if name in NAMED:
            code = r"contains pickled code \((__)?builtins?(__)?\.eval\), which this program does not run"
            assert re.search(code, line)
    assert not recwarn.list  # which would be lines beside the error


def analyzed(path):
    analyze.main([str(path), *TINY])


ROUTES = {
    "--resume": lambda path: run_main(*TINY, "--resume", path),
    "--resume ": lambda path: run_main(*TINY, "--eval", "--resume", path),
    "--finetune": lambda path: run_main(*TINY, "--finetune", path),
    "--teacher-path": lambda path: run_main(
        *(*TINY, "--distillation-type", "hard", "--teacher-model", "deit_tiny_patch16_224", "--teacher-path", path)
    ),
    "RUN": analyzed,
}
HOLDS_CODE = "contains pickled code (builtins.eval), which this program does not run"


@pytest.mark.parametrize("name", ["new.pth", "protocol4.pth"])
@pytest.mark.parametrize("flag", ROUTES)
def test_code_by_every_flag(plant, flag, name):
    path = plant(name)
    with pytest.raises(SystemExit) as caught:
        ROUTES[flag](path)
    one_line(caught, flag.strip(), path, HOLDS_CODE)


@pytest.mark.parametrize("flag", ["--resume", "--finetune", "--teacher-path"])
def test_code_from_an_address(plant, tmp_path, monkeypatch, flag):
    path = plant("new.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, local, progress: shutil.copy(path, local))
    with pytest.raises(SystemExit) as caught:
        ROUTES[flag]("https://example.org/weights.pth")
    one_line(caught, flag, "weights.pth", HOLDS_CODE)


def test_code_in_a_run_folder(tmp_path):
    path = tmp_path / "run" / checkpoint.LAST
    path.parent.mkdir()
    checkpoint_files.write({"model": model_of().state_dict(), "args": Code(tmp_path / "ran")}, path)
    for command in (analyzed, lambda folder: run_main(*TINY, "--resume", "auto", "--output-dir", folder)):
        with pytest.raises(SystemExit) as caught:
            command(tmp_path / "run")
        one_line(caught, path, HOLDS_CODE)
    assert not (tmp_path / "ran").exists()


def published(**overlay):
    """analyze.py of a timm name whose published weights are elsewhere."""
    analyze.main(["deit_tiny_patch16_224", *BRIEF, "--model-kwargs", f"pretrained_cfg_overlay={overlay}"])


@pytest.mark.parametrize("name", ["new.pth", "legacy.pth", "new.safetensors", "array.npy", "flax.npz"])
@pytest.mark.parametrize("custom_load", [False, True])
def test_code_in_weights_that_timm_loads(plant, name, custom_load):
    path = plant(name)
    with pytest.raises(SystemExit) as caught:
        published(file=str(path), custom_load=custom_load)
    line = one_line(caught, "deit_tiny_patch16_224", path)
    if name in ("new.pth", "legacy.pth") and not custom_load:
        assert HOLDS_CODE in line


def test_code_in_weights_that_timm_downloads(plant, tmp_path, monkeypatch):
    path = plant("new.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, local, *_, **__: shutil.copy(path, local))
    with pytest.raises(SystemExit) as caught:
        published(url="https://example.org/weights.pth", hf_hub_id=None)
    one_line(caught, "deit_tiny_patch16_224", "weights.pth", HOLDS_CODE)


def test_code_in_weights_from_hugging_face(plant, monkeypatch):
    path = plant("new.pth")

    def download(repo_id, filename, **_):
        if filename.endswith(".safetensors"):
            raise EntryNotFoundError("not there")
        return str(path)

    monkeypatch.setattr(timm.models._hub, "hf_hub_download", download)
    with pytest.raises(SystemExit) as caught:
        published(hf_hub_id="someone/model")
    one_line(caught, "deit_tiny_patch16_224", "someone/model", HOLDS_CODE)


@pytest.mark.parametrize("command", [lambda *words: run_main(*TINY, *words), lambda *words: analyze.main(
    ["deit_tiny_patch16_224", *TINY, *words])], ids=["main", "analyze"])  # fmt: skip
def test_code_by_model_kwargs(plant, capsys, command):
    path = plant("new.pth")
    with pytest.raises(SystemExit):
        command("--model-kwargs", f"checkpoint_path={path}")
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1 and "checkpoint_path" in line and "--finetune" in line


# Code in settings and data sets

YAML = "lr: !!python/object/apply:builtins.eval [\"open('{}', 'w')\"]\n"


def test_code_in_yaml(tmp_path, capsys):
    path = tmp_path / "args.yaml"
    path.write_text(YAML.format(tmp_path / "ran"))
    with pytest.raises(SystemExit):
        run_main("--config", path)
    line = capsys.readouterr().err
    assert line.startswith(f"error: --config {path}") and "python/object/apply" in line and line.count("\n") == 1
    (tmp_path / "log.txt").write_text('{"epoch": 0, "test_acc1": 5.0, "train_loss": 1.0}\n')
    (tmp_path / "summary.json").write_text('{"epochs": 1}')
    table.main([str(tmp_path)])
    assert re.search(r"failed: its files cannot be read .*python/object/apply", capsys.readouterr().out)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("CIFAR", [f"cifar-100-python/{file}" for file in ("train", "test", "meta")]),
        ("torch/cifar100", [f"cifar-100-python/{file}" for file in ("train", "test", "meta")]),
        ("torch/mnist", [f"MNIST/processed/{file}.pt" for file in ("training", "test")]),
        ("torch/imagenet", ["meta.bin"]),
    ],
)
def test_code_in_torchvisions_files(plant, tmp_path, name, files):
    path = plant("protocol2.pth" if "cifar" in name.lower() else "new.pth")
    root = tmp_path / "data"
    make_image_folder(root)
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, root / file)
    with pytest.raises(SystemExit) as caught:
        run_main(*TINY, "--data-set", name, "--data-path", root)
    line = one_line(caught, f"--data-set {name}", root)
    assert HOLDS_CODE in line or "cifar" in name.lower()  # whose checksums are torchvision's


def test_code_in_webdataset_shards(plant, tmp_path):
    """timm decodes the image and the label, and nothing else of a sample."""
    code = plant("protocol2.pth").read_bytes()
    splits = {}
    for split in ("train", "validation"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            for number in range(2):
                png = io.BytesIO()
                photo(number).save(png, "png")
                members = {"png": png.getvalue(), "cls": b"1"}
                members |= dict.fromkeys(("pyd", "pickle", "pkl", "pth", "npy", "json"), code)
                for suffix, content in members.items():
                    add_member(tar, f"{number:04}.{suffix}", content)
        splits[split] = {"name": split, "num_samples": 2, "filenames": [f"{split}.tar"], "shard_lengths": [2]}
    (tmp_path / "info.json").write_text(json.dumps({"splits": splits}))
    options = data_options("--data-set", "wds/any", "--data-path", tmp_path, "--num-classes", 2, "--batch-size", 2)
    data = build_data(options, world())
    assert [len(samples) for samples, _ in data.val] == [2]
    assert [len(samples) for samples, _ in data.train] == [2]
    splits["validation"]["filenames"] = [f"pipe:touch {tmp_path / 'ran'}"]  # which webdataset would give to a shell
    (tmp_path / "info.json").write_text(json.dumps({"splits": splits}))
    with pytest.raises(SystemExit) as caught:
        run_main(*TINY, "--data-set", "wds/any", "--data-path", tmp_path, "--num-classes", 2, "--batch-size", 2)
    one_line(caught, "wds/any", "pipe:touch")


HUGGING_FACE = """
import sys
sys.path.insert(0, "tests")
from helpers import data_options
from pipeline.sources import build_source
cache, *folders = sys.argv[1:]
for folder in folders:
    try:
        build_source(data_options("--data-set", "hfds/" + folder, "--data-path", cache), is_training=False)
    except SystemExit as error:
        print(error)
"""


def test_code_in_hugging_face_sets(plant, tmp_path):
    """A script beside the images, tags in the card, pickles in a shard; as the packages' names clash, in a process."""
    marker = tmp_path / "ran"
    script = make_image_folder(tmp_path / "scripted", n=1, splits=("train", "validation"))
    (script / "scripted.py").write_text(f"open({str(marker)!r}, 'w')\n")
    card = make_image_folder(tmp_path / "card", n=1, splits=("train", "validation"))
    (card / "README.md").write_text("---\n" + YAML.format(marker) + "---\n")
    shards = tmp_path / "shards"
    shards.mkdir()
    for split in ("train", "validation"):
        with tarfile.open(shards / f"{split}.tar", "w") as tar:
            for suffix, name in (("pyd", "protocol2.pth"), ("pickle", "protocol2.pth"), ("pth", "new.pth")):
                add_member(tar, f"0000.{suffix}", plant(name).read_bytes())
    process = run_process("-c", HUGGING_FACE, tmp_path / "cache", script, card, shards)
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert len(lines) == 3 and all(line.startswith("error: --data-set hfds/") for line in lines)
    assert f"{script} cannot" in lines[0] and "scripted.py" in lines[0]
    assert f"{card} cannot" in lines[1] and "python/object/apply" in lines[1]
    assert f"{shards} cannot" in lines[2] and HOLDS_CODE in lines[2]
