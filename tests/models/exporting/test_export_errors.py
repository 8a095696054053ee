"""Mistakes of a command line of models.export are one line, and leave no folder."""

import pytest
import timm
import torch
from exporting import FLAGS, checkpoint, exported
from helpers import model_of, one_line

from models import build_model
from models.export import main
from models.exporting import FORMATS

DESCRIBED = [
    "--model",
    "deit_tiny_patch16_224",
    "--patch-size",
    "8",
    "--input-size",
    "32",
    "--model-kwargs",
    "depth=2",
    "embed_dim=24",
    "num_heads=3",
]
ERRORS = {
    "no name": (("weights.pth",), "weights.pth does not contain the name of its model; give --model"),
    "another model": (("file.pth", "--model", "vit_tiny_patch16_224"), "RUN was trained with --model deit_tiny_"),
    "another remedy": (("file.pth", "--remedy", "xsa"), "without --remedy, and not with ['xsa']; leave out"),
    "another size": (("file.pth", "--num-classes", 3), "classes, and --num-classes is 3"),
    "names": (("file.pth", "--class-names", "names.txt"), "has the names of its classes, such as class 0"),
    "too few names": (("weights.pth", *DESCRIBED, "--class-names", "names.txt"), "--class-names has 2 names"),
    "initial values": (
        ("weights.pth", *DESCRIBED, "--remedy", "attnscale", "--num-classes", 0),
        "--remedy attnscale: its parameters are not in the file",
    ),
    "two choices": (("file.pth", "--ema", "--checkpoint-key", "model"), "--ema and --checkpoint-key model both say"),
    "fewer names": (("more.pth",), "has 9 outputs, and the file has 7 names"),
    "no file": (("missing",), "missing is not a run folder or a file"),
    "no run": (("empty",), "empty is not a run folder of this program: it has no checkpoint.pth"),
    "another pooling": (("average.pth", *DESCRIBED), "average.pth averages the patch tokens (fc_norm), and the model"),
    "patches": (("file.pth", "--input-size", 36), "error: --model deit_tiny_patch16_224_diverse has patches"),
    "no average": (("weights.pth", "--model", "vit_tiny_patch16_224", "--ema"), "contains no averaged weights"),
    "unknown model": (("weights.pth", "--model", "vit_tinny_patch16_224"), "vit_tinny_patch16_224 is unknown; did you"),
    "another architecture": (("weights.pth", "--model", "vit_tiny_patch16_224"), "does not fit VisionTransformer"),
    "full folder": (("file.pth",), "exists and is not an empty folder"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_are_one_line_and_leave_no_folder(tmp_path, monkeypatch, kind):
    checkpoint(tmp_path / "file.pth")
    checkpoint(tmp_path / "more.pth", num_classes=9)
    torch.save(model_of().state_dict(), tmp_path / "weights.pth")
    torch.save(model_of(global_pool="avg").state_dict(), tmp_path / "average.pth")
    (tmp_path / "names.txt").write_text("a\nb\n")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    if kind == "full folder":
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    words, line = ERRORS[kind]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as caught:
        exported(words[0], "timm", out, *words[1:])
    one_line(caught, line)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_model_of_a_user_is_refused(tmp_path):
    from timm.models import VisionTransformer, register_model

    @register_model
    def vit_of_a_user(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **kwargs):
        return VisionTransformer(**{"patch_size": 8, "depth": 1, "embed_dim": 24, "num_heads": 3} | kwargs)

    model = build_model("vit_of_a_user", 3, 32)
    flags = FLAGS | {"model": "vit_of_a_user", "patch_size": None, "model_kwargs": {}}
    torch.save({"model": model.state_dict(), "args": flags, "epoch": 0}, tmp_path / "file.pth")
    with pytest.raises(SystemExit) as caught:
        exported(tmp_path / "file.pth", "timm", tmp_path / "out")
    one_line(caught, "vit_of_a_user is not a model of timm")


def test_files_that_do_not_hold_the_model_are_removed(tmp_path, monkeypatch):
    checkpoint(tmp_path / "file.pth")
    create_model = timm.create_model

    def create(name, **kwargs):
        model = create_model(name, **kwargs)
        if name.startswith("local-dir:"):
            model.norm.bias.data[0] += 1e-3
        return model

    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(SystemExit) as caught:
        exported(tmp_path / "file.pth", "timm", tmp_path / "out")
    one_line(caught, "--to timm cannot hold the model: timm computes other logits")
    assert [path.name for path in tmp_path.iterdir()] == ["file.pth"]


@pytest.mark.parametrize("to", [name for name, entry in FORMATS.items() if entry.packages])
def test_a_package_that_is_not_installed(tmp_path, monkeypatch, to):
    monkeypatch.setattr("models.exporting.registry.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as caught:
        exported("unread", to, tmp_path / "out")
    one_line(caught, f"--to {to} needs {FORMATS[to].packages[0]}", f"pip install '.[{FORMATS[to].extra}]'")


@pytest.mark.parametrize(
    "words",
    ["--model-kwargs depth", "--input-size 0", "--eval-crop-ratio 0", "--std 0 1 1", "--interpolation cubic",
     "--remedy nothing", "--crop-mode middle", "--inputsize 3"],
)  # fmt: skip
def test_bad_flags_are_refused_before_a_file_is_read(words, capsys):
    with pytest.raises(SystemExit) as ended:
        exported("unread", "timm", "unwritten", *words.split())
    assert ended.value.code == 2
    assert words.split()[0] in capsys.readouterr().err


def test_underscores_of_flags(tmp_path):
    checkpoint(tmp_path / "file.pth")
    assert (exported(tmp_path / "file.pth", "safetensors", tmp_path / "out", "--input_size=48") / "README.md").exists()


@pytest.mark.parametrize(
    "words", [("file.pth", "out"), ("file.pth", "out", "--to", "torch"), ("file.pth", "--to", "timm")]
)
def test_a_wrong_command_line_is_one_line(words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
