"""Small timm models of every family of backbones, in float64, and objectives for them."""

from typing import NamedTuple

import timm
import torch
from golden_inputs import normals

from diversity import LEVELS, REGULARIZERS, TAPS, WEIGHT_GROUPS, DiversityObjective, TappedViT

CLASSES = 5
PATCHES = 16
"""Of the models that are not Swin."""

VIT = dict(img_size=32, patch_size=8, depth=3, embed_dim=24, num_heads=3)
SWIN = dict(img_size=32, patch_size=4, window_size=4, embed_dim=12, depths=(2, 2), num_heads=(2, 4), drop_path_rate=0)


class Family(NamedTuple):
    """A kind of model. `comparable`: whether the maps of its first and its last tapped block can be compared."""

    timm_name: str
    options: dict
    num_prefix_tokens: int = 1
    weight_groups: tuple = WEIGHT_GROUPS
    comparable: bool = True


FAMILIES = {
    "vit": Family("vit_tiny_patch16_224", {}),
    "deit": Family("deit_tiny_patch16_224", {}),
    "average": Family("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}, 0),
    "registers": Family("vit_tiny_patch16_224", {"reg_tokens": 4}, 5),
    "distilled": Family("deit_tiny_distilled_patch16_224", {}, 2),
    "deit3": Family("deit3_small_patch16_224", {}),  # LayerScale
    "beit": Family("beit_base_patch16_224", {}),
    "beit_shared": Family(
        "beit_base_patch16_224",
        dict(use_rel_pos_bias=False, use_shared_rel_pos_bias=True, use_abs_pos_emb=True, global_pool="token"),
    ),
    "eva": Family("eva_giant_patch14_224", {}),
    "eva02": Family("eva02_tiny_patch14_224", {"qkv_fused": False}),  # rotary embedding, packed SwiGLU
    "eva02_clip": Family("eva02_base_patch16_clip_224", {}, 1, ("qkv", "proj", "fc2")),  # SwiGLU, norm within attention
    "dinov3": Family("vit_small_patch16_dinov3", {}, 5),
    "rope": Family("vit_small_patch16_rope_224", {}),
    "swin": Family("swin_tiny_patch4_window7_224", {}, 0),  # its last stage is a single window
    "swin_windows": Family("swin_tiny_patch4_window7_224", {"patch_size": 2}, 0, comparable=False),
    "swinv2": Family("swinv2_tiny_window8_256", {"patch_size": 2}, 0, comparable=False),
}


def build(name="deit", **options):
    """A small timm model in float64 and training mode, with weights larger than timm's initial ones."""
    family = FAMILIES[name]
    size = SWIN if "swin" in name else VIT
    torch.manual_seed(0)
    model = timm.create_model(
        family.timm_name, **{**size, "num_classes": CLASSES, **family.options, **options}
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.train()


def images(batch=2):
    return normals(1, batch, 3, 32, 32)


def taps_of(family):
    return [tap for tap in TAPS if family.comparable or tap not in ("attention_first", "attention_last")]


def hooks(model):
    return [hook for module in model.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]


def attentions(model):
    """The modules that have a fused form."""
    return [module for module in model.modules() if hasattr(module, "fused_attn")]


def fused(model):
    return [attn.fused_attn for attn in attentions(model)]


def identity_blocks(name, **options):
    """A model whose blocks return their input."""
    model = build(name, **options)
    stages = model.layers if "swin" in name else [model]
    with torch.no_grad():
        for block in (block for stage in stages for block in stage.blocks):
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight.zero_()
                layer.bias.zero_()
    return model


def objective_of(family, levels=LEVELS):
    terms = [term for term in REGULARIZERS.values() if term.level in levels]
    return DiversityObjective(
        {"mixing": 1.0}
        | {term.name: 0.01 for term in terms if family.comparable or "attention_first" not in term.reads}
    )


def tapped_with(asked, model, **options):
    """A TappedViT for one tap, or "patch_logits", or None for neither."""
    return TappedViT(model, reads=[asked] if asked in TAPS else [], patch_logits=asked == "patch_logits", **options)
