"""Exports for timm: the same weights and logits in plain timm, also of a model with remedies; one line for errors."""

import json
import re

import pytest
import safetensors.torch
import timm
import torch
from exporting import CLASSES, FLAGS, checkpoint, exported, foreign, run_card
from helpers import (
    REPOSITORY,
    TINY,
    assert_equal,
    data_options,
    few_digits,
    model_of,
    photo,
    run_main,
    run_process,
)

from models import build_model, weights
from models.exporting.preprocessing import SMALL, Preprocessing
from pipeline import transforms

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(4))

FRESH = """
import sys, timm, torch
assert "" not in sys.path
model = timm.create_model(f"local-dir:{sys.argv[1]}", pretrained=True).eval()
images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(4))
with torch.no_grad():
    torch.save({"logits": model(images), "labels": model.pretrained_cfg["label_names"]}, sys.argv[2])
"""


def logits_of(model):
    with torch.no_grad():
        return model.eval()(IMAGES)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder of main.py."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    with few_digits():
        run_main(*TINY, "--output-dir", folder, "--preset", "released", "--data-path", folder.parent / "secret")
    return folder


def test_plain_timm_loads_an_exported_run_in_a_fresh_process(run, tmp_path):
    folder = exported(run, "timm", tmp_path / "digits", "--ema")
    done = run_process("-I", "-c", FRESH, folder, tmp_path / "out.pth")
    assert done.returncode == 0, done.stderr
    stored = torch.load(run / "checkpoint.pth")
    expected, raw = model_of(num_classes=10), model_of(num_classes=10)
    expected.load_state_dict(stored["model_ema"])
    raw.load_state_dict(stored["model"])
    found = torch.load(tmp_path / "out.pth")
    assert torch.equal(found["logits"], logits_of(expected)) and not torch.equal(found["logits"], logits_of(raw))
    assert found["labels"] == [str(i) for i in range(10)]


def test_the_card_of_a_run(run, tmp_path):
    card = (exported(run, "timm", tmp_path / "digits") / "README.md").read_text()
    summary = json.loads((run / "summary.json").read_text())
    assert f"| top-1 | {summary['test_acc1']:.2f} % |" in card and f"| images | {summary['test_images']} |" in card
    assert str(run.parent) not in card and "data_path: secret\n" in card
    assert "`emb_cos_within` 0.5" in card and "`emb_so`" not in card
    assert "| preset | released |" in card and "raw weights after epoch 1 of 1" in card


@pytest.mark.parametrize("to", ["timm", "safetensors"])
@pytest.mark.parametrize("family", ["vit", "average", "registers", "distilled", "deit3", "beit", "eva02", "swin"])
def test_weights_come_back_bit_for_bit(tmp_path, family, to):
    model, flags = foreign(tmp_path / "weights.pth", family)
    folder = exported(tmp_path / "weights.pth", to, tmp_path / "out", *flags)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    assert_equal(tensors, {name: model.state_dict()[name] for name in tensors})
    assert tensors.keys() == model.state_dict().keys()
    again = run_card(folder)["model"]
    assert torch.equal(logits_of(again), logits_of(model))


