"""The textbook step against the stock model, the taps and the fast objective, in float64; and under autocast."""

import ast
import copy
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from golden_inputs import normals

from benchmarks import textbook_step
from diversity import PRESETS, DiversityObjective, PatchMixup, TappedViT

COEFS = PRESETS["released"].coefs
HEAVY = {
    "mixing": 0.7,
    "emb_cos_within": 2.0,
    "emb_contrast_cross": 3.0,
    "attn_cos_within": 5.0,
    "weight_mha_cond_orth": 0.3,
}
"""Coefficients at which every term is felt in the loss and the gradients."""

BATCH, CLASSES, GRID = 4, 7, (4, 4)
VARIANTS = {
    "deit": {},
    "layer_scale": {"init_values": 0.5},
    "registers": {"reg_tokens": 2, "no_embed_class": True},
    "qk_norm": {"qk_norm": True, "scale_attn_norm": True},
}


def build(**options):
    """A two-block ViT on 32 px in float64 and training mode, with lively weights."""
    torch.manual_seed(0)
    size = dict(img_size=32, patch_size=8, depth=2, embed_dim=24, num_heads=3, num_classes=CLASSES)
    model = timm.create_model("deit_tiny_patch16_224", **size, **options).double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch(mixup_alpha, cutmix_alpha):
    """Mixed samples and their MixedTarget."""
    np.random.seed(1)
    samples, labels = normals(1, BATCH, 3, 32, 32), torch.tensor([0, 3, 6, 3])
    return PatchMixup(mixup_alpha, cutmix_alpha, grid=GRID)(samples, labels)


def gradients(loss, model):
    return dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, model.parameters()), strict=True))


def step(model, samples, target, coefs=COEFS, probes=None):
    """The textbook's loss, terms and gradients."""
    outputs = textbook_step.forward(model, samples)
    loss, terms = textbook_step.loss(outputs, model, *target, coefs, smoothing=0.1, probes=probes)
    return loss, terms, gradients(loss, model)


def fast_step(model, samples, target, coefs, probes):
    """The same of DiversityObjective."""
    objective = DiversityObjective(coefs, smoothing=0.1)
    with TappedViT(model, objective.reads, objective.patch_logits) as tapped:
        loss, terms = objective(tapped(samples), target, probes={"weight_mha_cond_orth": probes})
    return loss, terms, gradients(loss, model)


