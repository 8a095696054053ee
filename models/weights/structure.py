"""What a timm model computes, as far as the names and shapes of its tensors do not show it."""

from collections.abc import Mapping

import torch
from torch import nn


def require(model: nn.Module, kind: type, block: str, pool: str, prefix_tokens: int | None = None):
    """Check that a model computes what another library's model of the same weights computes.

    Args:
        kind: the class of timm.
        block: name of timm's class of all blocks.
        pool: of the tokens in front of the classifier.
        prefix_tokens: in front of the patches; None = not checked.

    Raises:
        ValueError: it does not; the text names the first difference.
    """
    blocks = [module for module in model.modules() if hasattr(module, "attn") and hasattr(module, "mlp")]
    acts = [module.mlp.act for module in blocks if hasattr(module.mlp, "act")]
    tokens = getattr(model, "num_prefix_tokens", 0)
    differences = {
        f"a {kind.__name__}": type(model) is not kind,
        "no remedies": hasattr(model, "remedies"),
        f"blocks of the kind {block}": {type(module).__name__ for module in blocks} != {block},
        f"{prefix_tokens} prefix tokens instead of {tokens}": prefix_tokens not in (None, tokens),
        f"the pooling {pool}": getattr(model, "global_pool", None) != pool and has_classifier(model),
        "GELU without approximation": any(not is_gelu(act) for act in acts),
    }
    for needed, differs in differences.items():
        if differs:
            raise ValueError(f"it needs {needed}")


def require_positions(model: nn.Module, weights: Mapping[str, torch.Tensor], num_prefix_tokens: int):
    """Check that there are position embeddings for the patches and this number of other tokens (timm: no_embed_class).

    Raises:
        ValueError: there are more or fewer.
    """
    needed = model.patch_embed.num_patches + num_prefix_tokens
    found = weights["pos_embed"].shape[1] if "pos_embed" in weights else 0
    if found != needed:
        too = ", of the class token too" if num_prefix_tokens else ""
        raise ValueError(f"it needs {needed} position embeddings{too}, and the model has {found}")


def classifiers(model: nn.Module) -> list[nn.Module]:
    """The layers of a timm model that give its logits: one, or two of a distilled model; none if it has no head."""
    found = model.get_classifier()
    found = found if isinstance(found, tuple) else (found,)
    return [layer for layer in found if any(True for _ in layer.parameters())]


def has_classifier(model: nn.Module) -> bool:
    return getattr(model, "num_classes", 0) > 0


def is_gelu(act: nn.Module) -> bool:
    """Whether an activation is the exact GELU (or a gate's, which has no such choice)."""
    if isinstance(act, nn.GELU):
        return act.approximate == "none"
    return type(act).__name__ in ("GELU", "SiLU")


def norm_eps(model: nn.Module) -> float | None:
    """The epsilon of the layer norms of a model's blocks; None if there is none or more than one."""
    found = {
        module.norm1.eps
        for module in model.modules()
        if hasattr(module, "norm1") and isinstance(module.norm1, nn.LayerNorm)
    }
    return found.pop() if len(found) == 1 else None


def num_heads(model: nn.Module) -> list[int]:
    """The number of heads of each block."""
    return [module.attn.num_heads for module in model.modules() if hasattr(getattr(module, "attn", None), "num_heads")]


def activation(model: nn.Module) -> nn.Module | None:
    """The activation of the first block's MLP."""
    return next((module.mlp.act for module in model.modules() if hasattr(getattr(module, "mlp", None), "act")), None)
