"""DiversityObjective: how the terms are weighed and summed, and that it is plain training when all are off."""

import copy
import math
from dataclasses import replace
from unittest import mock

import pytest
import textbook
import timm
import torch
from golden_inputs import normals
from torch import nn

from diversity import REGULARIZERS, DiversityObjective, MixedTarget, TapOutput, TappedViT, token_cross_entropy

BATCH, PATCHES, CLASSES = 3, 6, 5
COEFS = {
    "mixing": 0.7,
    "emb_cos_within": 0.5,
    "emb_contrast_cross": 0.3,
    "attn_cos_within": 2.0,
    "weight_mha_cond_orth": 0.01,
}
PROBES = {"weight_mha_cond_orth": normals(9, 2, 3, 4, 1).abs()}


def outputs(dist_logits=False):
    """Float64 tensors for every field of a TapOutput."""
    return TapOutput(
        logits=normals(0, BATCH, CLASSES),
        dist_logits=normals(1, BATCH, CLASSES) if dist_logits else None,
        patch_logits=normals(2, BATCH, PATCHES, CLASSES),
        first=normals(3, BATCH, PATCHES, 4),
        last=normals(4, BATCH, PATCHES, 4),
        attention=normals(5, BATCH, 2, 7, 7).softmax(dim=-1),
        weights=normals(6, 3, 4, 4),
    )