@pytest.mark.parametrize(
    ("name", "stock", "arguments"),
    [("deit_tiny_patch16_224_diverse", "deit_tiny_patch16_224", {"depth": 2}),
     ("deit_small_layer24_patch16_224_diverse", "deit_small_patch16_224", {"depth": 24})],
)  # fmt: skip
def test_the_stock_name_is_in_the_file(tmp_path, name, stock, arguments):
    kwargs = {"embed_dim": 24, "num_heads": 3} | (arguments if arguments["depth"] == 2 else {})
    model = build_model(name, 7, 32, 8, **kwargs)
    flags = FLAGS | {"model": name, "model_kwargs": kwargs}
    torch.save({"model": model.state_dict(), "args": flags, "epoch": 0}, tmp_path / "file.pth")
    folder = exported(tmp_path / "file.pth", "timm", tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == stock
    assert config["model_args"]["depth"] == arguments["depth"]
    assert "diverse" not in (folder / "config.json").read_text()
    assert not {"license", "tag", "hf_hub_id", "url"} & config["pretrained_cfg"].keys()


REMEDIED = {"remedy": ["attnscale", "neutreno", "featscale"], "remedy_kwargs": {"neutreno_strength": 0.3}}


@pytest.mark.parametrize("to", ["timm", "safetensors"])
def test_a_model_with_remedies_is_rebuilt_by_the_lines_of_its_card(tmp_path, to, capsys):
    remedies = {"remedies": REMEDIED["remedy"], "remedy_kwargs": REMEDIED["remedy_kwargs"]}
    model = checkpoint(tmp_path / "file.pth", flags=FLAGS | REMEDIED, **remedies)
    folder = exported(tmp_path / "file.pth", to, tmp_path / "out")
    assert "warning: The model was trained with the remedies" in capsys.readouterr().out
    again = run_card(folder)["model"]
    assert again.remedies["neutreno"].settings == {"neutreno_strength": 0.3}
    assert torch.equal(logits_of(again), logits_of(model))
    stock = safetensors.torch.load_file(folder / "model.safetensors")
    plain = model_of()
    plain.load_state_dict(stock)  # strict: no tensor of a remedy
    assert not torch.allclose(logits_of(plain), logits_of(model))
    if to == "timm":
        assert json.loads((folder / "config.json").read_text())["remedies"]["neutreno"] == {"neutreno_strength": 0.3}


@pytest.mark.parametrize("size", [32, 48])
@pytest.mark.parametrize("words", [(), ("--mean", 0.5, 0.4, 0.3, "--interpolation", "bilinear", "--crop-mode", "squash",
                                        "--eval-crop-ratio", 0.9)])  # fmt: skip
def test_images_are_preprocessed_as_in_the_run(size, words):
    options = data_options("--input-size", size, *words)
    of_run = transforms.build_transform(options, is_training=False)(photo(1, 70))
    flags = {name: getattr(options, name) for name in ("mean", "std", "interpolation", "eval_crop_ratio", "crop_mode")}
    exporting = Preprocessing.of_flags(flags, size)
    assert torch.equal(timm.data.create_transform(**exporting.of_timm())(photo(1, 70)), of_run)
    if not words:  # flags that were not given
        assert Preprocessing.of_flags(dict.fromkeys(flags), size) == exporting
    assert SMALL == transforms.SMALL


def test_another_input_size_and_no_classifier(tmp_path, capsys):
    model = checkpoint(tmp_path / "file.pth")
    out = exported(tmp_path / "file.pth", "timm", tmp_path / "out", "--input-size", 48, "--num-classes", 0)
    printed = capsys.readouterr().out
    assert "pos_embed resampled to [1, 37, 24]" in printed and "head.weight dropped" in printed
    expected = model_of(num_classes=0, input_size=48)
    weights.load_weights(expected, str(tmp_path / "file.pth"))
    again = timm.create_model(f"local-dir:{out}", pretrained=True)
    assert_equal(dict(again.state_dict()), dict(expected.state_dict()))
    assert again.pretrained_cfg["input_size"] == (3, 48, 48) and not again.pretrained_cfg.get("label_names")
    assert torch.equal(again.norm.weight, model.norm.weight)


def test_the_names_of_classes_of_a_file_that_has_none(tmp_path):
    _, flags = foreign(tmp_path / "weights.pth", "vit")
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\ne\n")
    words = (*flags, "--class-names", tmp_path / "names.txt")
    again = run_card(exported(tmp_path / "weights.pth", "timm", tmp_path / "out", *words))
    assert again["model"].pretrained_cfg["label_names"] == ["a", "b", "c", "d", "e"]
    assert again["label"] in "abcde"
    metadata = safetensors.safe_open(
        exported(tmp_path / "weights.pth", "safetensors", tmp_path / "file", *words) / "model.safetensors", "pt"
    ).metadata()
    assert json.loads(metadata["label_names"]) == ["a", "b", "c", "d", "e"]
    assert metadata["architecture"] == "vit_tiny_patch16_224" and json.loads(metadata["model_args"])["depth"] == 3


def test_half_precision_is_exported_as_float32(tmp_path):
    half = {name: tensor.half() for name, tensor in model_of(5).state_dict().items()}
    torch.save({"model": half, "args": FLAGS, "epoch": 0}, tmp_path / "file.pth")
    out = exported(tmp_path / "file.pth", "safetensors", tmp_path / "out")
    assert_equal(safetensors.torch.load_file(out / "model.safetensors"), {k: half[k].float() for k in sorted(half)})


BEST = {"args": FLAGS, "epoch": 1, "acc1": 61.25, "data": {"classes": CLASSES}}


@pytest.mark.parametrize("is_average", [False, True])
def test_the_best_checkpoint_of_a_run(tmp_path, is_average):
    path = tmp_path / "checkpoint_best_ema.pth"
    torch.save(BEST | {"model": model_of(2).state_dict(), "is_average": is_average}, path)
    card = (exported(path, "timm", tmp_path / "out", *(["--ema"] if is_average else [])) / "README.md").read_text()
    assert "| top-1 | 61.25 % |" in card
    assert f"These are the {'averaged (EMA)' if is_average else 'raw'} weights after epoch 2 of 3" in card


@pytest.mark.parametrize("page", ["README.md", "docs/export.md"])
def test_the_example_of_a_page_loads_an_exported_run(tmp_path, monkeypatch, page):
    model = checkpoint(tmp_path / "file.pth")
    exported(tmp_path / "file.pth", "timm", tmp_path / "exported" / "NAME")
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", (REPOSITORY / page).read_text(), flags=re.DOTALL)
    (example,) = [example for example in examples if "local-dir:" in example]
    names = {"image": photo(1), "timm": timm}
    exec(example, names)
    logits = model(names["transform"](photo(1))[None])
    assert torch.equal(names["logits"], logits) and names["logits"].shape == (1, 7)
    assert page == "README.md" or names["name"] == CLASSES[logits.argmax()]


def test_synsets_of_imagenet_have_words(tmp_path):
    model = model_of(num_classes=2)
    data = {"classes": ["n01440764", "n02119789"]}
    torch.save({"model": model.state_dict(), "args": FLAGS, "epoch": 0, "data": data}, tmp_path / "file.pth")
    folder = exported(tmp_path / "file.pth", "timm", tmp_path / "out")
    words = json.loads((folder / "config.json").read_text())["label_descriptions"]
    assert words == {"n01440764": "tench, Tinca tinca", "n02119789": "kit fox, Vulpes macrotis"}
