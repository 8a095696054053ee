"""Every remedy against a forward pass written out in float64, on every family of backbones it serves."""

import copy

import pytest
import torch
from families import build, images
from textbook_remedies import Textbook

from diversity import REMEDIES, apply_remedy

OF_TOKENS = ("contranorm", "featscale", "ortho_residual")
OF_VALUES = ("attnscale", "centered", "laplacian", "xsa")
OF_FIRST_VALUES = ("value_residual", "neutreno")

SERVED = {
    **dict.fromkeys(("deit", "registers", "average", "distilled", "deit3"), tuple(REMEDIES)),
    **dict.fromkeys(("eva02", "eva02_clip", "dinov3"), (*OF_FIRST_VALUES, "reattention", *OF_VALUES, *OF_TOKENS)),
    **dict.fromkeys(("swin", "swin_windows"), ("reattention", *OF_VALUES, *OF_TOKENS)),
    **dict.fromkeys(("beit", "beit_shared", "eva"), ("reattention", *OF_TOKENS)),
    "swinv2": ("reattention", "featscale"),
}
"""The remedies that each family can have."""

SETTINGS = {
    "contranorm": dict(contranorm_scale=0.3, contranorm_temperature=0.7),
    "gfsa": dict(gfsa_order=3),
    "laplacian": dict(laplacian_heads=1),
    "neutreno": dict(neutreno_strength=0.4),
    "value_residual": dict(value_residual_first=0.8, value_residual_own=0.3),
}

ALL = {name: SETTINGS.get(name, {}) for name in REMEDIES}


def with_remedies(model, settings):
    """A copy of a model with remedies whose parameters differ from their first values."""
    model = copy.deepcopy(model)
    for name, chosen in settings.items():
        apply_remedy(model, name, **chosen)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.remedies.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_is_the_textbook(name, stock, settings):
    model, samples = with_remedies(stock, settings), images()
    parameters = {key: p.detach().clone().requires_grad_() for key, p in model.remedies.named_parameters()}
    stock = copy.deepcopy(stock)
    expected = Textbook(name, stock, settings, parameters).logits(samples)
    actual = model(samples)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)
    assert not torch.allclose(actual, stock(samples), rtol=1e-4, atol=1e-4)
    probe = torch.linspace(-1, 1, actual.numel(), dtype=actual.dtype).view_as(actual)
    (actual * probe).sum().backward()
    (expected * probe).sum().backward()
    wanted = gradients(stock) | {f"remedies.{key}": p.grad for key, p in parameters.items()}
    torch.testing.assert_close(gradients(model), wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("remedy", REMEDIES)
def test_value_and_gradients_are_those_of_the_textbook(remedy):
    assert_is_the_textbook("deit", build("deit"), {remedy: SETTINGS.get(remedy, {})})


@pytest.mark.parametrize("name", [name for name in SERVED if name not in ("swin_windows", "swinv2")])
def test_all_remedies_of_a_family_together_are_those_of_the_textbook(name):
    assert_is_the_textbook(name, build(name), {remedy: ALL[remedy] for remedy in SERVED[name]})
