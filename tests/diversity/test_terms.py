"""Every registered term against the textbook: value and gradient, with every option, over layers and shapes."""

import pytest
import torch
from term_inputs import CASES, NAMES, OPTION_CASES, SIZES, assert_same, inputs_of, values_of
from textbook import OPTION_VALUES, TEXTBOOK

from diversity import REGULARIZERS

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


def test_textbook_has_only_registered_terms():
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
def test_stacks_of_several_shapes_are_one_set_of_matrices(name, options, container):
    term, options = REGULARIZERS[name], values_of(options)
    sizes = [(2, 5, 4), (3, 4, 6), (1, 3, 3)]
    inputs = [inputs_of(name, *size, seed=20 * i) for i, size in enumerate(sizes)]
    (tap,) = term.reads
    stacks = [taps[tap] for taps, _ in inputs]
    probes = {key: container(start[key] for _, start in inputs) for key in inputs[0][1]}
    each = [term(**taps, **start, **options) for taps, start in inputs]
    if "cond_orth_normalize" in options or tap == "circuits":  # a mean over the matrices
        expected = sum(size[0] * value for size, value in zip(sizes, each, strict=True)) / sum(s[0] for s in sizes)
    else:
        expected = sum(each)
    value = term(**{tap: container(stacks)}, **probes, **options)
    assert_same(value, expected, dict(enumerate(stacks)))
    half = container(stack.bfloat16() for stack in stacks)
    assert term(**{tap: half}, **options).dtype == torch.float32
