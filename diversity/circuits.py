"""Circuits: the products of weight matrices through which a head of attention acts on the tokens.

With W_Q^h, W_K^h, W_V^h [hd, D] the rows of head h and W_O^h [D, hd] its columns of the output projection, the score of
tokens i and j is x_i^T (W_Q^hT W_K^h) x_j, the QK circuit, and the head adds to token i the sum over j of its attention
to j times (W_O^h W_V^h) x_j, the OV circuit. A change of basis within a head (W_Q^h -> R W_Q^h, W_K^h -> R^-T W_K^h)
changes the matrices and the cosines of their rows, but neither the model nor its circuits.

A circuit [D, D] is never formed: it is given by its factors `left` and `right` [hd, D] as left^T right, and everything
here is computed from products of factors. Biases, rotary angles, LayerScale, and norms or gates between the matrices
are not part of a circuit.

Source: A mathematical framework for transformer circuits (Elhage et al. 2021).
"""

import torch
from torch import nn

from . import fusible
from .backbones import Backbone, TapError
from .block_parts import ATTENTIONS, attention_of, block_matrices


def circuit_factors(block: nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]] | None:
    """The factors of the circuits of a block's heads, as views of its weights.

    Returns:
        {"qk": (W_Q, W_K), "ov": (W_O^T, W_V)}, each factor [H, hd, D]; a circuit is left^T right. None where the block
        has no such attention: differential attention has two scores for each head, and with grouped queries several
        heads share their keys.
    """
    attn = attention_of(block)
    if not isinstance(attn, ATTENTIONS):
        return None
    inner, output = block_matrices(block, "qkv"), block_matrices(block, "proj")
    if inner is None or output is None or len({matrices.shape[1:] for matrices in inner}) > 1:
        return None
    queries, keys, values = (
        matrix.unflatten(0, (attn.num_heads, -1)) for matrices in inner for matrix in matrices.unbind()
    )
    return {"qk": (queries, keys), "ov": (output[0][0].mT.unflatten(0, (attn.num_heads, -1)), values)}


def circuit_stacks(backbone: Backbone) -> tuple[torch.Tensor, ...]:
    """The factors of all circuits, [M, H, 2, hd, D] for each shape as it appears: QK and OV, block by block.

    Raises:
        TapError: as `require_circuits`.
    """
    require_circuits(backbone)
    stacks = {}
    for block in backbone.all_blocks:
        for factors in circuit_factors(block).values():
            pair = torch.stack(factors, dim=1)
            stacks.setdefault(pair.shape, []).append(pair)
    return tuple(torch.stack(of_one_shape) for of_one_shape in stacks.values())


def require_circuits(backbone: Backbone):
    """Raise `TapError` if a block has no circuits, or a single head."""
    for i, block in enumerate(backbone.all_blocks):
        factors = circuit_factors(block)
        if factors is None:
            missing = f"block {i} has no attention with one query, key and value matrix for each head"
            raise TapError("circuits", backbone.model, missing)
        if len(factors["qk"][0]) < 2:
            raise TapError("circuits", backbone.model, "it has a single head, and terms on circuits compare heads")


def circuit_gram(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Frobenius inner products of the circuits of every two heads.

    <L_g^T R_g, L_h^T R_h> is the sum over the entries of (L_g L_h^T) * (R_g R_h^T), which are [hd, hd].

    Args:
        left, right: [..., H, hd, D]; the widths D of the two may differ.

    Returns:
        [..., H, H].
    """
    heads = left.shape[-3:-1]
    left, right = left.flatten(-3, -2), right.flatten(-3, -2)
    products = (left @ left.mT) * (right @ right.mT)
    return products.unflatten(-1, heads).unflatten(-3, heads).sum(dim=(-3, -1))


def circuit_cosines(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Cosines of the circuits of every two heads, [..., H, H]; 0 beside a circuit that is shorter than 1e-8."""
    gram = circuit_gram(left, right)
    lengths = gram.diagonal(dim1=-2, dim2=-1).clamp_min(fusible.EPS**2).sqrt()
    return gram / lengths.unsqueeze(-1) / lengths.unsqueeze(-2)


def circuit_singular_values(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Singular values of every head's circuit, in falling order.

    With left^T = Q A and right^T = Q' B, the columns of Q and of Q' orthonormal, they are those of A B^T [hd, hd].

    Args:
        left, right: [..., H, hd, D].

    Returns:
        [..., H, min(hd, D)]; the other D - hd singular values are zero.
    """
    left, right = (torch.linalg.qr(factor.mT, mode="r").R for factor in (left, right))
    return torch.linalg.svdvals(left @ right.mT)
