"""Every term in closed form, what its value does not depend on, and the estimate of the spectral spread."""

import math
import re

import pytest
import torch
from golden_inputs import normals
from hypothesis import given, settings
from hypothesis import strategies as st
from term_inputs import NAMES, RELATIVE, drawn, draws_probes, inputs_of, same_items, values_of

from diversity import REGULARIZERS
from diversity.spectral import spectral_spread

# --- closed forms

LOG_2, LOG_JITTER = math.log(2), math.log(1e-6)
SOFTPLUS_MINUS_1 = math.log1p(math.exp(-1))
# By the term's name without its level: values at 4 orthonormal items of length 1, and at 4 identical ones.
EXTREMES = {
    "cos_within": (1 / 4, 1),
    "abscos_within": (1 / 4, 1),
    "offdiag_cos_within": (0, 1),
    "offdiag_abscos_within": (0, 1),
    "cos_cross": (1 / 4, 1),
    "abscos_cross": (1 / 4, 1),
    "contrast_cross": (SOFTPLUS_MINUS_1, LOG_2),
    "dot_contrast_cross": (SOFTPLUS_MINUS_1, LOG_2),
    "so": (0, 4 * 3),
    "cond_orth": (0, 4**2),
    "cond_orth_in": (1, 4**2),  # 4 orthonormal rows are fewer than the 9 columns: eigenvalues 1 and 0
    "mhs": (-2, 0),
    "mgd": (
        -math.log(1 + 3 * math.exp(-2) + 1e-6) - 3 * math.log(1 - math.exp(-2) + 1e-6),
        -math.log(4 + 1e-6) - 3 * LOG_JITTER,
    ),
    "grad_diversity": (-1, -1 / 4),
    "koleo": (-math.log(math.sqrt(2) + 1e-4), -math.log(1e-4)),
    "uniformity": (-4, 0),
    "coding_rate": (-4 / 2 * math.log(1 + 4 * 9 / 4), -1 / 2 * math.log(1 + 4 * 9)),
    "abscos": (0, 1),
}
OF_THE_BATCH = ("emb_vcreg",)  # which do not compare the items of one image; see test_spread


@pytest.mark.parametrize("name", [name for name in NAMES if name not in OF_THE_BATCH])
def test_orthonormal_and_identical_items(name):
    term = REGULARIZERS[name]
    stem = re.sub(r"^(emb|attn|weight_mha|weight_circuit)_", "", name)
    assert stem in EXTREMES, f"give the extremes of {name} in closed form"
    exact = values_of({"cond_orth_exact"} & set(term.options))
    orthonormal = torch.linalg.qr(normals(0, 2, 9, 4)).Q.mT
    identical = orthonormal[:, :1].expand(-1, 4, -1)
    matrices = 2 if "weights" in term.reads else 1  # these terms sum over the matrices
    for items, extreme in zip((orthonormal, identical), EXTREMES[stem], strict=True):
        value = term(**same_items(name, items), **exact).item()
        assert value == pytest.approx(matrices * extreme, rel=RELATIVE, abs=1e-12)


def test_opposite_tokens():
    token = normals(0, 2, 1, 6)
    tokens = torch.cat([token, -token], dim=1)
    extremes = {"cos": 0, "offdiag_cos": -1, "abscos": 1, "offdiag_abscos": 1}
    for stem, extreme in extremes.items():
        assert REGULARIZERS[f"emb_{stem}_within"](last=tokens).item() == pytest.approx(extreme)
    assert REGULARIZERS["emb_mhs"](last=tokens).item() == pytest.approx(-4)
    assert REGULARIZERS["emb_mhs"](last=tokens, mhs_collapse_aware=True).item() == pytest.approx(-2)


def test_disjoint_heads_have_mean_cosine_1_over_h():
    attention = torch.zeros(2, 3, 4, 4)
    for head in range(3):
        attention[:, head, :, head] = 1
    assert REGULARIZERS["attn_cos_within"](attention=attention).item() == pytest.approx(1 / 3)


def test_orthogonal_weights_have_no_spread():
    weights = 3 * torch.linalg.qr(normals(0, 2, 6, 6)).Q
    assert REGULARIZERS["weight_mha_cond_orth"](weights=weights).item() == pytest.approx(0, abs=1e-20)


def test_spread_of_eigenvectors_is_exact():
    weights = torch.diag(torch.tensor([3.0, 2.0, 1.0]))[None]
    probes = torch.zeros(2, 1, 3, 1)
    probes[0, 0, 0], probes[1, 0, 2] = 1, 1
    assert REGULARIZERS["weight_mha_cond_orth"](weights=weights, probes=probes) == (9 - 1) ** 2


def test_spread_grows_with_the_fourth_power_of_the_weights():
    taps, options = inputs_of("weight_mha_cond_orth")
    term = REGULARIZERS["weight_mha_cond_orth"]
    scaled = term(weights=3 * taps["weights"], **options).item()
    assert scaled == pytest.approx(3**4 * term(**taps, **options).item(), rel=RELATIVE)


# --- invariances

LENGTH_MATTERS = ("emb_dot_contrast_cross", "emb_grad_diversity", "attn_so", "attn_cond_orth", "weight_mha_so")


