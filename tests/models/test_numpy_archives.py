"""Archives of JAX (.npz): the tensors of timm's own reading, and a line for all that it would leave out silently."""

import numpy as np
import pytest
import timm
import torch
from helpers import assert_equal

from models import build_model, export, weights

NAME = "vit_tiny_patch16_224"
VIT = {"patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 3}


def model_of(name, num_classes=5, seed=0, input_size=32):
    torch.manual_seed(seed)
    return build_model(name, num_classes, input_size, **VIT).eval()


def archive(path, model, **extra):
    """The tensors of a timm ViT as the original ViT's archives have them."""
    w = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    arrays = {
        "cls": w["cls_token"],
        "embedding/kernel": w["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": w["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding": w["pos_embed"],
        "Transformer/encoder_norm/scale": w["norm.weight"],
        "Transformer/encoder_norm/bias": w["norm.bias"],
    }
    if "head.weight" in w:
        arrays |= {"head/kernel": w["head.weight"].T, "head/bias": w["head.bias"]}
    for i in range(len(model.blocks)):
        theirs, ours = f"Transformer/encoderblock_{i}/", f"blocks.{i}."
        for their, our in (("LayerNorm_0", "norm1"), ("LayerNorm_2", "norm2")):
            arrays[f"{theirs}{their}/scale"] = w[f"{ours}{our}.weight"]
            arrays[f"{theirs}{their}/bias"] = w[f"{ours}{our}.bias"]
        attention = f"{theirs}MultiHeadDotProductAttention_1/"
        for k, name in enumerate(("query", "key", "value")):
            rows = slice(24 * k, 24 * (k + 1))
            arrays[f"{attention}{name}/kernel"] = w[f"{ours}attn.qkv.weight"][rows].T.reshape(24, 3, 8)
            arrays[f"{attention}{name}/bias"] = w[f"{ours}attn.qkv.bias"][rows].reshape(3, 8)
        arrays[f"{attention}out/kernel"] = w[f"{ours}attn.proj.weight"].T.reshape(3, 8, 24)
        arrays[f"{attention}out/bias"] = w[f"{ours}attn.proj.bias"]
        for k in (0, 1):
            arrays[f"{theirs}MlpBlock_3/Dense_{k}/kernel"] = w[f"{ours}mlp.fc{k + 1}.weight"].T
            arrays[f"{theirs}MlpBlock_3/Dense_{k}/bias"] = w[f"{ours}mlp.fc{k + 1}.bias"]
    np.savez(path, **arrays, **extra)
    return str(path)


def test_archives_of_jax(tmp_path):
    source, model = (model_of("vit_tiny_patch16_224", seed=seed) for seed in (0, 1))
    path = archive(tmp_path / "vit.npz", source, **{"pre_logits/bias": np.zeros(3)})
    assert weights.load_weights(model, path, new_head=False) == ["left out by timm: pre_logits."]
    assert_equal({**model.state_dict()}, {**source.state_dict()})
    assert weights.origin(path) == ({}, None, [], False)
    larger = model_of("vit_tiny_patch16_224", 7, input_size=64)
    before = larger.head.weight.clone()
    notes = weights.load_weights(larger, path)
    assert {*notes} == {
        "left out by timm: pre_logits.",
        "pos_embed resampled to [1, 65, 24]",
        "head.weight of shape [5, 24] dropped: the model needs [7, 24]",
        "head.bias of shape [5] dropped: the model needs [7]",
    }
    assert torch.equal(larger.head.weight, before)
    with pytest.raises(ValueError, match=r"head\.bias is \[5\] in the file and \[7\] in the model"):
        weights.load_weights(larger, path, new_head=False)

    assert "head.weight dropped: the model has no classifier" in weights.load_weights(model_of(NAME, 0), path)


def test_archives_of_jax_that_do_not_fit(tmp_path):
    source = model_of("vit_tiny_patch16_224")
    path = archive(tmp_path / "vit.npz", source)
    shallow = build_model("vit_tiny_patch16_224", 5, 32, **VIT | {"depth": 1}).eval()
    before = {name: tensor.clone() for name, tensor in shallow.state_dict().items()}
    refused = {
        "has 2 blocks, and the model 1": (shallow, {}),
        "as an archive of JAX for VisionTransformerDistilled": (model_of("deit_tiny_distilled_patch16_224"), {}),
        "averaged": (source, {"use_ema": True}),
        "is an archive of JAX, which timm does not read for ResNet": (build_model("resnet10t", 5, 32), {}),
    }
    for line, (model, options) in refused.items():
        with pytest.raises(ValueError, match=f"^{path} .*{line}"):
            weights.load_weights(model, path, **options)
    assert_equal({**shallow.state_dict()}, before)
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    with pytest.raises(ValueError, match="cannot be read as an archive of JAX"):
        weights.load_weights(source, str(tmp_path / "other.npz"))


def test_an_archive_of_jax_is_exported_with_its_classifier(tmp_path):
    source = model_of(NAME)
    words = ["--model", NAME, "--input-size", "32", "--patch-size", "8"]
    words += ["--model-kwargs", "depth=2", "embed_dim=24", "num_heads=3"]
    export.main([archive(tmp_path / "vit.npz", source), "--to", "timm", str(tmp_path / "out"), *words])
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert_equal({**loaded.state_dict()}, {**source.state_dict()})
