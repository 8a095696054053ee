"""The terms that spread items on the sphere, the channels and the circuits: coincidence, float32, change of basis."""

import math

import pytest
import torch
from families import build, images
from golden_inputs import normals
from term_inputs import NAMES, detached, drawn, gradients, relative_error, same_items

from diversity import REGULARIZERS, TappedViT

SPREADING = [name for name in NAMES if name.endswith(("_koleo", "_uniformity", "_coding_rate"))]
CIRCUITS = [name for name in NAMES if name.startswith("weight_circuit_")]
PULLING = [name for name in NAMES if name.endswith("_koleo") and name not in CIRCUITS]


# --- items that coincide


@pytest.mark.parametrize("name", PULLING)
def test_koleo_pulls_items_apart_that_coincide(name):
    items = normals(0, 2, 5, 9)
    items[:, 2] = items[:, 1]
    items.requires_grad_()

    def term(items):
        return REGULARIZERS[name](**same_items(name, items))

    (gradient,) = torch.autograd.grad(term(items), items)
    assert (gradient * items).sum(dim=-1).abs().max() < 1e-8 * gradient.norm()  # at a right angle to the items
    away = gradient[:, 1:3] / gradient[:, 1:3].norm(dim=-1, keepdim=True)
    torch.testing.assert_close(away[:, 0], -away[:, 1], rtol=0, atol=1e-2)  # each to the other side
    assert term(items - 1e-6 * gradient) < term(items) - 0.5


@pytest.mark.parametrize("name", PULLING)
def test_koleo_of_zeros_has_no_gradient_where_all_are_zero(name):
    items = torch.zeros(2, 4, 9, dtype=torch.float64, requires_grad=True)
    value = REGULARIZERS[name](**same_items(name, items))
    assert value.item() == pytest.approx(-math.log(1e-4) * (2 if name.startswith("weight") else 1))
    assert not torch.autograd.grad(value, items)[0].any()


# --- float32


def inputs_of_vit_small(name):
    (tap,) = REGULARIZERS[name].reads
    if tap == "circuits":
        return {tap: normals(0, 4, 6, 2, 64, 384)}
    sizes = {"last": (4, 196, 384), "attention": (2, 6, 197), "weights": (3, 384, 384)}
    return {tap: drawn(tap, 0, *sizes[tap])}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SPREADING, "emb_vcreg", "weight_circuit_abscos"])
def test_float32_is_close_to_float64_at_the_sizes_of_vit_small(name):
    results = []
    for dtype in (torch.float32, torch.float64):
        taps = {tap: value.requires_grad_() for tap, value in detached(inputs_of_vit_small(name), dtype).items()}
        value = REGULARIZERS[name](**taps)
        results.append((value.item(), *(gradient.double() for gradient in gradients(value, taps).values())))
    (single, single_gradient), (double, double_gradient) = results
    assert single == pytest.approx(double, rel=1e-5)
    assert relative_error(single_gradient, double_gradient) < 1e-4


