"""DiversityObjective: how the terms are weighed and summed, and that it is plain training when all are off."""

import copy
import math
from dataclasses import replace
from unittest import mock

import pytest
import textbook
import timm
import torch
from families import attentions, build, images
from golden_inputs import normals
from torch import nn
from unrolled import classified, unrolled

from diversity import (
    PRESETS,
    REGULARIZERS,
    DiversityObjective,
    MixedTarget,
    TapOutput,
    TappedViT,
    token_cross_entropy,
)

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


@pytest.mark.parametrize("coef", [0, 0.3, 1, 2])
@pytest.mark.parametrize("alpha", [None, 0.3])
def test_equal_balance_weighs_the_patches_as_one(coef, alpha):
    distillation = None if alpha is None else Distillation(alpha)
    objective = DiversityObjective({"mixing": coef}, 0.1, distillation, mixing_balance="equal")
    output, target = outputs(), targets()
    loss, terms = objective(output, target, torch.ones(BATCH, 3, 2, 2, dtype=torch.float64))
    labels = target.labels, target.partner
    cls_ce = textbook.token_cross_entropy(output.logits[:, None], *labels, target.lam[:, None], 0.1).mean()
    patch_ce = textbook.token_cross_entropy(output.patch_logits, *labels, target.patch_lam, 0.1).mean()
    mixed = (cls_ce + coef * patch_ce) / (1 + coef)
    expected = mixed if alpha is None else (1 - alpha) * mixed + alpha * terms["distillation"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    assert terms["cls_ce"].item() == pytest.approx(cls_ce.item(), rel=1e-10)
    assert sum(value for name, value in terms.items() if name.endswith("_share")).item() == pytest.approx(1)
    if coef and not alpha:
        share = coef * patch_ce / (1 + coef) / mixed
        assert terms["mixing"].item() == pytest.approx(patch_ce.item(), rel=1e-10)
        assert terms["mixing_share"].item() == pytest.approx(share.item(), rel=1e-10)


def test_an_alias_is_the_term_it_names():
    objective = DiversityObjective({"attn_abscos_within": 0.5, "attn_cos_within": 0, "attn_abscos_cross": 0.0})
    assert objective.coefs == {"attn_cos_within": 0.5} and objective.reads == ["attention"]
    assert REGULARIZERS["attn_abscos_within"] is REGULARIZERS["attn_cos_within"]
    with pytest.raises(ValueError, match="attn_abscos_within is another name of attn_cos_within; give one of them"):
        DiversityObjective({"attn_abscos_within": 0.5, "attn_cos_within": 0.5})


def test_unknown_balance_is_an_error():
    with pytest.raises(ValueError, match="unknown mixing_balance 'even'; there are tokens, equal"):
        DiversityObjective({"mixing": 1.0}, mixing_balance="even")


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


def test_table_shows_settings():
    coefs = {"mixing": 1, "emb_so": 1, "emb_mhs": 1, "weight_mha_cond_orth": 1}
    options = {"cond_orth_steps": 5, "cond_orth_normalize": True, "mhs_collapse_aware": True}
    lines = DiversityObjective(coefs, mixing_balance="equal", **options).table().splitlines()
    assert [line.split(maxsplit=2)[::2] for line in lines[1:]] == [
        ["mixing", "patch logits, per-patch labels; mixing_balance=equal"],
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


# --- presets


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_an_objective(name):
    preset = PRESETS[name]
    objective = DiversityObjective(preset.coefs, **preset.settings)
    assert objective.coefs == preset.coefs and preset.doc


def test_released_is_the_paper():
    assert PRESETS["released"].settings == {}
    assert PRESETS["released"].coefs == {
        "mixing": 1,
        "emb_cos_within": 0.5,
        "emb_contrast_cross": 0.5,
        "attn_cos_within": 1e-4,
        "weight_mha_cond_orth": 5e-4,
    }


def test_diversepatch_is_its_three_losses_with_weight_1():
    assert PRESETS["diversepatch"].settings == {}
    coefs = {"mixing": 1, "emb_offdiag_abscos_within": 1, "emb_dot_contrast_cross": 1}
    assert PRESETS["diversepatch"].coefs == coefs


def test_corrected_is_released_without_its_faults():
    released, corrected = PRESETS["released"].coefs, PRESETS["corrected"].coefs
    assert corrected == {
        "mixing": released["mixing"],
        "emb_offdiag_cos_within": released["emb_cos_within"],
        "emb_contrast_cross": released["emb_contrast_cross"],
        "attn_offdiag_cos_within": released["attn_cos_within"],
        "weight_mha_cond_orth": released["weight_mha_cond_orth"],
    }
    settings = dict(PRESETS["corrected"].settings)
    assert settings.pop("cond_orth_steps") > 1
    assert settings == {"mixing_balance": "equal", "mhs_collapse_aware": True}


# --- gradient diversity


def token_gradient_case(name="deit", mixing=0.7, alpha=None):
    """A model, its target, and a training step: a call that returns the loss and the terms."""
    model, samples = build(name), images()
    if name == "distilled":
        model.set_distilled_training(True)
    distillation = None if alpha is None else Distillation(alpha)
    objective = DiversityObjective({"mixing": mixing, "emb_grad_diversity": 0.5}, 0.1, distillation)
    tapped = TappedViT(model, objective.reads, objective.patch_logits)
    labels, shares = torch.tensor([0, 3]), normals(5, 2, 1 + tapped.grid[0] * tapped.grid[1]).sigmoid()
    target = MixedTarget(labels, labels.flip(0), shares[:, 0], shares[:, 1:])
    return model, target, lambda: objective(tapped(samples), target, samples)


@pytest.mark.parametrize("alpha", [None, 0.3])
@pytest.mark.parametrize("mixing", [0, 0.7])
@pytest.mark.parametrize("name", ["deit", "average", "distilled", "beit", "swin_windows"])
def test_gradient_diversity_is_that_of_the_classification_loss_at_every_token(name, mixing, alpha):
    model, target, step = token_gradient_case(name, mixing, alpha)
    loss, terms = step()
    tokens = unrolled(name, model, images())["tokens"].detach().requires_grad_()
    logits, patch_logits = classified(name, model, tokens)
    logits, student = logits if name == "distilled" else (logits, logits)
    classification = textbook.mixing_loss(logits, patch_logits, **target._asdict(), smoothing=0.1, coef=mixing)
    if alpha is not None:
        classification = (1 - alpha) * classification + alpha * Distillation(alpha)(images(), student)
    (gradient,) = torch.autograd.grad(classification, tokens)
    expected = textbook.TEXTBOOK["emb_grad_diversity"](gradient.reshape(2, -1, tokens.shape[-1])).item()
    assert terms["emb_grad_diversity"].item() == pytest.approx(expected, rel=1e-9)
    assert terms["classification"].item() == pytest.approx(classification.item(), rel=1e-9)
    assert loss.item() == pytest.approx(classification.item() + 0.5 * expected, rel=1e-9)


@pytest.mark.parametrize("alpha", [None, 0.3])
@pytest.mark.parametrize("mixing", [0, 0.7])
@pytest.mark.parametrize("name", ["deit", "swin_windows"])
def test_gradient_of_gradient_diversity_is_that_of_finite_differences(name, mixing, alpha):
    model, _, step = token_gradient_case(name, mixing, alpha)
    step()[0].backward()
    everything = dict(model.named_parameters())
    after = {name: p for name, p in everything.items() if name.startswith(("norm", "head"))}
    before = {name: p for name, p in everything.items() if name not in after}
    for parameters in (everything, before, after):
        pairs = [(p, normals(seed, *p.shape)) for seed, p in enumerate(parameters.values())]
        slope = sum((p.grad * direction).sum() for p, direction in pairs).item()
        losses = []
        for size in (1e-6, -2e-6, 1e-6):  # there, to the other side, and back
            with torch.no_grad():
                for p, direction in pairs:
                    p.add_(direction, alpha=size)
            losses.append(step()[0].item())
        assert slope == pytest.approx((losses[0] - losses[1]) / 2e-6, rel=1e-5)


@pytest.mark.parametrize("name", ["deit", "swin_windows"])
def test_gradient_diversity_differentiates_no_block_twice(name):
    gradients = {}
    for is_fused in (False, True):  # fused attention has no second derivative
        model, _, step = token_gradient_case(name)
        for attn in attentions(model):
            attn.fused_attn = is_fused
        seen = []

        def watch(module, inputs, output, seen=seen):
            output.register_hook(seen.append)

        last_blocks = model.layers[-1].blocks if name == "swin_windows" else model.blocks
        last_blocks[-2].register_forward_hook(watch)
        loss, _ = step()
        assert seen == []
        loss.backward()
        assert len(seen) == 1
        gradients[is_fused] = {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(gradients[True], gradients[False], rtol=1e-8, atol=1e-10)


def test_gradient_diversity_of_tokens_that_need_no_gradient_is_an_error():
    objective = DiversityObjective({"emb_grad_diversity": 1.0})
    with pytest.raises(ValueError, match="is the backbone frozen"):
        objective(outputs()._replace(tokens=normals(7, BATCH, 7, 4)), targets())


def test_gradient_diversity_does_not_depend_on_the_size_of_the_loss():
    _, _, step = token_gradient_case()
    expected = step()[1]

    def scaled(*arguments, **options):
        return 1000 * token_cross_entropy(*arguments, **options)

    with mock.patch("diversity.objective.token_cross_entropy", scaled):
        terms = step()[1]
    assert terms["classification"].item() == pytest.approx(1000 * expected["classification"].item())
    assert terms["emb_grad_diversity"].item() == pytest.approx(expected["emb_grad_diversity"].item(), rel=1e-10)


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
