"""Every term in every dtype, at collapsed, huge and missing inputs, and without given start vectors."""

import pytest
import torch
from golden_inputs import normals
from term_inputs import CASES, NAMES, RELATIVE, detached, drawn, gradients, inputs_of, same_items, values_of
from textbook import TEXTBOOK

from diversity import REGULARIZERS, similarity


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
def test_a_single_item_is_an_error_where_the_docstring_lists_one(name):
    taps, probes = inputs_of(name, items=1)
    if "Raises:" in REGULARIZERS[name].doc:
        with pytest.raises(ValueError, match="at least two items are needed to compare; got 1"):
            REGULARIZERS[name](**taps, **probes)
    else:
        assert REGULARIZERS[name](**taps, **probes).isfinite()


@pytest.mark.parametrize("name", [name for name in NAMES if "mhs_collapse_aware" in REGULARIZERS[name].options])
def test_only_the_collapse_aware_separation_parts_coinciding_items(name):
    items = normals(0, 2, 4, 9)
    items[:, 2] = items[:, 1]
    items.requires_grad_()

    def separation(items, **options):
        return REGULARIZERS[name](**same_items(name, items), **options)

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
        taps[tap] = extreme(0.02 * value if REGULARIZERS[name].level == "weight" else value).float().requires_grad_()
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
    assert REGULARIZERS[name](**same_items(name, 0 * items)).item() == 0
    assert REGULARIZERS[name](**same_items(name, items)).item() == pytest.approx(
        TEXTBOOK[name](**same_items(name, items)).item(), rel=RELATIVE
    )


@pytest.mark.parametrize("aware", [False, True])
def test_separation_finds_the_closest_pair_of_nearly_coinciding_items_in_float32(aware):
    items = (normals(0, 4, 1, 64) + 1e-3 * normals(1, 4, 196, 64)).float()
    expected = similarity.separation(items.double(), aware)
    torch.testing.assert_close(similarity.separation(items, aware).double(), expected, rtol=1e-3, atol=0)