@pytest.mark.parametrize("scale", [0.0, 1e-4, 1.0, 1e4], ids=str)
@pytest.mark.parametrize("spread", [0.0, 1e-7, 1e-3], ids=str)
@pytest.mark.parametrize("name", CIRCUITS)
def test_coinciding_circuits_of_vit_small_stay_finite_in_float32(name, spread, scale):
    circuits = normals(0, 1, 1, 2, 64, 384) + spread * normals(1, 1, 6, 2, 64, 384)
    circuits = (scale * circuits).float().requires_grad_()
    value = REGULARIZERS[name](circuits=circuits)
    assert value.isfinite() and torch.autograd.grad(value, circuits)[0].isfinite().all()
    if scale and spread < 1e-3:
        extreme = {"abscos": 1, "koleo": -math.log(1e-4), "uniformity": 0, "coding_rate": -math.log(1 + 4 * 384**2) / 2}
        assert value.item() == pytest.approx(extreme[name.removeprefix("weight_circuit_")], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", ["attn_coding_rate", "attn_koleo", "attn_uniformity"])
def test_equal_maps_of_many_tokens_stay_finite_in_float32(name):
    attention = normals(0, 1, 1, 577, 577).softmax(dim=-1).expand(-1, 6, -1, -1).float().clone().requires_grad_()
    value = REGULARIZERS[name](attention=attention)
    extreme = {"koleo": -math.log(1e-4), "uniformity": 0, "coding_rate": -math.log(1 + 4 * 577**2) / 2}
    assert value.item() == pytest.approx(extreme[name.removeprefix("attn_")], rel=1e-4, abs=1e-5)
    assert torch.autograd.grad(value, attention)[0].isfinite().all()


# --- channels


def test_channels_in_closed_form():
    term = REGULARIZERS["emb_vcreg"]
    signs = torch.tensor([[1.0]])
    for _ in range(3):
        signs = torch.cat([torch.cat([signs, signs], dim=1), torch.cat([signs, -signs], dim=1)])
    balanced = torch.cat([signs, -signs])  # 16 tokens of 8 channels: mean 0, standard deviation 1, no correlation
    assert term(last=balanced[None]).item() == pytest.approx(0, abs=1e-6)
    assert term(last=normals(0, 1, 1, 8).expand(3, 5, 8)).item() == pytest.approx(24.75)
    opposite = torch.cat([torch.ones(4, 8), -torch.ones(4, 8)])  # all channels are one: every covariance is 1
    assert term(last=opposite[None]).item() == pytest.approx(7)


def test_channels_are_those_of_the_batch():
    tokens = normals(0, 3, 4, 6)
    value = REGULARIZERS["emb_vcreg"](last=tokens)
    regrouped = tokens.flatten(0, 1)[torch.randperm(12)].unflatten(0, (2, 6))
    torch.testing.assert_close(REGULARIZERS["emb_vcreg"](last=regrouped), value)


# --- circuits


def change_basis(model):
    """Another basis within every head, which leaves the attention as it is."""
    with torch.no_grad():
        for i, block in enumerate(model.blocks):
            attn = block.attn
            basis = normals(i, attn.num_heads, attn.head_dim, attn.head_dim)
            inverse = torch.linalg.inv(basis)
            for layer in (attn.qkv.weight, attn.qkv.bias):
                q, k, v = layer.unflatten(0, (3, attn.num_heads, attn.head_dim)).unbind()
                shape = q.shape if q.dim() == 3 else (*q.shape, 1)
                q.copy_((basis @ q.view(shape)).view_as(q))
                k.copy_((inverse.mT @ k.view(shape)).view_as(k))
                v.copy_((basis @ v.view(shape)).view_as(v))
            columns = attn.proj.weight.unflatten(1, (attn.num_heads, attn.head_dim)).transpose(0, 1)
            attn.proj.weight.copy_((columns @ inverse).transpose(0, 1).flatten(1))


def test_a_change_of_basis_moves_the_terms_on_rows_and_not_those_on_circuits():
    terms = {name: term for name, term in REGULARIZERS.items() if term.level == "weight"}
    logits, values = [], []
    for changed in (False, True):
        model = build()
        if changed:
            change_basis(model)
        output = TappedViT(model, ["weights", "circuits"])(images())
        logits.append(output.logits)
        torch.manual_seed(0)
        taps = output._asdict()
        values.append({name: term(**{tap: taps[tap] for tap in term.reads}) for name, term in terms.items()})
    torch.testing.assert_close(*logits)
    for name in terms:
        same = pytest.approx(values[0][name].item(), rel=1e-9)
        assert (values[1][name].item() == same) == (name in CIRCUITS), name


def test_opposite_circuits_lie_on_one_line():
    circuits = normals(0, 3, 1, 2, 4, 9).repeat(1, 2, 1, 1, 1)
    circuits[:, 1, 0] *= -2
    values = {name.removeprefix("weight_circuit_"): REGULARIZERS[name](circuits=circuits).item() for name in CIRCUITS}
    rate = -math.log(1 + 4 * 9**2) / 2
    expected = {"abscos": 1, "koleo": -math.log(2 + 1e-4), "uniformity": -8, "coding_rate": rate}
    assert values == pytest.approx(expected)