@pytest.mark.parametrize("name", NAMES)
def test_order_of_items_does_not_matter(name):
    taps, probes = inputs_of(name)
    value = REGULARIZERS[name](**taps, **probes).item()
    order = torch.tensor([3, 0, 4, 1, 2])
    taps = {tap: tensor[:, order] for tap, tensor in taps.items()}
    if not name.endswith("_in"):
        probes = {option: tensor[:, :, order] for option, tensor in probes.items()}
    assert REGULARIZERS[name](**taps, **probes).item() == pytest.approx(value, rel=RELATIVE)


@pytest.mark.parametrize("name", NAMES)
def test_length_of_an_item_matters_only_where_it_should(name):
    taps, probes = inputs_of(name)
    value = REGULARIZERS[name](**taps, **probes).item()
    matters = name in LENGTH_MATTERS or name.startswith("weight_mha_cond_orth")
    for tap in taps:
        scaled = taps[tap].detach().clone()
        scaled[0, 1] *= 7.5
        scaled[1, 3] *= 0.02
        same = pytest.approx(value, rel=RELATIVE)
        assert (REGULARIZERS[name](**{**taps, tap: scaled}, **probes).item() != same) == matters


@pytest.mark.parametrize("name", [name for name in NAMES if REGULARIZERS[name].level == "embedding"])
def test_rotation_of_all_tokens_matters_only_to_channels(name):
    taps, probes = inputs_of(name)
    rotation = torch.linalg.qr(normals(5, 4, 4)).Q
    rotated = {tap: tensor @ rotation for tap, tensor in taps.items()}
    value = REGULARIZERS[name](**taps, **probes).item()
    same = pytest.approx(value, rel=RELATIVE)
    assert (REGULARIZERS[name](**rotated, **probes).item() != same) == (name == "emb_vcreg")


@pytest.mark.parametrize("scale", [1e-6, 1e4])
def test_scale_of_the_gradient_does_not_matter(scale):
    grad = drawn("grad", 0, 2, 5, 4).float()
    value = REGULARIZERS["emb_grad_diversity"](grad=grad).item()
    assert REGULARIZERS["emb_grad_diversity"](grad=scale * grad).item() == pytest.approx(value, rel=1e-5)


# --- the spectral estimate


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    st.integers(0, 10**6),
    st.integers(1, 8),
    st.integers(1, 8),
    st.sampled_from([1e-3, 1.0, 50.0]),
    st.sampled_from([1, 2, 10]),
)
def test_power_steps_never_overestimate_the_spread(seed, rows, columns, scale, steps):
    weights = scale * normals(seed, 3, rows, columns)
    probes = normals(seed + 1, 2, 3, rows, 1).abs()
    spread = spectral_spread(weights, probes, steps)
    eigenvalues = torch.linalg.eigvalsh(weights @ weights.mT)
    exact = eigenvalues[:, -1] - eigenvalues[:, 0]
    assert (spread <= exact + 1e-12 * eigenvalues[:, -1]).all()


@pytest.mark.parametrize("name", [name for name in NAMES if draws_probes(name)])
def test_more_power_steps_approach_the_exact_spread(name):
    taps, probes = inputs_of(name, batch=2, items=20, size=24)
    one, five, fifty = (REGULARIZERS[name](**taps, **probes, cond_orth_steps=steps).item() for steps in (1, 5, 50))
    exact = REGULARIZERS[name](**taps, cond_orth_exact=True).item()
    assert one < five < fifty <= exact * (1 + RELATIVE)
    assert fifty == pytest.approx(exact, rel=0.02)


# One power step from a random start scatters much more than the exact spread: it takes more matrices to average.
@pytest.mark.parametrize(
    "exact, depths_and_widths",
    [
        (True, [(6, 64), (6, 128), (6, 256), (1, 128), (1, 256)]),
        (False, [(144, 64), (144, 128), (144, 256), (288, 64)]),
    ],
    ids=["exact", "one step"],
)
@pytest.mark.parametrize("name", [name for name in NAMES if "cond_orth_normalize" in REGULARIZERS[name].options])
def test_normalized_spread_depends_on_neither_width_nor_depth(name, exact, depths_and_widths):
    torch.manual_seed(0)
    term, plain, normalized = REGULARIZERS[name], [], []
    for depth, width in depths_and_widths:
        weights = 0.02 * torch.randn(depth, width, width)
        plain.append(term(weights=weights, cond_orth_exact=exact).item())
        normalized.append(term(weights=weights, cond_orth_exact=exact, cond_orth_normalize=True).item())
    assert max(normalized) < 1.15 * min(normalized)
    assert max(plain) > 10 * min(plain)


@pytest.mark.parametrize("name", [name for name in NAMES if draws_probes(name)])
@pytest.mark.parametrize("options", [{"cond_orth_steps": 0}, {"cond_orth_steps": 2, "cond_orth_exact": True}])
def test_steps_that_contradict_are_an_error(name, options):
    with pytest.raises(ValueError, match="power steps must be >= 1, and 1 where the spread is exact"):
        REGULARIZERS[name](**inputs_of(name)[0], **options)


@pytest.mark.parametrize("steps, share", [(1, 0.29), (10, 0.85)])
def test_share_of_the_exact_spread_that_the_readme_names(steps, share):
    torch.manual_seed(0)
    weights = 0.02 * torch.randn(36, 384, 384)
    term = REGULARIZERS["weight_mha_cond_orth"]
    ratio = term(weights=weights, cond_orth_steps=steps) / term(weights=weights, cond_orth_exact=True)
    assert ratio.item() == pytest.approx(share, abs=0.03)
