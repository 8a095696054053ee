"""The circuits of heads: their factors, inner products and singular values against dense matrices."""

import pytest
import torch
from families import FAMILIES, build
from golden_inputs import normals
from unrolled import qkv_weights

from diversity.circuits import circuit_cosines, circuit_factors, circuit_gram, circuit_singular_values


def dense(left, right):
    """The circuits [H, D, D] themselves."""
    return torch.stack([one.T @ other for one, other in zip(left, right, strict=True)])


def blocks_of(model):
    return [block for stage in getattr(model, "layers", [model]) for block in stage.blocks]


@pytest.mark.parametrize("name", FAMILIES)
def test_factors_are_the_rows_and_columns_of_each_head(name):
    for block in blocks_of(build(name)):
        heads, factors = block.attn.num_heads, circuit_factors(block)
        qk, ov = dense(*factors["qk"]), dense(*factors["ov"])
        queries, keys, values = qkv_weights(block.attn)
        size = len(queries) // heads
        for head in range(heads):
            rows = slice(head * size, (head + 1) * size)
            torch.testing.assert_close(qk[head], queries[rows].T @ keys[rows])
            torch.testing.assert_close(ov[head], block.attn.proj.weight[:, rows] @ values[rows])


def test_circuits_are_what_a_head_scores_and_adds():
    block = build("vit", qkv_bias=False, proj_bias=False).blocks[0]
    factors = circuit_factors(block)
    qk, ov = dense(*factors["qk"]), dense(*factors["ov"])
    tokens = normals(0, 2, 5, 24)
    scores = torch.einsum("bid,hde,bje->bhij", tokens, qk, tokens) * 8**-0.5
    added = torch.einsum("bhij,hde,bje->bid", scores.softmax(dim=-1), ov, tokens)
    torch.testing.assert_close(added, block.attn(tokens))


@pytest.mark.parametrize("shape", [(3, 4, 9), (2, 5, 5), (4, 6, 3), (1, 2, 7)], ids=str)
def test_gram_cosines_and_singular_values_against_dense_circuits(shape):
    left, right = normals(0, 2, *shape), normals(1, 2, *shape)
    for pair in range(2):
        circuits = dense(left[pair], right[pair])
        flat = circuits.flatten(1)
        gram = torch.tensor([[float((one * other).sum()) for other in flat] for one in flat], dtype=torch.float64)
        torch.testing.assert_close(circuit_gram(left, right)[pair], gram)
        lengths = flat.norm(dim=1)
        torch.testing.assert_close(circuit_cosines(left, right)[pair], gram / torch.outer(lengths, lengths))
        rank = min(shape[1:])
        values = torch.linalg.svdvals(circuits)
        torch.testing.assert_close(circuit_singular_values(left, right)[pair], values[:, :rank])
        assert (values[:, rank:] < 1e-12).all()


def test_a_change_of_basis_moves_the_factors_and_not_the_circuits():
    left, right, basis = normals(0, 3, 4, 9), normals(1, 3, 4, 9), normals(2, 3, 4, 4)
    moved = basis @ left, torch.linalg.inv(basis).mT @ right
    assert not torch.allclose(moved[0], left)
    for function in (circuit_gram, circuit_cosines, circuit_singular_values):
        torch.testing.assert_close(function(*moved), function(left, right))


def test_factors_keep_the_gradient_of_the_weights():
    block = build().blocks[0]
    factors = circuit_factors(block)
    sum(circuit_gram(*pair).sum() for pair in factors.values()).backward()
    assert (block.attn.qkv.weight.grad != 0).all() and (block.attn.proj.weight.grad != 0).all()


def test_zero_circuits_have_no_cosine_and_a_finite_gradient():
    left, right = normals(0, 3, 4, 9), normals(1, 3, 4, 9)
    left[1], left[2], right[2] = 0, 0, 0
    left.requires_grad_(), right.requires_grad_()
    cosines = circuit_cosines(left, right)
    torch.testing.assert_close(cosines, torch.diag(torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)))
    for gradient in torch.autograd.grad(cosines.sum(), (left, right)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("lacking", ["differential attention", "grouped queries", "no attention"])
def test_blocks_without_circuits_give_none(lacking):
    if lacking == "differential attention":
        block = build("vit", attn_layer="diff").blocks[0]
    else:
        block = build("vit" if lacking == "no attention" else "rope").blocks[0]
        if lacking == "no attention":
            block.attn = torch.nn.Identity()
        else:
            block.attn = type(block.attn)(24, num_heads=4, qkv_fused=False, num_kv_heads=2)
    assert circuit_factors(block) is None
