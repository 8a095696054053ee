"""Ranks of a spectrum that need no threshold."""

import torch


def effective_rank_of(singular_values: torch.Tensor) -> torch.Tensor:
    """exp(H(s / sum s)) over the last axis: 1 for a matrix of rank 1, n for n equal singular values.

    Source: The effective rank (Roy and Vetterli 2007).
    """
    fractions = singular_values / singular_values.sum(dim=-1, keepdim=True).clamp_min(1e-300)
    return torch.special.entr(fractions).sum(dim=-1).exp()


def stable_rank_of(singular_values: torch.Tensor) -> torch.Tensor:
    """sum s^2 / max s^2 over the last axis: 1 for a matrix of rank 1, n for n equal singular values."""
    squares = singular_values.square()
    return squares.sum(dim=-1) / squares.amax(dim=-1)


def participation_ratio_of(singular_values: torch.Tensor) -> torch.Tensor:
    """(sum s^2)^2 / sum s^4 over the last axis: 1 for a matrix of rank 1, n for n equal singular values."""
    squares = singular_values.square()
    return squares.sum(dim=-1).square() / squares.square().sum(dim=-1)
