"""Taps that a model cannot give: the error names the tap, the model and the argument."""

import pytest
import timm
import torch
from families import CLASSES, PATCHES, build, fused, hooks, images, tapped_with
from torch import nn

from diversity import TAPS, TapError, TappedViT


def test_unknown_tap_is_an_error():
    with pytest.raises(ValueError, match=f"unknown tap 'middle'; there are {', '.join(TAPS)}"):
        TappedViT(build(), reads=["first", "middle"])


@pytest.fixture(scope="module")
def convnet():
    return timm.create_model("resnet10t", num_classes=CLASSES).train()


@pytest.fixture(scope="module")
def cait():
    return timm.create_model(
        "cait_xxs24_224", img_size=32, patch_size=8, depth=2, embed_dim=24, num_heads=3, num_classes=CLASSES
    )


@pytest.mark.parametrize("tap", [*TAPS, "patch_logits"])
@pytest.mark.parametrize("family", ["convnet", "cait"])
def test_another_family_cannot_give_taps(family, tap, request):
    model = request.getfixturevalue(family)
    missing = f"{type(model).__name__} cannot give {tap}: it is not one of timm's ViT, DeiT, BEiT, EVA and Swin models"
    with pytest.raises(TapError, match=missing) as raised:
        tapped_with(tap, model)
    assert (raised.value.tap, raised.value.argument) == (tap, "model")
    assert hooks(model) == []


def test_convnet_without_taps_is_a_plain_model(convnet):
    samples = images().float()
    tapped = TappedViT(convnet)
    assert tapped.train()(samples).logits.shape == (2, CLASSES)
    assert torch.equal(tapped.eval()(samples), convnet(samples))


LACKING = [  # tap, family, arguments of the model and of TappedViT, the message, the argument at fault
    ("last", "deit", {}, {"emb_layers": "0,3"}, "there is no block 3; it has 3 blocks, 0 to 2", "emb_layers"),
    ("attention", "deit", {}, {"attn_layers": (7,)}, "there is no block 7; it has 3 blocks, 0 to 2", "attn_layers"),
    ("last", "swin", {}, {"emb_layers": "2"}, "it has 2 blocks in its last stage, 0 to 1", "emb_layers"),
    ("attention", "swinv2", {}, {"attn_layers": "2"}, "it has 2 blocks in its last stage, 0 to 1", "attn_layers"),
    ("first", "deit", {"patch_size": 32}, {}, "it has a single patch", None),
    ("last", "swin", {"patch_size": 16}, {}, "it has a single patch", None),
    ("attention", "deit", {"num_heads": 1}, {}, "it has a single head", None),
    ("attention_last", "swin", {"num_heads": (2, 1)}, {}, "it has a single head", None),
    ("attention_first", "deit", {"depth": 1}, {}, "it has a single block", None),
    ("attention_last", "swin", {"depths": (2, 1)}, {}, "it has a single block", None),
    ("attention_first", "swin_windows", {}, {}, "the windows of its first and last block hold different patches", None),
    ("attention_last", "swinv2", {}, {}, "the windows of its first and last block hold different patches", None),
    ("attention", "swin", {"img_size": 40}, {}, "padding would count as patches", None),
    ("weights", "eva02_clip", {}, {"weight_groups": "qkv,fc1"}, "no linear layer 'fc1'", "weight_groups"),
    ("patch_logits", "deit", {"patch_drop_rate": 0.5}, {}, "patches are dropped", None),
    ("patch_logits", "eva", {"patch_drop_rate": 0.5}, {}, "patches are dropped", None),
    ("attention", "vit", {"attn_layer": "diff", "num_heads": 3}, {}, "two maps for each head", None),
    ("circuits", "vit", {"attn_layer": "diff", "num_heads": 3}, {}, "block 0 has no attention with one", None),
    ("circuits", "deit", {"num_heads": 1}, {}, "it has a single head", None),
    ("circuits", "swin", {"num_heads": (1, 2)}, {}, "it has a single head", None),
    ("tokens", "vit", {"global_pool": "map"}, {}, "its head reads an attention pool", None),
    ("patch_logits", "vit", {"global_pool": "map"}, {}, "its head reads an attention pool", None),
    ("patch_logits", "deit", {"num_classes": 0}, {}, "it has no linear `head`", None),
    ("patch_logits", "swin", {"num_classes": 0}, {}, "it has no linear `head`", None),
]


