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
from objective_inputs import BATCH, CLASSES, PATCHES, Distillation, outputs, targets, textbook_classification

from diversity import (
    REGULARIZERS,
    DiversityObjective,
    MixedTarget,
    TapOutput,
    TappedViT,
    token_cross_entropy,
)

COEFS = {
    "mixing": 0.7,
    "emb_cos_within": 0.5,
    "emb_contrast_cross": 0.3,
    "attn_cos_within": 2.0,
    "weight_mha_cond_orth": 0.01,
}
PROBES = {"weight_mha_cond_orth": normals(9, 2, 3, 4, 1).abs()}


# --- the sum


def test_an_alias_is_the_term_it_names():
    objective = DiversityObjective({"attn_abscos_within": 0.5, "attn_cos_within": 0, "attn_abscos_cross": 0.0})
    assert objective.coefs == {"attn_cos_within": 0.5} and objective.reads == ["attention"]
    assert REGULARIZERS["attn_abscos_within"] is REGULARIZERS["attn_cos_within"]
    with pytest.raises(ValueError, match="attn_abscos_within is another name of attn_cos_within; give one of them"):
        DiversityObjective({"attn_abscos_within": 0.5, "attn_cos_within": 0.5})


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


# --- which terms are active


@pytest.mark.parametrize("name", REGULARIZERS)
def test_reads_is_what_the_active_terms_read(name):
    objective = DiversityObjective({other: float(other == name) for other in ("mixing", *REGULARIZERS)})
    assert objective.coefs == {name: 1.0}
    reads = ["tokens"] if name == "emb_grad_diversity" else sorted(REGULARIZERS[name].reads)
    assert objective.reads == reads
    assert all(objective.readers(tap) == [name] for tap in reads)
    assert not objective.patch_logits


def test_readers_are_the_active_terms_that_need_a_tap():
    objective = DiversityObjective({**COEFS, "emb_grad_diversity": 1, "emb_so": 0})
    assert objective.readers("last") == ["emb_cos_within", "emb_contrast_cross"]
    assert objective.readers("first") == ["emb_contrast_cross"]
    assert objective.readers("tokens") == ["emb_grad_diversity"]
    assert objective.readers("weights") == ["weight_mha_cond_orth"]
    assert objective.readers("patch_logits") == ["mixing"]
    assert objective.readers("attention_last") == []


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


def test_a_missing_tap_is_named():
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


def test_table_shows_settings():
    coefs = {"mixing": 1, "emb_so": 1, "emb_mhs": 1, "weight_mha_cond_orth": 1}
    options = {"cond_orth_steps": 5, "cond_orth_normalize": True, "mhs_collapse_aware": True}
    lines = DiversityObjective(coefs, mixing_balance="equal", **options).table().splitlines()
    assert [line.split(maxsplit=2)[::2] for line in lines[1:]] == [
        ["mixing", "patch logits; mixing_balance=equal; mixing_where=always"],
        ["emb_so", "last"],
        ["emb_mhs", "last; mhs_collapse_aware=True"],
        ["weight_mha_cond_orth", "weights; cond_orth_steps=5; cond_orth_normalize=True"],
    ]


# --- options


@pytest.mark.parametrize("option", textbook.OPTION_VALUES)
def test_an_option_reaches_the_terms_that_have_it(option):
    output = outputs()
    weights = normals(9, 2, 3, 4, 1)
    probes = {"weight_mha_cond_orth": weights, "weight_mha_cond_orth_in": weights}
    probes |= {"emb_cond_orth": normals(10, 2, BATCH, PATCHES, 1), "attn_cond_orth": normals(11, 2, BATCH, 2, 1)}
    given = {"first", "last", "attention", "weights"}
    coefs = {name: 0.1 for name, term in REGULARIZERS.items() if given.issuperset(term.reads)}
    chosen = {option: textbook.OPTION_VALUES[option]}
    objective = DiversityObjective(coefs, **chosen)
    plain = DiversityObjective(coefs)(output, targets(), probes=probes)[1]
    terms = objective(output, targets(), probes=probes)[1]
    for name in coefs:
        term = REGULARIZERS[name]
        assert objective.options[name] == (chosen if option in term.options else {})
        fixed = {"probes": probes[name]} if name in probes else {}
        direct = term(**{tap: getattr(output, tap) for tap in term.reads}, **objective.options[name], **fixed)
        assert torch.equal(terms[name], direct), name
        assert (terms[name] != plain[name]) == (option in term.options), name


def test_unknown_option_is_an_error():
    with pytest.raises(TypeError, match="no term has an option 'cond_orth_step'"):
        DiversityObjective({"weight_mha_cond_orth": 1.0}, cond_orth_step=3)


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
