"""What the vision models of transformers call the modules that the taps read; transformers itself is not imported.

A new family is one more entry of `PREFIX_TOKENS` if its blocks have `attention` with `q_proj`, `k_proj`, `v_proj` and
`o_proj`, and its base model `embeddings`, `layernorm`, and the blocks as `layers` or `encoder.layer`.
"""

import torch
from torch import nn

from .block_parts import TransformersAttention, attention_of

PREFIX_TOKENS = {"vit": 1, "vit_msn": 1, "deit": 2, "dinov2": 1, "dinov2_with_registers": 1, "beit": 1}
"""{model_type of the config: class and distillation tokens}; registers are counted from the config."""

CLASSIFIERS = ("classifier", "cls_classifier")
"""Names of the head that reads the class token; a DeiT with a distillation head has the second."""

NAMES = "ViT, DeiT, DINOv2 and BEiT"

WHY_NOT = {
    "timm_wrapper": "it is a wrapper of a timm model, which can be tapped: give `model.timm_model` instead",
    "clip": (
        "a CLIP of transformers lacks a final norm of all tokens, and its classifier reads the mean of patch tokens "
        "before `post_layernorm`; its attention is `self_attn` with `out_proj`. timm has these weights, as "
        "vit_base_patch16_clip_224.openai"
    ),
    "siglip": (
        "a SigLIP of transformers pools its tokens by attention or by their mean, without a class token; its attention "
        "is `self_attn` with `out_proj`. timm has these weights, as vit_base_patch16_siglip_224"
    ),
}
"""{start of the model_type: what a family lacks that people ask for, and where its weights are}."""


def is_from_transformers(model: nn.Module) -> bool:
    """Whether a model is a `PreTrainedModel` of transformers."""
    return any(
        base.__name__ == "PreTrainedModel" and base.__module__.startswith("transformers.")
        for base in type(model).__mro__
    )


def reason_against(model: nn.Module) -> str:
    """Why a model of transformers cannot be tapped, as the end of an error."""
    model_type = getattr(model.config, "model_type", "unknown")
    if model_type in PREFIX_TOKENS:
        return (
            "its blocks have no `attention` with `q_proj`, `k_proj`, `v_proj` and `o_proj`, as those of this version's "
            f"{NAMES} should; update transformers"
        )
    known = [reason for start, reason in WHY_NOT.items() if model_type.startswith(start)]
    return known[0] if known else f"of transformers, only {NAMES} models can be tapped, and this is a {model_type!r}"


def backbone_fields(model: nn.Module) -> dict | None:
    """The fields of the `Backbone` of a ViT, DeiT, DINOv2 or BEiT of transformers; None for any other model."""
    if not is_from_transformers(model) or (model_type := model.config.model_type) not in PREFIX_TOKENS:
        return None
    base = model.base_model
    blocks = getattr(base, "layers", None) or getattr(getattr(base, "encoder", None), "layer", None)
    if not blocks or not all(isinstance(attention_of(block), TransformersAttention) for block in blocks):
        return None
    patches = base.embeddings.patch_embeddings
    image_size, patch_size = (
        (size, size) if isinstance(size, int) else tuple(size) for size in (patches.image_size, patches.patch_size)
    )
    head = [name for name in CLASSIFIERS if isinstance(getattr(model, name, None), nn.Module)]
    norm = "layernorm" if base is model else f"{model.base_model_prefix}.layernorm"
    if head and isinstance(pooled_norm := getattr(getattr(base, "pooler", None), "layernorm", None), nn.Module):
        head.insert(0, next(name for name, module in model.named_modules() if module is pooled_norm))
    return {
        "blocks": blocks,
        "all_blocks": blocks,
        "grid": tuple(image // patch for image, patch in zip(image_size, patch_size, strict=True)),
        "num_prefix_tokens": PREFIX_TOKENS[model_type] + getattr(model.config, "num_register_tokens", 0),
        "head": tuple(head),
        "norm": norm,
        "num_features": model.config.hidden_size,
        "num_classes": model.config.num_labels if head else 0,
        "patch_size": patch_size,
    }


def class_logits(model: nn.Module, output, distilled: bool = False):
    """The class logits [B, C] of what a model returned.

    Args:
        model: of timm or of transformers.
        output: what it returned: logits, timm's two logits of a distilled model in training, or an output object or
            tuple of transformers.
        distilled: return the logits of both heads of a distilled model of transformers, as timm's does in training.

    Raises:
        TypeError: the output has no logits.
    """
    if torch.is_tensor(output) or not is_from_transformers(model):
        return output
    if distilled and getattr(output, "distillation_logits", None) is not None:
        return output.cls_logits, output.distillation_logits
    logits = output[0] if isinstance(output, tuple) else getattr(output, "logits", None)
    if not torch.is_tensor(logits) or logits.dim() != 2:
        raise TypeError(f"{type(model).__name__} returns no class logits; load it as a model for image classification")
    return logits