def largest_gap(value, expected):
    """Largest deviation as a share of the largest entry."""
    return ((value - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", VARIANTS)
def test_forward_is_the_stock_model_with_the_taps(name):
    model, samples = build(**VARIANTS[name]), normals(1, BATCH, 3, 32, 32)
    outputs = textbook_step.forward(model, samples)
    torch.testing.assert_close(outputs.logits, copy.deepcopy(model)(samples), rtol=1e-9, atol=1e-9)
    with TappedViT(model, reads=["first", "last", "attention"], patch_logits=True) as tapped:
        taps = tapped(samples)
    for tap, value in outputs._asdict().items():
        torch.testing.assert_close(value, getattr(taps, tap), rtol=1e-9, atol=1e-9)
    assert outputs.last.shape == (BATCH, 16, 24)


def test_forward_drops_what_the_stock_model_drops():
    rates = dict(pos_drop_rate=0.3, attn_drop_rate=0.3, proj_drop_rate=0.3, drop_path_rate=0.3)
    model, samples = build(**rates), normals(1, BATCH, 3, 32, 32)
    for block in model.blocks:
        block.attn.fused_attn = False  # its draws cannot be repeated
    torch.manual_seed(5)
    expected = model(samples)
    torch.manual_seed(5)
    outputs = textbook_step.forward(model, samples)
    torch.testing.assert_close(outputs.logits, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(outputs.attention.sum(dim=-1), torch.ones_like(outputs.attention[..., 0]))


def test_forward_drops_before_the_head():
    model = build(drop_rate=0.5)
    model.head = torch.nn.Identity()
    outputs = textbook_step.forward(model, normals(1, BATCH, 3, 32, 32))
    assert (outputs.patch_logits == 0).double().mean().item() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "beit_base_patch16_224"])
def test_models_that_it_would_unroll_wrongly_are_refused(name):
    model = timm.create_model(name, img_size=32, patch_size=8, depth=1, embed_dim=24, num_heads=3)
    with pytest.raises(TypeError, match="plain ViTs with a class token"):
        textbook_step.forward(model, torch.zeros(2, 3, 32, 32))


@pytest.mark.parametrize("coefs", [COEFS, HEAVY], ids=["released", "heavy"])
@pytest.mark.parametrize("mixed_by", ["cutmix", "mixup", "neither"])
def test_loss_and_gradients_are_those_of_the_objective(mixed_by, coefs):
    samples, target = batch(mixup_alpha=0.8 * (mixed_by == "mixup"), cutmix_alpha=1.0 * (mixed_by == "cutmix"))
    assert (len(target.patch_lam[0].unique()) > 1) == (mixed_by == "cutmix")
    model = build()
    probes = torch.rand(2, 6, 24, 1, dtype=torch.float64)
    loss, terms, grads = step(model, samples, target, coefs, probes)
    expected, expected_terms, expected_grads = fast_step(model, samples, target, coefs, probes)
    assert loss.shape == () and loss.item() == pytest.approx(expected.item(), rel=1e-9)
    for name, value in terms.items():
        assert value.item() == pytest.approx(expected_terms[name].item(), rel=1e-9), name
    assert set(terms) == {name for name in expected_terms if not name.endswith("_share")}
    for name, grad in grads.items():
        assert largest_gap(grad, expected_grads[name]) < 1e-9, name


@pytest.mark.parametrize("term", COEFS)
def test_gradients_of_every_term_alone_are_those_of_the_objective(term):
    samples, target = batch(mixup_alpha=0, cutmix_alpha=1.0)
    model = build()
    probes = torch.rand(2, 6, 24, 1, dtype=torch.float64)
    plain, coefs = dict.fromkeys(COEFS, 0.0), dict.fromkeys(COEFS, 0.0) | {term: 1.0}
    with_term, without = (step(model, samples, target, c, probes)[2] for c in (coefs, plain))
    fast_with, fast_without = (fast_step(model, samples, target, c, probes)[2] for c in (coefs, plain))
    reached = 0
    for name in with_term:
        change, expected = with_term[name] - without[name], fast_with[name] - fast_without[name]
        reached += bool(expected.abs().max() > 1e-6)
        torch.testing.assert_close(change, expected, rtol=1e-9, atol=1e-12)
    assert (reached == 2) if term == "weight_mha_cond_orth" else (reached > 2)


def test_probes_are_drawn_anew_when_none_are_given():
    model = build()
    torch.manual_seed(3)
    drawn = [textbook_step.weight_mha_cond_orth(model).item() for _ in range(2)]
    torch.manual_seed(3)
    probes = torch.stack([torch.rand(2, 24, 1, dtype=torch.float64) for _ in range(6)], dim=1)
    assert drawn[0] != drawn[1]
    assert textbook_step.weight_mha_cond_orth(model, probes).item() == pytest.approx(drawn[0], rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model, probes = build().float(), torch.rand(2, 6, 24, 1)
    samples, target = batch(mixup_alpha=0, cutmix_alpha=1.0)
    samples, target = samples.float(), target._replace(lam=target.lam.float(), patch_lam=target.patch_lam.float())
    _, expected, expected_grads = step(model, samples, target, probes=probes)
    with torch.autocast("cpu", dtype):
        _, terms, grads = step(model, samples, target, probes=probes)
    for name, value in terms.items():
        assert value.item() == pytest.approx(expected[name].item(), rel=0.05, abs=0.01), name
    for name, grad in grads.items():
        assert grad.dtype == torch.float32 and largest_gap(grad, expected_grads[name]) < 0.2, name


def test_it_imports_torch_and_timm_only():
    tree = ast.parse(Path(textbook_step.__file__).read_text())
    modules = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert {name.split(".")[0] for name in modules} == {"torch", "timm", "typing"}
