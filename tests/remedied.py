"""Small models with remedies, and the remedies that each family of backbones can have."""

import copy

import torch

from diversity import REMEDIES, apply_remedy

OF_TOKENS = ("contranorm", "featscale", "ortho_residual")
OF_VALUES = ("attnscale", "centered", "laplacian", "xsa")
OF_FIRST_VALUES = ("value_residual", "neutreno")

SERVED = {
    **dict.fromkeys(("deit", "registers", "average", "distilled", "deit3"), tuple(REMEDIES)),
    **dict.fromkeys(("eva02", "eva02_clip", "dinov3"), (*OF_FIRST_VALUES, "reattention", *OF_VALUES, *OF_TOKENS)),
    "swin": ("reattention", *OF_VALUES, *OF_TOKENS),
    **dict.fromkeys(("beit", "beit_shared", "eva"), ("reattention", *OF_TOKENS)),
    "swinv2": ("reattention", "featscale"),
}
"""{family: remedies}."""

SETTINGS = {
    "contranorm": dict(contranorm_scale=0.3, contranorm_temperature=0.7),
    "gfsa": dict(gfsa_order=3),
    "laplacian": dict(laplacian_heads=1),
    "neutreno": dict(neutreno_strength=0.4),
    "value_residual": dict(value_residual_first=0.8, value_residual_own=0.3, value_residual_learnable=True),
}
"""{remedy: settings that differ from the defaults}."""


def of_family(name, without=()):
    """{remedy: settings} of all remedies that a family can have."""
    return {remedy: SETTINGS.get(remedy, {}) for remedy in SERVED[name] if remedy not in without}


def with_remedies(model, settings):
    """A copy of a model with remedies whose parameters differ from their first values."""
    model = copy.deepcopy(model)
    for name, chosen in settings.items():
        apply_remedy(model, name, **chosen)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.remedies.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.3 * noise.to(parameter.dtype))
    return model


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
