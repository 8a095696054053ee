"""Measures of single matrices of weights, and of the circuits that they make together."""

import math

import torch

from ..similarity import unit
from .ranks import effective_rank_of, participation_ratio_of, stable_rank_of
from .registry import measure

FLOAT64_EPSILON = torch.finfo(torch.float64).eps


@measure("weight", "effective rank of weights", unit="rank", better="higher")
def weight_effective_rank(singular_values):
    """exp(H(s / sum s)) of the singular values s of the matrix, H the entropy.

    From 1 for a matrix of rank 1 to min(Dout, Din) for equal singular values.

    Source: The effective rank (Roy and Vetterli 2007).
    """
    return effective_rank_of(singular_values)


@measure("weight", "stable rank of weights", unit="rank", better="higher")
def weight_stable_rank(singular_values):
    """sum s^2 / max s^2 of the singular values s of the matrix.

    From 1 for a matrix of rank 1 to min(Dout, Din) for equal singular values; none for a matrix of zeros.

    Source: Rudelson and Vershynin 2007.
    """
    return stable_rank_of(singular_values)


@measure("weight", "participation ratio of weights", unit="rank", better="higher")
def weight_participation_ratio(singular_values):
    """(sum s^2)^2 / sum s^4 of the singular values s of the matrix.

    From 1 for a matrix of rank 1 to min(Dout, Din) for equal singular values; none for a matrix of zeros.

    Source: As of tokens.
    """
    return participation_ratio_of(singular_values)


@measure("weight", "condition number", unit="ratio", better="lower", geometric=True)
def condition_number(singular_values):
    """Largest over smallest singular value; means are geometric.

    From 1 for equal singular values to 1 / the epsilon of float64, the limit.
    """
    return 1 / (singular_values[-1] / singular_values[0]).nan_to_num().clamp_min(FLOAT64_EPSILON)


@measure("weight", "absolute row cosine", unit="absolute cosine", better="lower")
def row_abscosine(row_abscosines):
    """Mean absolute cosine of two different rows.

    From 0 for orthogonal rows to 1 for rows along one line.
    """
    rows = len(row_abscosines)
    return row_abscosines.sum(dim=1).sum(dtype=torch.float64) / (rows * (rows - 1))


@measure("weight", "smallest angle of rows in degrees", unit="degrees", better="higher")
def smallest_angle(matrix, row_abscosines):
    """Smallest angle between the lines along two rows.

    From 0 for two rows along one line to 90 for orthogonal rows.
    """
    closest, rows = row_abscosines.argmax(), len(matrix)
    one, other = unit(matrix[torch.stack((closest // rows, closest % rows))].double())
    apart = torch.atan2(torch.linalg.vector_norm(one - other), torch.linalg.vector_norm(one + other))
    angle = torch.minimum(apart, math.pi / 2 - apart) * 2
    return torch.rad2deg(torch.where(row_abscosines.max() > 0, angle, math.pi / 2))


@measure("circuit", "effective rank of circuits", unit="rank", better="higher")
def circuit_effective_rank(singular_values):
    """exp(H(s / sum s)) of the singular values s of a head's circuit, mean over the heads, H the entropy.

    From 1 for a circuit of rank 1 to the width of a head.

    Source: Circuits W_Q W_K^T and W_V W_O (Elhage et al. 2021), whose spectrum no change of basis in a head changes.
    """
    return effective_rank_of(singular_values).mean()


@measure("circuit", "absolute cosine of circuits", unit="absolute cosine", better="lower")
def circuit_abscosine(head_abscosines):
    """Mean absolute cosine of the circuits of two different heads of a block.

    From 0 for orthogonal circuits to 1 for heads that differ in a factor.

    Source: As the effective rank of circuits.
    """
    heads = len(head_abscosines)
    if heads < 2:
        return None
    return (head_abscosines.sum() - head_abscosines.diagonal().sum()) / (heads * (heads - 1))
