"""Measures of the hidden units of MLPs, block by block."""

import torch

from .registry import measure


@measure("mlp", "dead units", unit="fraction of units", better="lower")
def dead_units(maxima):
    """Fraction of an MLP's hidden units whose activation function is positive for no token of any image.

    From 0 to 1, and lower the more images there are; in a gated MLP (SwiGLU) the units are those of the gate.

    Source: Dead neurons (Voita et al. 2023) of ReLU; GELU and SiLU have the same sign.
    """
    return (maxima <= 0).to(torch.float64).mean()