def targets():
    labels = torch.tensor([0, 3, 4])
    shares = torch.rand(BATCH, 1 + PATCHES, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return MixedTarget(labels, labels.flip(0), shares[:, 0], shares[:, 1:])


def textbook_classification(coef, smoothing):
    output, target = outputs(), targets()
    return textbook.mixing_loss(
        output.logits, output.patch_logits, **target._asdict(), smoothing=smoothing, coef=coef
    ).item()


class Distillation(nn.Module):
    """A distillation loss that keeps what it was called with."""

    def __init__(self, alpha):
        super().__init__()
        self.alpha = alpha

    def forward(self, samples, logits):
        self.called_with = samples, logits
        return logits.square().mean() + samples.mean()


# --- the sum


@pytest.mark.parametrize("coef", [0, 0.3, 1, 2])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixing_coefficient_weighs_the_patch_tokens(coef, smoothing):
    objective = DiversityObjective({"mixing": coef}, smoothing=smoothing)
    assert objective.patch_logits == (coef > 0) and objective.reads == []
    loss, terms = objective(outputs(), targets())
    assert loss.item() == pytest.approx(textbook_classification(coef, smoothing), rel=1e-10)
    assert terms["classification"].item() == loss.item()
    assert terms["cls_ce"].item() == pytest.approx(textbook_classification(0, smoothing), rel=1e-10)
    assert ("mixing" in terms) == (coef > 0)


def test_loss_is_classification_plus_coefficients_times_terms():
    objective = DiversityObjective(COEFS, smoothing=0.1)
    output = outputs()
    loss, terms = objective(output, targets(), probes=PROBES)
    expected = textbook_classification(COEFS["mixing"], 0.1)
    assert terms["classification"].item() == pytest.approx(expected, rel=1e-10)
    for name in list(COEFS)[1:]:
        taps = {tap: getattr(output, tap) for tap in REGULARIZERS[name].reads}
        probes = {"probes": PROBES[name]} if name in PROBES else {}
        raw = textbook.TEXTBOOK[name](**taps, **probes).item()
        assert terms[name].item() == pytest.approx(raw, rel=1e-9)
        assert terms[f"{name}_share"].item() == pytest.approx(COEFS[name] * raw / loss.item(), rel=1e-9)
        expected += COEFS[name] * raw
    assert loss.shape == () and loss.item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("alpha", [None, 0.3])
@pytest.mark.parametrize("coefs", [{}, {"mixing": 1.0}, {"attn_cos_within": 1.0}, COEFS], ids=len)
def test_shares_sum_to_1(coefs, alpha):
    objective = DiversityObjective(coefs, distillation=None if alpha is None else Distillation(alpha))
    terms = objective(outputs(), targets(), torch.ones(BATCH, 3, 2, 2, dtype=torch.float64))[1]
    shares = {name: value for name, value in terms.items() if name.endswith("_share")}
    assert sum(shares.values()).item() == pytest.approx(1)
    parts = {"cls_ce", *coefs} | ({"distillation"} if alpha else set())
    assert set(shares) == {f"{name}_share" for name in parts}
    assert set(terms) == {"classification"} | parts | set(shares)


def test_terms_are_detached_and_the_loss_is_not():
    output = TapOutput(*(None if value is None else value.requires_grad_() for value in outputs()))
    loss, terms = DiversityObjective(COEFS)(output, targets(), probes=PROBES)
    assert not any(value.requires_grad for value in terms.values())
    loss.backward()
    for name, value in output._asdict().items():
        assert value is None or value.grad.abs().sum() > 0, name


def test_probes_fix_the_random_start_vectors():
    objective = DiversityObjective({"weight_mha_cond_orth": 1.0})
    probes = normals(7, 2, 3, 4, 1)
    fixed = [
        objective(outputs(), targets(), probes={"weight_mha_cond_orth": probes})[1]["weight_mha_cond_orth"]
        for _ in range(2)
    ]
    assert fixed[0] == fixed[1] == REGULARIZERS["weight_mha_cond_orth"](weights=outputs().weights, probes=probes)
    drawn = [objective(outputs(), targets())[1]["weight_mha_cond_orth"] for _ in range(2)]
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_is_float32_under_autocast(dtype):
    output = TapOutput(*(None if value is None else value.to(dtype) for value in outputs()))
    target = MixedTarget(*targets()[:2], *(lam.float() for lam in targets()[2:]))
    probes = {name: value.to(dtype) for name, value in PROBES.items()}
    with torch.autocast("cpu", torch.bfloat16):
        loss, terms = DiversityObjective(COEFS)(output, target, probes=probes)
    plain, _ = DiversityObjective(COEFS)(output, target, probes=probes)
    assert loss.dtype == torch.float32 and torch.equal(loss, plain)
    assert {value.dtype for value in terms.values()} == {torch.float32}


# --- distillation


@pytest.mark.parametrize("coef", [0, 1.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dist_logits", [False, True])
def test_distillation_is_weighed_against_the_rest_of_the_classification(dist_logits, alpha, coef):
    output, samples = outputs(dist_logits), normals(8, BATCH, 3, 2, 2)
    distillation = Distillation(alpha)
    objective = DiversityObjective({"mixing": coef, "attn_cos_within": 0.5}, distillation=distillation)
    loss, terms = objective(output, targets(), samples)
    student = output.dist_logits if dist_logits else output.logits
    assert distillation.called_with[0] is samples and distillation.called_with[1] is student
    distilled = (student.square().mean() + samples.mean()).item()
    expected = (1 - alpha) * textbook_classification(coef, 0.0) + alpha * distilled
    assert terms["distillation"].item() == pytest.approx(distilled)
    assert terms["classification"].item() == pytest.approx(expected)
    assert loss.item() == pytest.approx(expected + 0.5 * terms["attn_cos_within"].item())


# --- which terms are active


@pytest.mark.parametrize("name", REGULARIZERS)
def test_reads_is_what_the_active_terms_read(name):
    objective = DiversityObjective({other: float(other == name) for other in ("mixing", *REGULARIZERS)})
    assert objective.coefs == {name: 1.0}
    assert objective.reads == sorted(REGULARIZERS[name].reads)
    assert not objective.patch_logits


def test_a_term_at_0_is_not_computed():
    def refuse(**taps):
        raise AssertionError("computed")

    refusing = {name: replace(term, function=refuse) for name, term in REGULARIZERS.items()}
    with mock.patch.dict(REGULARIZERS, refusing):
        objective = DiversityObjective({"mixing": 0, **dict.fromkeys(REGULARIZERS, 0.0)})
        assert (objective.coefs, objective.reads, objective.patch_logits) == ({}, [], False)
        loss, terms = objective(TapOutput(outputs().logits), targets())
        assert loss.item() == pytest.approx(textbook_classification(0, 0.0))
        assert set(terms) == {"classification", "cls_ce", "cls_ce_share"}
        with pytest.raises(AssertionError, match="computed"):
            DiversityObjective({"attn_cos_within": 1})(outputs(), targets())


def test_a_tap_that_was_not_handed_out_is_named():
    with pytest.raises(TypeError, match=r"missing: last$"):
        DiversityObjective({"emb_cos_within": 1})(TapOutput(outputs().logits), targets())


@pytest.mark.parametrize(
    "name, near", [("emb_cos_witin", "emb_cos_within"), ("mixin", "mixing"), ("?", "attn_cos_within")]
)
def test_unknown_name_is_an_error_with_near_names(name, near):
    with pytest.raises(ValueError, match="unknown term") as raised:
        DiversityObjective({name: 1.0})
    assert repr(name) in str(raised.value) and near in str(raised.value)


@pytest.mark.parametrize("name", ["mixing", *REGULARIZERS])
@pytest.mark.parametrize("coef", [-0.1, math.nan, math.inf, -math.inf])
def test_coefficient_must_be_finite_and_not_negative(name, coef):
    with pytest.raises(ValueError, match=f"coefficient of {name} must be a finite number >= 0; got {coef}"):
        DiversityObjective({name: coef})


def test_table_has_a_line_for_each_active_term():
    lines = DiversityObjective({**COEFS, "attn_cos_within": 0}).table().splitlines()
    active = [name for name in COEFS if name != "attn_cos_within"]
    assert [line.split()[0] for line in lines[1:]] == active
    for name, line in zip(active, lines[1:], strict=True):
        assert float(line.split()[1]) == COEFS[name]
        for tap in REGULARIZERS[name].reads if name in REGULARIZERS else ["patch"]:
            assert tap in line
    assert DiversityObjective({}).table() == "no diversity term: plain training"


# --- all coefficients 0 are plain training


def test_all_coefficients_0_train_as_the_stock_model_bit_for_bit():
    torch.manual_seed(0)
    size = dict(img_size=32, patch_size=8, depth=2, embed_dim=24, num_heads=3, num_classes=CLASSES)
    stock = timm.create_model("deit_tiny_patch16_224", drop_rate=0.1, drop_path_rate=0.1, **size).train()
    objective = DiversityObjective(dict.fromkeys(["mixing", *REGULARIZERS], 0.0), smoothing=0.1)
    tapped = TappedViT(copy.deepcopy(stock), objective.reads, objective.patch_logits).train()
    labels, lam = torch.tensor([0, 3, 1, 4]), torch.full((4,), 0.3)
    target = MixedTarget(labels, labels.flip(0), lam, None)

    def stock_loss(samples):
        return token_cross_entropy(stock(samples)[:, None], labels, labels.flip(0), lam[:, None], smoothing=0.1).mean()

    def tapped_loss(samples):
        return objective(tapped(samples), target)[0]

    for model, loss_of in ((stock, stock_loss), (tapped.model, tapped_loss)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        torch.manual_seed(1)
        for step in range(3):
            optimizer.zero_grad()
            loss_of(normals(step, 4, 3, 32, 32).float()).backward()
            optimizer.step()
    for (name, expected), parameter in zip(stock.named_parameters(), tapped.model.parameters(), strict=True):
        assert torch.equal(parameter, expected), name
        assert torch.equal(parameter.grad, expected.grad), name
