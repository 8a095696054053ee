"""Every registered term: against the textbook, in closed form, and as the registry promises."""

import inspect
import itertools
import math
from unittest import mock

import pytest
import torch
from golden_inputs import normals
from hypothesis import given, settings
from hypothesis import strategies as st
from textbook import OPTION_VALUES, TEXTBOOK

import diversity
from diversity import ALIASES, REGULARIZERS, similarity
from diversity.spectral import spectral_spread

NAMES = [*REGULARIZERS, *ALIASES]
RELATIVE = 1e-9

# Every term with every set of its options that do not exclude each other; the empty one is the default.
CASES = [
    pytest.param(name, options, id="-".join((name, *options)))
    for name, term in REGULARIZERS.items()
    for count in range(len(term.options) + 1)
    for options in itertools.combinations(term.options, count)
    if not {"cond_orth_steps", "cond_orth_exact"} <= set(options)
]
OPTION_CASES = [case for case in CASES if case.values[1]]

# (batch, items, size): tokens [batch, items, size], maps [batch, items, size, size], weights [batch, items, size].
SIZES = [(1, 2, 3), (1, 5, 4), (2, 4, 4), (2, 7, 5), (3, 4, 9)]


def draws_probes(name):
    return "probes" in inspect.signature(REGULARIZERS[name].function).parameters


def drawn(tap, seed, batch, items, size):
    """Float64 values of one tap, with the items on axis 1."""
    if tap in ("first", "last", "grad"):
        return normals(seed, batch, items, size) + 0.3
    if tap.startswith("attention"):
        return normals(seed, batch, items, size, size).softmax(dim=-1)
    if tap == "weights":
        return normals(seed, batch, items, size)
    raise AssertionError(f"say in `drawn` how to draw the tap {tap!r}")


def inputs_of(name, batch=2, items=5, size=4, seed=0):
    """Float64 taps of a term that require gradients, and its fixed start vectors where it draws them."""
    taps = {
        tap: drawn(tap, seed + i, batch, items, size).requires_grad_() for i, tap in enumerate(REGULARIZERS[name].reads)
    }
    length = size if name.endswith("_in") else items
    return taps, {"probes": normals(seed + 9, 2, batch, length, 1).abs()} if draws_probes(name) else {}


def values_of(options):
    return {option: OPTION_VALUES[option] for option in options}


def gradients(value, taps):
    return dict(zip(taps, torch.autograd.grad(value, taps.values()), strict=True))


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def detached(tensors, dtype):
    return {name: tensor.detach().to(dtype) for name, tensor in tensors.items()}


def assert_same(value, expected, taps):
    """The two values agree, and so do their gradients in each tap."""
    assert value.item() == pytest.approx(expected.item(), rel=RELATIVE)
    expected_gradients = gradients(expected, taps)
    for tap, gradient in gradients(value, taps).items():
        assert relative_error(gradient, expected_gradients[tap]) < RELATIVE, tap


# --- values and gradients


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_against_the_textbook(name, size):
    assert name in TEXTBOOK, f"the registered term {name} has no entry in tests/textbook.py"
    taps, probes = inputs_of(name, *size)
    value, expected = REGULARIZERS[name](**taps, **probes), TEXTBOOK[name](**taps, **probes)
    assert value.shape == () and value.dtype == torch.float64
    assert_same(value, expected, taps)


def test_every_option_has_a_value_to_test():
    assert set(OPTION_VALUES) == {option for term in REGULARIZERS.values() for option in term.options}


@pytest.mark.parametrize("size", [(2, 7, 5), (3, 4, 9)], ids=str)
@pytest.mark.parametrize("name, options", OPTION_CASES)
def test_options_against_the_textbook(name, options, size):
    taps, probes = inputs_of(name, *size)
    value = REGULARIZERS[name](**taps, **probes, **values_of(options))
    assert value.item() != pytest.approx(REGULARIZERS[name](**taps, **probes).item(), rel=1e-3)
    assert_same(value, TEXTBOOK[name](**taps, **probes, **values_of(options)), taps)


def test_textbook_holds_no_stranger():
    assert set(TEXTBOOK) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name):
    taps, options = inputs_of(name, batch=2, items=3, size=3)
    term = REGULARIZERS[name]
    assert torch.autograd.gradcheck(
        lambda *values: term(**dict(zip(taps, values, strict=True)), **options), tuple(taps.values())
    )


