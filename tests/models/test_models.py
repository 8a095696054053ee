"""The paper's models and any other timm model: names, keys, initial values, sizes, arguments, errors."""

import pytest
import timm
import torch
from helpers import TINY_MODEL

from models import build_model

STOCK = [f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")]
DISTILLED = [f"deit_{size}_distilled_patch16_224" for size in ("tiny", "small", "base")]
LAYER24 = "deit_small_layer24_patch16_224"
DIVERSE = [f"{name}_diverse" for name in (*STOCK, LAYER24)]
SMALL = {"num_classes": 7, **TINY_MODEL}


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def full_size(name, **kwargs):
    """The model without memory behind it, for counting."""
    with torch.device("meta"):
        return build_model(name, 1000, **kwargs)


@pytest.mark.parametrize("name", [*STOCK, *DISTILLED, LAYER24, *DIVERSE])
def test_names_build_and_run(name):
    model = build_model(name, **SMALL).eval()
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    assert (len(model.blocks), model.embed_dim, model.blocks[0].attn.num_heads) == (2, 24, 3)
    assert model.patch_embed.grid_size == (4, 4)


@pytest.mark.parametrize("name", [LAYER24, *DIVERSE])
def test_keys_are_timms(name):
    with torch.device("meta"):
        stock = timm.create_model(name.removesuffix("_diverse").replace("_layer24", ""))
    keys = {key for key in stock.state_dict() if not key.startswith("blocks.") or key.startswith("blocks.0.")}
    model = full_size(name)
    depth = 24 if "layer24" in name else 12
    assert len(model.blocks) == depth
    assert {key for key in model.state_dict() if not key.startswith("blocks.") or key.startswith("blocks.0.")} == keys
    if depth == 12:
        assert {key: value.shape for key, value in model.state_dict().items()} == {
            key: value.shape for key, value in stock.state_dict().items()
        }


@pytest.mark.parametrize("name", [*STOCK, LAYER24, *DIVERSE])
def test_class_token_init(name):
    kwargs = SMALL | {"embed_dim": 768}
    torch.manual_seed(0)
    std = build_model(name, **kwargs).cls_token.std().item()
    assert std == pytest.approx(0.02 if name.endswith("_diverse") else 1e-6, rel=0.1)


def test_only_the_class_token_differs():
    torch.manual_seed(0)
    stock = build_model("deit_tiny_patch16_224", **SMALL).state_dict()
    torch.manual_seed(0)
    diverse = build_model("deit_tiny_patch16_224_diverse", **SMALL).state_dict()
    assert [key for key in stock if not torch.equal(stock[key], diverse[key])] == ["cls_token"]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("deit_tiny_patch16_224_diverse", 5_717_416),
        ("deit_small_patch16_224_diverse", 22_050_664),
        ("deit_base_patch16_224_diverse", 86_567_656),
        ("deit_small_layer24_patch16_224_diverse", 43_344_232),
    ],
)
def test_parameter_counts(name, count):
    model = full_size(name)
    assert parameters(model) == count
    assert len(model.blocks) == (24 if "layer24" in name else 12)


def test_depth_of_the_24_layer_model_can_be_chosen():
    assert len(build_model(LAYER24, **SMALL | {"depth": 3}).blocks) == 3


def test_distilled_model_has_two_heads():
    model = build_model("deit_tiny_distilled_patch16_224", **SMALL)
    model.set_distilled_training(True)
    logits = model.train()(torch.zeros(2, 3, 32, 32))
    assert [part.shape for part in logits] == [(2, 7), (2, 7)]


@pytest.mark.parametrize(
    ("name", "num_prefix_tokens"),
    [
        ("vit_tiny_patch16_224", 1),
        ("vit_small_patch16_224", 1),
        ("vit_small_patch14_reg4_dinov2", 5),
        ("vit_medium_patch16_gap_240", 0),
        ("deit3_small_patch16_224", 1),
        ("deit_tiny_patch16_224.fb_in1k", 1),
    ],
)
def test_any_other_vit(name, num_prefix_tokens):
    model = build_model(name, **SMALL).eval()
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 7)
    assert model.num_prefix_tokens == num_prefix_tokens


def test_arguments_reach_the_model():
    model = build_model("deit_tiny_patch16_224_diverse", 7, 48, 12, 0.3, 0.2, depth=3, embed_dim=48, mlp_ratio=2.0)
    assert model.patch_embed.img_size == (48, 48)
    assert model.patch_embed.patch_size == (12, 12)
    assert model.pos_embed.shape == (1, 17, 48)
    assert model.blocks[0].mlp.fc1.out_features == 96
    assert model.head_drop.p == 0.3
    assert [block.drop_path1.drop_prob for block in model.blocks[1:]] == pytest.approx([0.1, 0.2])


def test_defaults_are_the_models_own():
    model = full_size("deit_tiny_patch16_224_diverse")
    assert (model.patch_embed.img_size, model.patch_embed.patch_size) == ((224, 224), (16, 16))


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto", "mobilenetv3_small_050", "vgg11"])
def test_convolutional_nets(name):
    model = full_size(name, input_size=64)
    assert parameters(model) > 0
    assert model.num_classes == 1000


def test_convolutional_net_runs():
    model = build_model("resnet10t", 7, 64, drop_path=0.1).eval()
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


@pytest.mark.parametrize(
    ("name", "arguments", "named"),
    [
        ("deit_smal_patch16_224", {}, "deit_smal_patch16_224 deit_small_patch16_224"),
        ("deit_small_patch16_224_divers", {}, "deit_small_patch16_224_diverse"),
        ("?", {}, "? list_models"),
        ("deit_tiny_patch16_224", {"depht": 3}, "depht"),
        ("deit_tiny_patch16_224", {"embed_dim": 25, "num_heads": 3}, "25"),
        ("deit_tiny_patch16_224", {"depth": "six"}, "six"),
        ("deit_tiny_patch16_224", {"input_size": 230}, "--input-size 230 --patch-size 16"),
        ("deit_tiny_patch16_224", {"input_size": 32, "patch_size": 7}, "--input-size 7"),
        ("deit_tiny_patch16_224", {"input_size": 8, "patch_size": 16}, "--input-size 16"),
        ("vit_small_patch14_dinov2", {"input_size": 224 + 16}, "--input-size 14"),
        ("swin_tiny_patch4_window7_224", {"input_size": 222}, "222"),
        ("resnet10t", {"patch_size": 8}, "patch_size"),
        ("resnet10t", {"depth": 8}, "depth"),
        ("resnet10t", {"remedies": ["xsa"]}, "--remedy xsa ResNet"),
        ("deit_tiny_patch16_224", {"remedies": ["xs"]}, "xs xsa"),
        (
            "deit_tiny_patch16_224",
            {"remedies": ["xsa"], "remedy_kwargs": {"gfsa_order": 3}},
            "gfsa_order --remedy gfsa",
        ),
        ("deit_tiny_patch16_224", {"remedies": ["gfsa"], "remedy_kwargs": {"gfsa_order": 1}}, "--remedy gfsa 1"),
    ],
)
def test_wrong_models(name, arguments, named):
    with pytest.raises(ValueError) as caught:
        build_model(name, **{"num_classes": 7, **arguments})
    line = str(caught.value)
    assert line.startswith(f"{name} ") and "\n" not in line
    assert all(word in line for word in named.split())
