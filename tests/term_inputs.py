"""Random inputs of every registered term, in float64, and comparisons of values and gradients."""

import inspect
import itertools

import pytest
import torch
from golden_inputs import normals
from textbook import OPTION_VALUES

from diversity import ALIASES, REGULARIZERS

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

# (batch, items, size): tokens [batch, items, size], maps [batch, items, size, size], weights [batch, items, size],
# circuits [batch, items, 2, 3, size].
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
    if tap == "circuits":
        return normals(seed, batch, items, 2, 3, size)
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


def same_items(name, items):
    """The same items [B, items, 9] for every tap of a term; as attention maps and as circuits they are 3 x 3."""
    square = items.unflatten(-1, (3, 3))
    identity = torch.eye(3, dtype=items.dtype).expand_as(square)
    forms = {"attention": square, "circuits": torch.stack((identity, square), dim=2)}
    return {tap: forms.get(tap.split("_")[0], items) for tap in REGULARIZERS[name].reads}