# --- layers, and matrices of several shapes


@pytest.mark.parametrize(
    "name, options", [case for case in CASES if {"last", "attention"} & set(REGULARIZERS[case.values[0]].reads)]
)
def test_layers_are_averaged(name, options):
    term, options = REGULARIZERS[name], values_of(options)
    layers = [inputs_of(name, seed=seed) for seed in (0, 20, 40)]
    shared = {tap: layers[0][0][tap] for tap in term.reads if tap == "first"}
    taps = {tap: torch.stack([one[tap] for one, _ in layers]) for tap in term.reads if tap != "first"} | shared
    probes = {key: torch.stack([start[key] for _, start in layers], dim=1) for key in layers[0][1]}
    each = [term(**(one | shared), **start, **options) for one, start in layers]
    assert_same(term(**taps, **probes, **options), sum(each) / len(each), {**layers[1][0], **shared})
    assert term(**taps, **options).isfinite()


@pytest.mark.parametrize("container", [list, tuple])
@pytest.mark.parametrize("name, options", [case for case in CASES if REGULARIZERS[case.values[0]].level == "weight"])
def test_stacks_of_several_shapes_are_summed(name, options, container):
    term, options = REGULARIZERS[name], values_of(options)
    sizes = [(2, 5, 4), (3, 4, 6), (1, 3, 3)]
    inputs = [inputs_of(name, *size, seed=20 * i) for i, size in enumerate(sizes)]
    stacks = [taps["weights"] for taps, _ in inputs]
    probes = {key: container(start[key] for _, start in inputs) for key in inputs[0][1]}
    each = [term(**taps, **start, **options) for taps, start in inputs]
    if "cond_orth_normalize" in options:
        expected = sum(size[0] * value for size, value in zip(sizes, each, strict=True)) / sum(s[0] for s in sizes)
    else:
        expected = sum(each)
    value = term(weights=container(stacks), **probes, **options)
    assert_same(value, expected, dict(enumerate(stacks)))
    half = container(stack.bfloat16() for stack in stacks)
    assert term(weights=half, **options).dtype == torch.float32