@pytest.mark.parametrize("tap, family, model_options, options, message, argument", LACKING)
def test_what_a_model_lacks_is_named(tap, family, model_options, options, message, argument):
    model = build(family, **model_options)
    before = fused(model)
    with pytest.raises(TapError, match=f"{type(model).__name__} cannot give {tap}: .*{message}") as raised:
        tapped_with(tap, model, **options)
    assert (raised.value.tap, raised.value.argument) == (tap, argument)
    assert hooks(model) == [] and fused(model) == before


@pytest.mark.parametrize("group, part", [("fc2", "mlp"), ("qkv", "attn"), ("proj", "attn")])
def test_a_block_without_the_layers_of_a_weight_group_is_an_error(group, part):
    model = build()
    setattr(model.blocks[1], part, nn.Identity())
    with pytest.raises(TapError, match=f"its blocks have no linear layer '{group}'") as raised:
        TappedViT(model, ["weights"], weight_groups=group)
    assert (raised.value.tap, raised.value.argument) == ("weights", "weight_groups")


def test_attention_without_maps_to_hook_is_an_error():
    model = build()
    model.blocks[2].attn = nn.Identity()
    TappedViT(model, ["attention"])
    with pytest.raises(TapError, match="cannot give attention_last: block 2 has no attention with an `attn_drop`"):
        TappedViT(model, ["attention_last"])


def test_a_head_of_several_layers_cannot_classify_patches():
    model = build()
    model.head = nn.Sequential(nn.Linear(24, 8), nn.Linear(8, CLASSES))
    with pytest.raises(TapError, match="cannot give patch_logits: it has no linear `head`"):
        TappedViT(model, patch_logits=True)


def test_what_is_not_asked_for_may_be_lacking():
    model = build("eva", patch_drop_rate=0.5, depth=1)
    assert TappedViT(model, ["first", "last", "tokens", "attention", "weights"])(images()).attention_last is None
    assert TappedViT(build("swin_windows"), ["attention"])(images()).attention_first is None
    one_patch = TappedViT(build(patch_size=32, num_heads=1), ["tokens", "weights"], patch_logits=True)(images())
    assert one_patch.patch_logits.shape == (2, 1, CLASSES) and one_patch.attention is None


@pytest.mark.parametrize("tap", [*sorted({*TAPS} - {"weights", "circuits"}), "patch_logits"])
def test_bypassed_hook_is_an_error(tap):
    model = build()
    tapped = tapped_with(tap, model)
    model.forward_features = lambda samples, **kwargs: samples.new_zeros(len(samples), 1 + PATCHES, 24)
    with pytest.raises(RuntimeError, match="did not fire: VisionTransformer bypassed"):
        tapped(images())


@pytest.mark.parametrize("tap, block", [("attention", 0), ("attention_first", 0), ("attention_last", 2)])
def test_fused_attention_is_not_passed_over_in_silence(tap, block):
    tapped = TappedViT(build(), reads=[tap])
    tapped(images())
    tapped.model.blocks[block].attn.fused_attn = True
    with pytest.raises(RuntimeError, match=f"the hook for the maps of block {block} did not fire"):
        tapped(images())


def test_a_forward_that_fails_keeps_nothing():
    tapped = TappedViT(build(), reads=TAPS, patch_logits=True)
    tapped.model.norm.register_forward_pre_hook(lambda module, inputs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tapped(images())
    assert tapped._captured is None
