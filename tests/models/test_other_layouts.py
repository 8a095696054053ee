"""Layouts of torchvision, CLIP and of the original code of DeiT-III, DINOv2, Swin, BEiT and MAE."""

import pytest
import torch
import torchvision
from helpers import assert_equal

from models import build_model, weights

VIT = {"patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 3}


def model_of(name, num_classes=5, seed=0, input_size=32, **kwargs):
    torch.manual_seed(seed)
    return build_model(name, num_classes, input_size, **({} if "swin" in name else VIT), **kwargs).eval()


def saved(path, stored):
    torch.save(stored, path)
    return str(path)


def respelled(tensors, *pairs):
    for ours, theirs in pairs:
        tensors = {name.replace(ours, theirs): tensor for name, tensor in tensors.items()}
    return tensors


# Of the original code


def swin_of_microsoft(tensors):
    """Patches are merged at the end of a stage, the classifier is `head`, and buffers are in the file."""
    tensors = respelled(tensors, ("layers.1.downsample", "layers.0.downsample"), ("head.fc.", "head."))
    index = torch.zeros(16, 16, dtype=torch.long)
    return tensors | {"layers.0.blocks.0.attn.relative_position_index": index, "layers.0.blocks.1.attn_mask": index}


def registers_of_dinov2(tensors):
    """The position of the class token is not yet added to it."""
    tensors = respelled(tensors, ("reg_token", "register_tokens"))
    tensors["cls_token"] = tensors["cls_token"] - 0.5
    tensors["pos_embed"] = torch.cat([torch.full((1, 1, 24), 0.5), tensors["pos_embed"]], dim=1)
    return tensors | {"mask_token": torch.zeros(1, 24)}


MASK = ["left out, of masked pre-training: mask_token"]
ORIGINAL = {
    "DeiT-III": (
        "deit3_small_patch16_224",
        {},
        lambda tensors: {"model": respelled(tensors, ("ls1.gamma", "gamma_1"), ("ls2.gamma", "gamma_2"))},
        [],
    ),
    "DINOv2": ("vit_small_patch14_dinov2", {}, lambda tensors: tensors | {"mask_token": torch.zeros(1, 24)}, MASK),
    "DINOv2, SwiGLU": (
        "vit_giant_patch14_dinov2",
        {"mlp_ratio": 128 / 24},
        lambda tensors: (
            respelled(tensors, ("mlp.fc1", "mlp.w12"), ("mlp.fc2", "mlp.w3")) | {"mask_token": torch.zeros(1, 24)}
        ),
        MASK,
    ),
    "DINOv2 with registers": ("vit_small_patch14_reg4_dinov2", {}, registers_of_dinov2, MASK),
    "Swin": (
        "swin_tiny_patch4_window7_224",
        {"window_size": 4, "embed_dim": 12, "depths": (2, 2), "num_heads": (2, 4)},
        lambda tensors: {"model": swin_of_microsoft(tensors)},
        [],
    ),
    "BEiT": (
        "beit_base_patch16_224",
        {},
        lambda tensors: {"model": tensors | {"blocks.0.attn.relative_position_index": torch.zeros(17, 17)}},
        [],
    ),
}


@pytest.mark.parametrize("name", ORIGINAL)
def test_files_of_the_original_code(tmp_path, name):
    timm_name, kwargs, write, notes = ORIGINAL[name]
    num_classes = 0 if "DINOv2" in name else 5
    source, model = (model_of(timm_name, num_classes, seed, **kwargs) for seed in (0, 1))
    path = saved(tmp_path / "file.pth", write(source.state_dict()))
    assert weights.load_weights(model, path, new_head=False) == notes
    for own, expected in zip(model.state_dict().values(), source.state_dict().values(), strict=True):
        torch.testing.assert_close(own, expected, rtol=0, atol=1e-6)


def test_a_swin_head_of_another_size_is_dropped(tmp_path):
    name, kwargs, write, _ = ORIGINAL["Swin"]
    path = saved(tmp_path / "file.pth", write(model_of(name, 5, **kwargs).state_dict()))
    notes = weights.load_weights(model_of(name, 7, **kwargs), path)
    shapes = (("weight", "[5, 24] dropped: the model needs [7, 24]"), ("bias", "[5] dropped: the model needs [7]"))
    assert notes == [f"head.fc.{last} of shape {shape}" for last, shape in shapes]


def test_the_norm_of_mae_serves_average_pooling(tmp_path):
    source = model_of("vit_tiny_patch16_224", 0)
    path = saved(tmp_path / "file.pth", {"model": source.state_dict()})
    model = model_of("vit_tiny_patch16_224", 5, seed=1, global_pool="avg")
    notes = weights.load_weights(model, path)
    assert "norm loaded as fc_norm: the model averages the patch tokens, and normalises the average" in notes
    assert_equal(model.fc_norm.state_dict(), source.norm.state_dict())
    assert torch.equal(model.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)


def test_a_classifier_of_other_tokens_is_refused(tmp_path):
    of_token, of_average = model_of("vit_tiny_patch16_224"), model_of("vit_tiny_patch16_224", global_pool="avg")
    path = saved(tmp_path / "file.pth", of_token.state_dict())
    weights.load_weights(of_average, path)  # a start of training, with a note
    with pytest.raises(ValueError, match=r"has a classifier of the class token \(norm\).*global_pool=token"):
        weights.load_weights(of_average, path, new_head=False)
    path = saved(tmp_path / "file.pth", of_average.state_dict())
    with pytest.raises(ValueError, match=r"averages the patch tokens \(fc_norm\).*global_pool=avg"):
        weights.load_weights(of_token, path)


# torchvision


def torchvision_vit():
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=3, hidden_dim=24, mlp_dim=96, num_classes=5
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("spelling", [(), (("mlp.0.", "mlp.linear_1."), ("mlp.3.", "mlp.linear_2."))])
def test_torchvision(tmp_path, spelling):
    theirs, model, images = torchvision_vit(), model_of("vit_tiny_patch16_224"), torch.randn(2, 3, 32, 32)
    path = saved(tmp_path / "file.pth", respelled(theirs.state_dict(), *spelling))
    assert weights.load_weights(model, path, new_head=False) == []
    with torch.no_grad():
        torch.testing.assert_close(model(images), theirs(images))
    written = weights.LAYOUTS["ViT of torchvision"].from_timm(model.state_dict(), model)
    assert_equal(written, {**theirs.state_dict()})


# CLIP and SigLIP of open_clip

TEXT = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
TOWERS = {"vit_base_patch32_clip_224": "GELU", "vit_base_patch32_clip_quickgelu_224": "QuickGELU"}


def clip_of_openai(tensors):
    """A timm model's tensors with OpenAI's names."""
    spellings = {
        "norm_pre.": "ln_pre.", "blocks.": "transformer.resblocks.", "norm1.": "ln_1.", "norm2.": "ln_2.",
        "qkv.": "in_proj_", "attn.proj.": "attn.out_proj.", "mlp.fc1.": "mlp.c_fc.", "mlp.fc2.": "mlp.c_proj.",
        "patch_embed.proj.": "conv1.",
    }  # fmt: skip
    tensors = respelled(tensors, *spellings.items())
    tensors = {f"ln_post.{name[5:]}" if name.startswith("norm.") else name: tensors[name] for name in tensors}
    tensors["class_embedding"] = tensors.pop("cls_token")[0, 0]
    tensors["positional_embedding"] = tensors.pop("pos_embed")[0]
    tensors["proj"] = tensors.pop("head.weight").mT
    del tensors["head.bias"]
    names = ("logit_scale", "ln_final.weight", "ln_final.bias")
    return {f"visual.{name}": tensor for name, tensor in tensors.items()} | {name: torch.zeros(2) for name in names}


@pytest.mark.parametrize("name", TOWERS)
def test_clip_of_openai(tmp_path, name):
    """The file does not say which activation it needs, and a note does."""
    source, model = (model_of(name, seed=seed) for seed in (0, 1))
    with torch.no_grad():
        source.head.bias.zero_()  # CLIP's projection has none
    path = saved(tmp_path / "clip.pt", clip_of_openai(source.state_dict()))
    activation, left = weights.load_weights(model, path, new_head=False)
    assert f"the model has {TOWERS[name]};" in activation
    assert left == "left out by timm's conversion: ln_final. (2 tensors), logit_scale"
    assert_equal({**model.state_dict()}, {**source.state_dict()})
    resized = weights.load_weights(model_of(name, 0, input_size=64), path)
    assert "pos_embed resampled to [1, 65, 24]" in resized and not any("visual." in note for note in resized)


@pytest.mark.slow
@pytest.mark.parametrize("name", TOWERS)
def test_clip_of_open_clip(tmp_path, name):
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    vision = {"layers": 2, "width": 24, "head_width": 8, "patch_size": 8, "image_size": 32}
    theirs = open_clip.model.CLIP(20, vision, TEXT, quick_gelu=TOWERS[name] == "QuickGELU").eval()
    path, images = saved(tmp_path / "clip.pt", {"state_dict": theirs.state_dict()}), torch.randn(2, 3, 32, 32)
    model = model_of(name, 20)
    notes = weights.load_weights(model, path, new_head=False)
    with torch.no_grad():
        torch.testing.assert_close(model(images), theirs.visual(images), rtol=1e-4, atol=1e-5)
    assert notes[1].startswith("left out by timm's conversion: ln_final. (2 tensors), logit_scale, ") and not notes[2:]


def open_clip_file(tower):
    """What open_clip writes around a tower of timm."""
    names = ("logit_scale", "text.token_embedding.weight", "text.ln_final.bias")
    trunk = {f"visual.trunk.{name}": tensor for name, tensor in tower.items()}
    return trunk | {name: torch.zeros(2) for name in names}


def test_siglip(tmp_path):
    source, model = (model_of("vit_base_patch16_siglip_224", 0, seed) for seed in (0, 1))
    path = saved(tmp_path / "siglip.pt", open_clip_file(source.state_dict()))
    left = "left out by timm's conversion: logit_scale, text. (2 tensors)"
    assert weights.load_weights(model, path) == [left]
    assert_equal({**model.state_dict()}, {**source.state_dict()})
    model = model_of("vit_base_patch16_siglip_gap_224", 0, 1)
    pool = f"visual.trunk.attn_pool. ({sum(name.startswith('attn_pool.') for name in source.state_dict())} tensors)"
    assert weights.load_weights(model, path) == [f"left out: {pool}, since the model pools with avg", left]
    assert torch.equal(model.norm.weight, source.norm.weight)