# --- dtype, degenerate inputs, the registry's promises


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_computes_in_float32_or_float64(name, dtype, autocast):
    taps, options = inputs_of(name)
    taps, options = detached(taps, dtype), detached(options, dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value = REGULARIZERS[name](**taps, **options)
    full = torch.promote_types(dtype, torch.float32)
    assert value.dtype == full
    assert torch.equal(value, REGULARIZERS[name].function(**detached(taps, full), **detached(options, full)))


@pytest.mark.parametrize("name", NAMES)
def test_gradient_has_the_dtype_of_the_input(name):
    taps, options = inputs_of(name)
    taps, options = detached(taps, torch.bfloat16), detached(options, torch.bfloat16)
    for tensor in taps.values():
        tensor.requires_grad_()
    for gradient in gradients(REGULARIZERS[name](**taps, **options), taps).values():
        assert gradient.dtype == torch.bfloat16 and gradient.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_missing_tap_is_named(name):
    taps, options = inputs_of(name)
    for tap in taps:
        others = {other: value for other, value in taps.items() if other != tap}
        for incomplete in (others, {**others, tap: None}):
            with pytest.raises(TypeError, match=f"missing: {tap}$"):
                REGULARIZERS[name](**incomplete, **options)


def zero_item(tensor):
    tensor[:, 0] = 0


def equal_items(tensor):
    tensor[:] = tensor[:, :1].clone()


def all_zero(tensor):
    tensor.zero_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("collapse", [zero_item, equal_items, all_zero])
@pytest.mark.parametrize("name", NAMES)
def test_degenerate_inputs_stay_finite(name, collapse, dtype):
    taps, options = inputs_of(name)
    taps, options = detached(taps, dtype), detached(options, dtype)
    for tensor in taps.values():
        collapse(tensor)
        tensor.requires_grad_()
    value = REGULARIZERS[name](**taps, **options)
    assert value.isfinite()
    for gradient in gradients(value, taps).values():
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_random_start_vectors_are_drawn_when_not_given(name):
    taps, options = inputs_of(name)
    values = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        values.append(REGULARIZERS[name](**taps).item())
    assert values[0] == values[1]
    assert (values[1] == values[2]) == (not options)


@pytest.mark.parametrize("name", NAMES)
def test_docstring_says_returns_source_differs(name):
    for heading in ("Returns:", "Source:", "Differs:"):
        assert heading in REGULARIZERS[name].doc


@pytest.mark.parametrize("name", NAMES)
def test_a_single_item_is_an_error_where_the_docstring_says_so(name):
    taps, probes = inputs_of(name, items=1)
    if "Raises:" in REGULARIZERS[name].doc:
        with pytest.raises(ValueError, match="at least two items are needed to compare; got 1"):
            REGULARIZERS[name](**taps, **probes)
    else:
        assert REGULARIZERS[name](**taps, **probes).isfinite()


def test_markdown_table_has_a_row_for_each_term():
    rows = diversity.markdown_table().splitlines()
    assert len(rows) == 2 + len(REGULARIZERS)
    for name, row in zip(REGULARIZERS, rows[2:], strict=True):
        assert row.startswith(f"| `--{name}_coef` | {REGULARIZERS[name].level} |")
        assert row.count("|") == rows[0].count("|")
    for alias, name in ALIASES.items():
        assert rows[2 + list(REGULARIZERS).index(name)].endswith(f" Alias: `--{alias}_coef`. |")


def test_decorator_enters_a_function():
    with mock.patch.dict(REGULARIZERS):

        @diversity.regularizer(level="embedding", coef=0.25)
        def emb_of_this_test(first, last, *, power=2):
            """Mean difference.

            More words.
            """
            return (last - first).abs().pow(power).mean()

        term = REGULARIZERS["emb_of_this_test"]
        assert term is emb_of_this_test
        assert (term.name, term.level, term.coef) == ("emb_of_this_test", "embedding", 0.25)
        assert term.reads == ("first", "last")
        assert term.formula == "Mean difference."
        first, last = torch.zeros(1, 2, 3), torch.full((1, 2, 3), 2.0)
        assert term(first=first, last=last) == 4
        assert term(first=first, last=last, power=3) == 8
        assert "`--emb_of_this_test_coef` | embedding | `first`, `last` | 0.25 | Mean" in diversity.markdown_table()
        assert diversity.DiversityObjective({"emb_of_this_test": 1.0}).reads == ["first", "last"]
        with pytest.raises(AssertionError, match="twice"):
            diversity.regularizer(level="embedding")(term.function)
    assert "emb_of_this_test" not in REGULARIZERS


def test_decorator_refuses_an_unknown_level():
    with pytest.raises(AssertionError, match="unknown level"):
        diversity.regularizer(level="optimizer")


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
def test_rotation_of_all_tokens_does_not_matter(name):
    taps, probes = inputs_of(name)
    rotation = torch.linalg.qr(normals(5, 4, 4)).Q
    rotated = {tap: tensor @ rotation for tap, tensor in taps.items()}
    value = REGULARIZERS[name](**taps, **probes).item()
    assert REGULARIZERS[name](**rotated, **probes).item() == pytest.approx(value, rel=RELATIVE)


@pytest.mark.parametrize("scale", [1e-6, 1e4])
def test_scale_of_the_gradient_does_not_matter(scale):
    grad = drawn("grad", 0, 2, 5, 4).float()
    value = REGULARIZERS["emb_grad_diversity"](grad=grad).item()
    assert REGULARIZERS["emb_grad_diversity"](grad=scale * grad).item() == pytest.approx(value, rel=1e-5)


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
}


def taps_of(name, items):
    """The same items [B, items, 9] for every tap of a term; as attention maps they are 3 x 3."""
    return {
        tap: items.unflatten(-1, (3, 3)) if tap.startswith("attention") else items for tap in REGULARIZERS[name].reads
    }


