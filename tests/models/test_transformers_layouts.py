"""transformers' layouts: names written by hand, the same outputs as its models, and the way back, bit for bit."""

import json
import re

import pytest
import safetensors.torch
import torch
from helpers import assert_equal

from models import build_model, weights

VIT = {"input_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 24, "num_heads": 3}
SWIN = {"input_size": 64, "window_size": 4, "embed_dim": 12, "depths": (2, 2), "num_heads": (2, 4)}
MODELS = {
    "ViT": ("vit_tiny_patch16_224", VIT),
    "DeiT": ("deit_tiny_distilled_patch16_224", VIT),
    "BEiT": ("beit_base_patch16_224", VIT),
    "DINOv2": ("vit_small_patch14_dinov2", VIT),
    "DINOv2 with registers": ("vit_small_patch14_reg4_dinov2", VIT),
    "Swin": ("swin_tiny_patch4_window7_224", SWIN),
}
"""{layout: the timm model that has it}"""

ROUND_TRIPS = MODELS | {
    "ViT, torchvision": MODELS["ViT"],
    "BEiT of the class token": ("beit_base_patch16_224", VIT | {"global_pool": "token"}),
    "BEiT, shared": (
        "beit_base_patch16_224",
        VIT | {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True, "use_abs_pos_emb": True},
    ),
    "DINOv2, SwiGLU": ("vit_giant_patch14_dinov2", VIT | {"mlp_ratio": 128 / 24}),
}


def layout_of(name):
    library = "torchvision" if "torchvision" in name else "transformers"
    return weights.LAYOUTS[f"{name.partition(',')[0].partition(' of')[0]} of {library}"]


def model_of(name, num_classes=5, seed=0):
    """A timm model whose tensors are all random."""
    timm_name, kwargs = ROUND_TRIPS[name]
    torch.manual_seed(seed)
    model = build_model(timm_name, num_classes, **kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def saved(path, tensors):
    safetensors.torch.save_file(tensors, path)
    return str(path)


# Names written by hand: {timm's name: the other names, whose tensors are its equal parts}

BLOCK = "encoder.layer.1."
LINEARS = {
    "blocks.1.norm1.weight": ["layernorm_before.weight"],
    "blocks.1.attn.proj.bias": ["attention.output.dense.bias"],
    "blocks.1.norm2.bias": ["layernorm_after.bias"],
    "blocks.1.mlp.fc1.weight": ["intermediate.dense.weight"],
    "blocks.1.mlp.fc2.bias": ["output.dense.bias"],
}
QKV = {
    f"blocks.1.attn.qkv.{last}": [f"attention.attention.{name}.{last}" for name in ("query", "key", "value")]
    for last in ("weight", "bias")
}
OUTSIDE = {
    "cls_token": ["embeddings.cls_token"],
    "pos_embed": ["embeddings.position_embeddings"],
    "patch_embed.proj.weight": ["embeddings.patch_embeddings.projection.weight"],
    "norm.weight": ["layernorm.weight"],
}
STAGE = "encoder.layers.1.blocks.0."
BY_HAND = {
    "ViT": ("vit.", BLOCK, LINEARS | QKV, OUTSIDE, {"head.bias": "classifier.bias"}),
    "DeiT": (
        *("deit.", BLOCK, LINEARS | QKV, OUTSIDE | {"dist_token": ["embeddings.distillation_token"]}),
        {"head.weight": "cls_classifier.weight", "head_dist.bias": "distillation_classifier.bias"},
    ),
    "BEiT": (
        "beit.",
        BLOCK,
        LINEARS
        | {"blocks.1.attn.qkv.weight": QKV["blocks.1.attn.qkv.weight"]}
        | {"blocks.1.attn.q_bias": ["attention.attention.query.bias"], "blocks.1.gamma_2": ["lambda_2"]}
        | {"blocks.1.attn.relative_position_bias_table": [
            "attention.attention.relative_position_bias.relative_position_bias_table"
        ]},
        {"fc_norm.weight": ["pooler.layernorm.weight"]},
        {"head.bias": "classifier.bias"},
    ),
    "Swin": (
        "swin.",
        STAGE,
        {
            "layers.1.blocks.0.attn.qkv.weight": [f"attention.self.{n}.weight" for n in ("query", "key", "value")],
            "layers.1.blocks.0.attn.relative_position_bias_table": ["attention.self.relative_position_bias_table"],
            "layers.1.blocks.0.mlp.fc2.bias": ["output.dense.bias"],
        },
        {
            "layers.1.downsample.reduction.weight": ["encoder.layers.0.downsample.reduction.weight"],
            "patch_embed.norm.bias": ["embeddings.norm.bias"],
        },
        {"head.fc.weight": "classifier.weight"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_names_written_by_hand(name):
    model = model_of(name)
    own, (base, block, inside, outside, heads) = model.state_dict(), BY_HAND[name]
    written = layout_of(name).from_timm(own, model)
    expected = {ours: [base + block + their for their in theirs] for ours, theirs in inside.items()}
    expected |= {ours: [base + their for their in theirs] for ours, theirs in outside.items()}
    expected |= {ours: [theirs] for ours, theirs in heads.items()}
    for ours, theirs in expected.items():
        assert_equal(list(own[ours].chunk(len(theirs))), [written[their] for their in theirs])


def test_registers_and_the_first_position_of_dinov2():
    """The class token of timm's model with registers contains its position embedding."""
    model = model_of("DINOv2 with registers", num_classes=0)
    tensors = layout_of("DINOv2 with registers").from_timm(model.state_dict(), model)
    tensors["embeddings.position_embeddings"][:, 0] = 1.5
    tensors["embeddings.cls_token"] -= 1.5
    loaded, _ = layout_of("DINOv2 with registers").to_timm(tensors, model)
    torch.testing.assert_close(loaded["cls_token"], model.cls_token.data)
    assert_equal(loaded["reg_token"], model.reg_token.data)
    assert_equal(loaded["pos_embed"], model.pos_embed.data)


@pytest.mark.parametrize("num_classes", [0, 5])
@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_out_and_in_is_the_same_bit_for_bit(tmp_path, name, num_classes):
    source, model = model_of(name, num_classes), model_of(name, num_classes, seed=1)
    layout = layout_of(name)
    written = layout.from_timm(source.state_dict(), source)
    notes = weights.load_weights(model, saved(tmp_path / "model.safetensors", written), new_head=False)
    assert_equal({**model.state_dict()}, {**source.state_dict()})
    assert not [note for note in notes if not re.search("prefix|mask_token left out|epsilon", note)]
    assert_equal(layout.from_timm(model.state_dict(), model), written)
    own = {tensor.untyped_storage().data_ptr() for tensor in source.state_dict().values()}
    assert own.isdisjoint(tensor.untyped_storage().data_ptr() for tensor in written.values())


REFUSED = {
    "registers": ("ViT", "vit_small_patch14_reg4_dinov2", {}, "1 prefix tokens instead of 5"),
    "average pooling": ("ViT", "vit_tiny_patch16_224", {"global_pool": "avg"}, "the pooling token"),
    "no class token's position": ("ViT", "deit3_small_patch16_224", {}, "17 position embeddings"),
    "LayerScale": ("ViT", "vit_small_patch14_dinov2", {}, "no name for blocks.0.ls1.gamma, and 5 more"),
    "no LayerScale": ("DINOv2", "vit_tiny_patch16_224", {}, "LayerScale"),
    "QuickGELU": ("ViT", "vit_base_patch32_clip_quickgelu_224", {}, "GELU without approximation"),
    "norms of another place": ("ViT", "vit_tiny_patch16_224", {"block_fn": "ResPost"}, "blocks of the kind Block"),
    "no registers": ("DINOv2 with registers", "vit_small_patch14_dinov2", {}, "register tokens"),
    "no distillation": ("DeiT", "deit_tiny_patch16_224", {}, "a VisionTransformerDistilled"),
    "a remedy": ("ViT", "vit_tiny_patch16_224", {"remedies": ["attnscale"]}, "no remedies"),
    "not Swin": ("Swin", "vit_tiny_patch16_224", {}, "a SwinTransformer"),
    "not BEiT": ("BEiT", "vit_tiny_patch16_224", {}, "a Beit"),
    "qkv norm": ("ViT", "vit_tiny_patch16_224", {"qk_norm": True}, "no name for blocks.0.attn.k_norm.bias"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_layout_cannot_hold_is_refused(case):
    layout, name, kwargs, named = REFUSED[case]
    if kwargs.get("block_fn"):
        from timm.models.vision_transformer import ResPostBlock

        kwargs = {"block_fn": ResPostBlock}
    model = build_model(name, 5, **VIT, **kwargs)
    with pytest.raises(ValueError, match=re.escape(named)):
        layout_of(layout).from_timm(model.state_dict(), model)


# The config.json beside a file


def configured(tmp_path, config, name="ViT"):
    model = model_of(name)
    (tmp_path / "config.json").write_text(json.dumps(config))
    return saved(tmp_path / "model.safetensors", layout_of(name).from_timm(model.state_dict(), model))


def test_another_number_of_heads_is_an_error(tmp_path):
    path = configured(tmp_path, {"model_type": "vit", "num_attention_heads": 6})
    with pytest.raises(ValueError) as caught:
        weights.load_weights(model_of("ViT"), path)
    file = tmp_path / "config.json"
    assert str(caught.value) == f"{path} does not fit VisionTransformer: {file} has 6 heads, and the model 3"
    path = configured(tmp_path, {"model_type": "swin", "num_heads": [2, 3]}, "Swin")
    with pytest.raises(ValueError, match="has 2 3 heads, and the model 2 4"):
        weights.load_weights(model_of("Swin"), path)


@pytest.mark.parametrize(
    ("config", "notes"),
    [
        ({"model_type": "vit", "layer_norm_eps": 1e-6, "num_attention_heads": 3, "hidden_act": "gelu"}, []),
        ({"model_type": "vit", "layer_norm_eps": 1e-5}, ["has the epsilon 1e-05 in its layer norms"]),
        ({"model_type": "vit"}, ["is taken to have the epsilon 1e-12 in its layer norms, and the model 1e-06"]),
        ([1], ["is taken to have the epsilon 1e-12"]),
        (
            {"model_type": "vit", "layer_norm_eps": 1e-6, "hidden_act": "quick_gelu"},
            ["has the activation quick_gelu, and the model GELU"],
        ),
    ],
)  # fmt: skip
def test_what_the_model_computes_otherwise_is_a_note(tmp_path, config, notes):
    found = weights.load_weights(model_of("ViT"), configured(tmp_path, config))[1:]
    assert len(found) == len(notes) and all(part in note for part, note in zip(notes, found, strict=True))


def test_the_architecture_in_timms_config(tmp_path):
    path = saved(tmp_path / "model.safetensors", model_of("ViT").state_dict())
    for architecture, lines in (("vit_tiny_patch16_224.augreg", 0), ("vit_wee_patch16_reg1_gap_256", 1)):
        (tmp_path / "config.json").write_text(json.dumps({"architecture": architecture}))
        notes = weights.load_weights(model_of("ViT", seed=1), path)
        assert len(notes) == lines and all(architecture in note for note in notes)
