"""Layouts of weights beside timm's: the same features as the model written by hand, and one line for unknown names."""

import re

import pytest
import safetensors.torch
import torch
from helpers import REPOSITORY, model_of, world
from transformers_names import dinov2_by_hand, made_dinov2

import main
from models import build_model, weights
from models.weights import layouts, unwrapping
from reports import subjects
from training.arguments import parse_args

TRAINED = REPOSITORY.parent / "shared" / "data" / "dinov2_vits14_hf_f16.safetensors"
SMALL = {"depth": 2, "embed_dim": 24, "num_heads": 3}


def small_dinov2(input_size=42, gated=False, num_classes=0):
    """A timm model for `made_dinov2`, with random weights."""
    name, kwargs = "vit_small_patch14_dinov2", {}
    if gated:
        name, kwargs = "vit_giant_patch14_dinov2", {"mlp_ratio": 2 * 40 / 24}
    return build_model(name, num_classes, input_size, **SMALL, **kwargs).eval()


def saved(path, tensors):
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return str(path)


def assert_features(model, tensors, heads, size):
    """The model's features are those of the tensors, to float32's rounding."""
    images = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        features = model.forward_features(images).double()
    expected = dinov2_by_hand(tensors, images, heads)
    assert expected.std() > 0.1
    assert (features - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("size", [70, 42], ids=["5 x 5 positions as in the file", "resampled to 3 x 3"])
@pytest.mark.parametrize("gated", [False, True], ids=["GELU", "SwiGLU"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dinov2_of_transformers(tmp_path, size, gated, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in made_dinov2(gated=gated).items()}
    model = small_dinov2(size, gated)
    notes = weights.load_weights(model, saved(tmp_path / "model.safetensors", tensors))
    resampled = [f"pos_embed resampled to [1, {1 + 3 * 3}, 24]"] if size == 42 else []
    assert notes == ["embeddings.mask_token left out: timm's model has none", *resampled]
    assert_features(model, tensors, heads=3, size=size)


@pytest.mark.skipif(not TRAINED.exists(), reason="the trained weights are not on this machine")
def test_the_trained_dinov2_of_transformers():
    model = build_model("vit_small_patch14_dinov2", 0, 224).eval()
    assert weights.load_weights(model, str(TRAINED)) == ["pos_embed resampled to [1, 257, 384]"]
    assert_features(model, safetensors.torch.load_file(TRAINED), heads=6, size=224)


class Stop(Exception):
    pass


def model_of_main(words, monkeypatch):
    """The model that main.py starts to train."""
    states = []

    def begin(folder, world, state, *args):
        states.append(state)
        raise Stop

    monkeypatch.setattr(main, "begin_run", begin)
    with pytest.raises(Stop):
        main.train(parse_args(words), world(), None)
    return states[0].model.eval()


def model_of_analyze(words, monkeypatch):
    """The model that analyze.py measures."""
    file = words.pop(words.index("--finetune") + 1)
    words.remove("--finetune")
    return subjects.load_model(subjects.find_subject(file, words), 10, False, world())


@pytest.mark.skipif(not TRAINED.exists(), reason="the trained weights are not on this machine")
@pytest.mark.parametrize("load", [model_of_main, model_of_analyze])
def test_the_trained_dinov2_in_the_programs(load, monkeypatch, few_digits):
    model = load(
        [*("--model", "vit_small_patch14_dinov2.lvd142m", "--input-size", "98", "--data-set", "DIGITS"),
         *("--num-workers", "0", "--device", "cpu", "--no-model-ema", "--finetune", str(TRAINED))],
        monkeypatch,
    )  # fmt: skip
    assert_features(model, safetensors.torch.load_file(TRAINED), heads=6, size=98)


@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_a_layout_is_found_under_the_keys_of_a_trainer(tmp_path, key):
    tensors, model = made_dinov2(), small_dinov2()
    weights.load_weights(model, saved(tmp_path / "model.pth", {key: tensors, "epoch": 3}))
    assert_features(model, tensors, heads=3, size=42)


def test_a_classifier_that_the_file_does_not_have_is_reported(tmp_path):
    path = saved(tmp_path / "model.safetensors", made_dinov2())
    model = small_dinov2(num_classes=5)
    before = model.head.weight.clone()
    notes = weights.load_weights(model, path)
    assert notes[1:3] == [f"head.{name} is not in the file and keeps its initial values" for name in ("weight", "bias")]
    assert torch.equal(model.head.weight, before)
    with pytest.raises(ValueError, match=r"head\.bias is not in the file"):
        weights.load_weights(model, path, new_head=False)


def test_a_classifier_that_the_model_does_not_have_is_left_out(tmp_path):
    source, model = model_of(1), model_of(2, num_classes=0)
    path = saved(tmp_path / "weights.pth", source.state_dict())
    notes = weights.load_weights(model, path)
    assert notes == [f"head.{name} dropped: the model has no classifier" for name in ("weight", "bias")]
    assert torch.equal(model.norm.weight, source.norm.weight)
    with pytest.raises(ValueError, match=r"head\.bias is not in the model"):
        weights.load_weights(model, path, new_head=False)


def test_half_precision_is_resampled_in_float32(tmp_path):
    """Rounding to float16 after it would be an error of 5e-4."""
    source, model, exact = model_of(1, input_size=48), model_of(2), model_of(3)
    half = {name: tensor.half() for name, tensor in source.state_dict().items()}
    weights.load_weights(model, saved(tmp_path / "half.pth", half))
    weights.load_weights(exact, saved(tmp_path / "full.pth", {name: tensor.float() for name, tensor in half.items()}))
    assert torch.equal(model.pos_embed, exact.pos_embed)


BROKEN = {
    "encoder.layer.1.attention.attention.key.weight": "blocks.1.attn.qkv.weight is not in the file, and 2 more",
    "encoder.layer.1.layer_scale2.lambda1": "blocks.1.ls2.gamma is not in the file",
    "layernorm.bias": "norm.bias is not in the file",
}


@pytest.mark.parametrize("missing", BROKEN)
def test_a_tensor_is_missing(tmp_path, missing):
    tensors = made_dinov2()
    del tensors[missing]
    path = saved(tmp_path / "model.safetensors", tensors)
    with pytest.raises(ValueError, match=f"^{path} does not fit VisionTransformer: {re.escape(BROKEN[missing])}$"):
        weights.load_weights(small_dinov2(), path)


UNKNOWN = {
    "prefix": (
        lambda tensors: {f"net.of.{name.upper()}": tensor for name, tensor in tensors.items()},
        "net.of.BLOCKS.0.ATTN.PROJ.BIAS, net.of.BLOCKS.0.ATTN.PROJ.WEIGHT, net.of.BLOCKS.0.ATTN.QKV.BIAS and 29 more, "
        "which all begin with net.of, ",
    ),
    "words": (
        lambda tensors: {name.upper(): tensor for name, tensor in tensors.items()},
        "BLOCKS.0.ATTN.PROJ.BIAS, BLOCKS.0.ATTN.PROJ.WEIGHT, BLOCKS.0.ATTN.QKV.BIAS and 29 more ",
    ),
    "one": (lambda tensors: {"a.b": torch.zeros(1)}, "a.b "),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_unknown_names_are_one_line(tmp_path, kind):
    change, names = UNKNOWN[kind]
    path = saved(tmp_path / "weights.pth", change(model_of(1).state_dict()))
    with pytest.raises(ValueError) as caught:
        weights.load_weights(model_of(2), path)
    known = f"are in no layout that is known ({', '.join([*weights.LAYOUTS, 'timm'])})"
    assert str(caught.value) == f"{path} does not fit VisionTransformer: {names}{known}"


def test_unknown_keys_are_named(tmp_path):
    stored = {"student": {"head": 3}, "teacher": {}, "step": 3, "loss": 0.1}
    with pytest.raises(ValueError) as caught:
        weights.load_weights(model_of(), path := saved(tmp_path / "weights.pth", stored))
    assert str(caught.value) == f"{path} contains no model weights; its keys are loss, step, student and 1 more"


def test_an_entry_is_all_that_a_layout_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(layouts, "LAYOUTS", {})
    monkeypatch.setattr(unwrapping, "LAYOUTS", layouts.LAYOUTS)

    def backwards(tensors, model):
        return {name[::-1]: tensor for name, tensor in tensors.items() if name != "sserp"}, ["sserp left out"]

    layouts.enter(layouts.Layout("backwards", "Written backwards.", "sserp", lambda names: "sserp" in names, backwards))

    source, model = model_of(1), model_of(2)
    tensors = {name[::-1]: tensor for name, tensor in source.state_dict().items()} | {"sserp": torch.zeros(1)}
    assert weights.load_weights(model, saved(tmp_path / "weights.pth", tensors)) == ["sserp left out"]
    assert torch.equal(model.pos_embed, source.pos_embed)