@pytest.mark.parametrize("name", NAMES)
def test_orthonormal_and_identical_items(name):
    term = REGULARIZERS[name]
    stem = name.removeprefix("emb_").removeprefix("attn_").removeprefix("weight_mha_")
    assert stem in EXTREMES, f"give the extremes of {name} in closed form"
    exact = values_of({"cond_orth_exact"} & set(term.options))
    orthonormal = torch.linalg.qr(normals(0, 2, 9, 4)).Q.mT
    identical = orthonormal[:, :1].expand(-1, 4, -1)
    matrices = 2 if term.level == "weight" else 1  # weight terms sum over the matrices
    for items, extreme in zip((orthonormal, identical), EXTREMES[stem], strict=True):
        value = term(**taps_of(name, items), **exact).item()
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


# --- collapse and blow-up


@pytest.mark.parametrize("name", [name for name in NAMES if "mhs_collapse_aware" in REGULARIZERS[name].options])
def test_only_the_collapse_aware_separation_parts_coinciding_items(name):
    items = normals(0, 2, 4, 9)
    items[:, 2] = items[:, 1]
    items.requires_grad_()

    def separation(items, **options):
        return REGULARIZERS[name](**taps_of(name, items), **options)

    (plain,) = torch.autograd.grad(separation(items), items)
    assert plain.norm() < 1e-12
    (aware,) = torch.autograd.grad(separation(items, mhs_collapse_aware=True), items)
    assert (aware[:, 1:3].norm(dim=-1) > 0.05).all()
    assert not aware[:, [0, 3]].any()
    assert separation(items).item() == pytest.approx(0, abs=1e-12)
    assert separation(items - 0.1 * aware).item() < -1e-4


def collapsed(value):
    return value[:, :1].expand_as(value)


def forty_times(value):
    return 40 * value


def orthonormal(value):
    return torch.linalg.qr(value.flatten(2).mT).Q.mT.reshape(value.shape[0], -1, *value.shape[2:])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("extreme", [forty_times, collapsed, orthonormal])
@pytest.mark.parametrize("name, options", CASES)
def test_extremes_of_real_size_stay_finite(name, options, extreme, autocast):
    torch.manual_seed(0)
    sizes = {"embedding": (2, 196, 64), "attention": (2, 6, 50), "weight": (3, 64, 64)}
    taps = {}
    for i, tap in enumerate(REGULARIZERS[name].reads):
        value = drawn(tap, i, *sizes[REGULARIZERS[name].level])
        taps[tap] = extreme(0.02 * value if tap == "weights" else value).float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value = REGULARIZERS[name](**taps, **values_of(options))
        value.backward()
    assert value.dtype == torch.float32 and value.isfinite()
    for tap in taps.values():
        assert tap.grad.isfinite().all()


@pytest.mark.parametrize("name, options", CASES)
def test_not_a_number_in_gives_not_a_number_and_no_error(name, options):
    taps, fixed = inputs_of(name)
    taps = {tap: value.detach().clone() for tap, value in taps.items()}
    for value in taps.values():
        value[0, 1] = torch.nan
    assert REGULARIZERS[name](**taps, **fixed, **values_of(options)).isnan()


@pytest.mark.parametrize("name", [name for name in NAMES if "offdiag" in name])
def test_an_item_of_zeros_is_unlike_itself_too(name):
    items = normals(0, 1, 5, 9)
    items[:, 0] = 0
    assert REGULARIZERS[name](**taps_of(name, 0 * items)).item() == 0
    assert REGULARIZERS[name](**taps_of(name, items)).item() == pytest.approx(
        TEXTBOOK[name](**taps_of(name, items)).item(), rel=RELATIVE
    )


@pytest.mark.parametrize("aware", [False, True])
def test_separation_finds_the_closest_pair_of_nearly_coinciding_items_in_float32(aware):
    items = (normals(0, 4, 1, 64) + 1e-3 * normals(1, 4, 196, 64)).float()
    expected = similarity.separation(items.double(), aware)
    torch.testing.assert_close(similarity.separation(items, aware).double(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("steps, share", [(1, 0.29), (10, 0.85)])
def test_share_of_the_exact_spread_that_the_readme_names(steps, share):
    torch.manual_seed(0)
    weights = 0.02 * torch.randn(36, 384, 384)
    term = REGULARIZERS["weight_mha_cond_orth"]
    ratio = term(weights=weights, cond_orth_steps=steps) / term(weights=weights, cond_orth_exact=True)
    assert ratio.item() == pytest.approx(share, abs=0.03)
