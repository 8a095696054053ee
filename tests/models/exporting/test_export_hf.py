"""Exports for transformers: its models compute timm's outputs; weights come back bit for bit; others are refused."""

import json

import pytest
import torch
from exporting import CLASSES, FLAGS, checkpoint, exported, foreign, run_card
from families import build
from helpers import assert_equal, one_line, photo, run_process

from models import weights
from models.exporting import transformers_folder
from models.exporting.preprocessing import Preprocessing

transformers = pytest.importorskip("transformers")

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(4))
LAYER_SCALE = {"init_values": 0.5}
REGISTERS = {"reg_tokens": 4, "no_embed_class": True, **LAYER_SCALE}
SWIGLU = {**LAYER_SCALE, "mlp_layer": "SwiGLUPacked", "act_layer": "silu", "mlp_ratio": 64 / 24}

MODELS = {
    "ViT": ("vit", {}, "ViTForImageClassification"),
    "DeiT": ("deit", {}, "ViTForImageClassification"),
    "distilled DeiT": ("distilled", {}, "DeiTForImageClassificationWithTeacher"),
    "DINOv2": ("vit", LAYER_SCALE, "Dinov2ForImageClassification"),
    "DINOv2 with registers": ("vit", REGISTERS, "Dinov2WithRegistersForImageClassification"),
    "BEiT": ("beit", {}, "BeitForImageClassification"),
    "BEiT, shared positions": ("beit_shared", {}, "BeitForImageClassification"),
    "Swin": ("swin", {}, "SwinForImageClassification"),
    "Swin of small windows": ("swin_windows", {}, "SwinForImageClassification"),
}
"""{what: a model of `families`, further arguments, its class in transformers}"""


def load(folder):
    """transformers' model of a folder, of which no tensor may be missing or left over, in eval mode."""
    auto = transformers.AutoModelForImageClassification
    model, report = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


@pytest.mark.parametrize("what", MODELS)
def test_transformers_computes_the_logits_of_timm(tmp_path, what):
    family, options, name = MODELS[what]
    model, flags = foreign(tmp_path / "weights.pth", family, **options)
    folder = exported(tmp_path / "weights.pth", "hf", tmp_path / "out", *flags)
    with torch.no_grad():
        expected = model(IMAGES)
        found = load(folder)(IMAGES).logits
    assert type(load(folder)).__name__ == name
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("what", MODELS)
@pytest.mark.parametrize("classes", [5, 0])
def test_weights_come_back_bit_for_bit(tmp_path, what, classes):
    family, options, _ = MODELS[what]
    model, flags = foreign(tmp_path / "weights.pth", family, num_classes=classes, **options)
    folder = exported(tmp_path / "weights.pth", "hf", tmp_path / "out", *flags)
    again = build(family, num_classes=classes, **options).float()
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    weights.load_weights(again, str(folder / "model.safetensors"), new_head=False)
    assert_equal(dict(again.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize(("family", "options"), [("vit", {}), ("vit", LAYER_SCALE), ("distilled", {}), ("swin", {})])
def test_features_of_a_model_without_a_classifier(tmp_path, family, options):
    model, flags = foreign(tmp_path / "weights.pth", family, num_classes=0, **options)
    names = run_card(exported(tmp_path / "weights.pth", "hf", tmp_path / "out", *flags))
    pixels = names["processor"](names["image"], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model.forward_features(pixels)
    assert (names["tokens"] - expected.reshape(names["tokens"].shape)).abs().max() < 1e-5 * expected.abs().max()


def test_a_run_with_names_of_classes(tmp_path):
    model = checkpoint(tmp_path / "file.pth")
    names = run_card(exported(tmp_path / "file.pth", "hf", tmp_path / "out"))
    pixels = names["processor"](names["image"], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        assert names["label"] == CLASSES[model(pixels).argmax()]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["image_size"] == 32 and config["layer_norm_eps"] == 1e-6


@pytest.mark.parametrize(
    "preprocessing",
    [Preprocessing(32, crop_pct=1.0, crop_mode="squash"), Preprocessing(48, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)),
     Preprocessing(48, interpolation="bilinear", crop_pct=0.9, crop_mode="squash")],
)  # fmt: skip
def test_images_are_preprocessed_as_by_timm(tmp_path, preprocessing):
    from timm.data import create_transform

    assert transformers_folder._write_processor(preprocessing, tmp_path) == []
    image = photo(1, 70).resize((90, 70))
    found = transformers.AutoImageProcessor.from_pretrained(tmp_path)(image, return_tensors="pt")["pixel_values"][0]
    expected = create_transform(**preprocessing.of_timm())(image)
    assert found.shape == expected.shape
    difference = (found - expected).abs() * 255 * torch.tensor(preprocessing.std)[:, None, None]
    assert difference.max() < 3 and difference.mean() < 0.5  # of 255: torchvision and Pillow round differently


REFUSED = {
    "average": ("vit", {"global_pool": "avg", "fc_norm": False}, "needs the pooling token"),
    "registers without LayerScale": ("registers", {}, "for ViT of transformers, it needs"),
    "DeiT III": ("deit3", {}, "position embeddings, of the class token too"),
    "EVA": ("eva02", {}, "cannot hold a Eva; it can hold timm's VisionTransformer, "),
    "normalised queries": ("vit", {"qk_norm": True}, "it has no name for blocks.0.attn.k_norm.bias"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_models_that_transformers_does_not_have(tmp_path, what):
    family, options, line = REFUSED[what]
    _, flags = foreign(tmp_path / "weights.pth", family, **options)
    with pytest.raises(SystemExit) as caught:
        exported(tmp_path / "weights.pth", "hf", tmp_path / "out", *flags)
    one_line(caught, "--to hf", line)
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pth"]


def test_remedies_are_refused(tmp_path):
    checkpoint(tmp_path / "file.pth", flags={**FLAGS, "remedy": ["xsa"]}, remedies=["xsa"])
    with pytest.raises(SystemExit) as caught:
        exported(tmp_path / "file.pth", "hf", tmp_path / "out")
    one_line(caught, "--to hf cannot hold the remedies xsa", "--to onnx can")


def test_files_with_other_outputs_are_refused(tmp_path, monkeypatch):
    checkpoint(tmp_path / "file.pth")
    monkeypatch.setattr(transformers_folder, "norm_eps", lambda model: 1.0)
    with pytest.raises(SystemExit) as caught:
        exported(tmp_path / "file.pth", "hf", tmp_path / "out")
    one_line(caught, "--to hf cannot hold the model: outputs of ViTForImageClassification differ from timm's")


FRESH = """
import sys, torch, transformers
model = transformers.AutoModelForImageClassification.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[3])
"""


@pytest.mark.slow
def test_plain_transformers_loads_the_folder_in_a_fresh_process(tmp_path):
    model = checkpoint(tmp_path / "file.pth")
    folder = exported(tmp_path / "file.pth", "hf", tmp_path / "out")
    torch.save(IMAGES, tmp_path / "images.pth")
    done = run_process("-I", "-c", FRESH, folder, tmp_path / "images.pth", tmp_path / "logits.pth")
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "logits.pth"), model(IMAGES), rtol=1e-5, atol=1e-6)
