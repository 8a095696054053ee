"""Every registered term: against the textbook, in closed form, and as the registry promises."""

import inspect
import math
from unittest import mock

import pytest
import torch
from golden_inputs import normals
from hypothesis import given, settings
from hypothesis import strategies as st
from textbook import TEXTBOOK

import diversity
from diversity import REGULARIZERS, similarity

NAMES = list(REGULARIZERS)
ITEM_NAMES = [name for name in NAMES if REGULARIZERS[name].level != "weight"]
COSINE_NAMES = [name for name in NAMES if "cos_" in name or "contrast_" in name]
RELATIVE = 1e-9

# (batch, items, size): tokens [batch, items, size], maps [batch, items heads, size, size], weights [batch, size, size].
SIZES = [(1, 2, 3), (1, 5, 4), (2, 7, 5), (3, 4, 9)]


def inputs_of(name, batch=2, items=5, size=4, seed=0):
    """Float64 taps of a term that require gradients, and its options: fixed start vectors where it draws them."""
    term, taps = REGULARIZERS[name], {}
    for i, tap in enumerate(term.reads):
        if tap in ("first", "last"):
            value = normals(seed + i, batch, items, size) + 0.3
        elif tap.startswith("attention"):
            value = normals(seed + i, batch, items, size, size).softmax(dim=-1)
        elif tap == "weights":
            value = normals(seed + i, batch, size, size)
        else:
            raise AssertionError(f"{name} reads {tap!r}: say in inputs_of how to draw it")
        taps[tap] = value.requires_grad_()
    options = {}
    if "probes" in inspect.signature(term.function).parameters:
        options["probes"] = normals(seed + 9, 2, *taps[term.reads[0]].shape[:2], 1).abs()
    return taps, options


def gradients(value, taps):
    return dict(zip(taps, torch.autograd.grad(value, taps.values()), strict=True))


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def detached(tensors, dtype):
    return {name: tensor.detach().to(dtype) for name, tensor in tensors.items()}


# --- values and gradients


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_against_the_textbook(name, size):
    assert name in TEXTBOOK, f"the registered term {name} has no entry in tests/textbook.py"
    taps, options = inputs_of(name, *size)
    value, expected = REGULARIZERS[name](**taps, **options), TEXTBOOK[name](**taps, **options)
    assert value.shape == () and value.dtype == torch.float64
    assert value.item() == pytest.approx(expected.item(), rel=RELATIVE)
    expected_gradients = gradients(expected, taps)
    for tap, gradient in gradients(value, taps).items():
        assert relative_error(gradient, expected_gradients[tap]) < RELATIVE, tap


def test_textbook_holds_no_stranger():
    assert set(TEXTBOOK) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name):
    taps, options = inputs_of(name, batch=2, items=3, size=3)
    term = REGULARIZERS[name]
    assert torch.autograd.gradcheck(
        lambda *values: term(**dict(zip(taps, values, strict=True)), **options), tuple(taps.values())
    )


def test_rectangular_weights_against_the_textbook():
    for shape in [(2, 3, 5), (2, 5, 3)]:
        weights, probes = normals(0, *shape), normals(1, 2, *shape[:2], 1)
        value = REGULARIZERS["weight_mha_cond_orth"](weights=weights, probes=probes)
        expected = TEXTBOOK["weight_mha_cond_orth"](weights=weights, probes=probes)
        assert value.item() == pytest.approx(expected.item(), rel=RELATIVE)


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


def test_markdown_table_has_a_row_for_each_term():
    rows = diversity.markdown_table().splitlines()
    assert len(rows) == 2 + len(NAMES)
    for name, row in zip(NAMES, rows[2:], strict=True):
        assert row.startswith(f"| `--{name}_coef` | {REGULARIZERS[name].level} |")
        assert row.count("|") == rows[0].count("|")


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


@pytest.mark.parametrize("name", ITEM_NAMES)
def test_order_of_items_does_not_matter(name):
    taps, options = inputs_of(name)
    order = torch.tensor([3, 0, 4, 1, 2])
    permuted = REGULARIZERS[name](
        **{tap: tensor[:, order] for tap, tensor in taps.items()},
        **{option: tensor[:, :, order] for option, tensor in options.items()},
    )
    assert permuted.item() == pytest.approx(REGULARIZERS[name](**taps, **options).item(), rel=RELATIVE)


@pytest.mark.parametrize("name", COSINE_NAMES)
def test_length_of_an_item_does_not_matter(name):
    taps, options = inputs_of(name)
    value = REGULARIZERS[name](**taps, **options).item()
    for tap in taps:
        scaled = taps[tap].detach().clone()
        scaled[0, 1] *= 7.5
        scaled[1, 3] *= 0.02
        assert REGULARIZERS[name](**{**taps, tap: scaled}, **options).item() == pytest.approx(value, rel=RELATIVE)


# --- closed forms


def test_identical_tokens_have_cosine_1():
    tokens = normals(0, 3, 1, 6).expand(-1, 5, -1)
    assert REGULARIZERS["emb_cos_within"](last=tokens).item() == pytest.approx(1)


def test_orthonormal_tokens_have_mean_cosine_1_over_p():
    tokens = torch.linalg.qr(normals(0, 2, 6, 6)).Q[:, :5]
    assert REGULARIZERS["emb_cos_within"](last=tokens).item() == pytest.approx(1 / 5)


def test_opposite_tokens_cancel():
    token = normals(0, 2, 1, 6)
    assert REGULARIZERS["emb_cos_within"](last=torch.cat([token, -token], dim=1)).item() == pytest.approx(0)


def test_disjoint_heads_have_mean_cosine_1_over_h():
    attention = torch.zeros(2, 3, 4, 4)
    for head in range(3):
        attention[:, head, :, head] = 1
    assert REGULARIZERS["attn_cos_within"](attention=attention).item() == pytest.approx(1 / 3)


def test_identical_heads_have_cosine_1():
    attention = normals(0, 2, 1, 4, 4).softmax(dim=-1).expand(-1, 3, -1, -1)
    assert REGULARIZERS["attn_cos_within"](attention=attention).item() == pytest.approx(1)


def test_contrast_of_identical_tokens_is_log_2():
    tokens = normals(0, 2, 1, 6).expand(-1, 4, -1)
    assert REGULARIZERS["emb_contrast_cross"](first=tokens, last=tokens).item() == pytest.approx(math.log(2))


def test_contrast_of_orthonormal_tokens_with_themselves():
    tokens = torch.eye(4)[None]
    value = REGULARIZERS["emb_contrast_cross"](first=tokens, last=tokens).item()
    assert value == pytest.approx(math.log1p(math.exp(-1)))


def test_contrast_of_one_token_is_an_error():
    with pytest.raises(ValueError, match="at least two items; got 1"):
        REGULARIZERS["emb_contrast_cross"](first=torch.ones(2, 1, 3), last=torch.ones(2, 1, 3))


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


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 8), st.sampled_from([1e-3, 1.0, 50.0]))
def test_one_power_step_never_overestimates_the_spread(seed, rows, columns, scale):
    weights = scale * normals(seed, 3, rows, columns)
    spread = similarity.spectral_spread(weights, normals(seed + 1, 2, 3, rows, 1).abs())
    eigenvalues = torch.linalg.eigvalsh(weights @ weights.mT)
    exact = eigenvalues[:, -1] - eigenvalues[:, 0]
    assert (spread.abs() <= exact + 1e-12 * eigenvalues[:, -1]).all()
