"""Terms on weight matrices, [M, Dout, Din]: all chosen matrices of one shape stacked, block by block, q, k, v."""

import torch

from .regularizers import regularizer
from .similarity import spectral_spread


@regularizer(level="weight", coef=5e-4)
def weight_mha_cond_orth(weights: torch.Tensor, *, probes: torch.Tensor | None = None) -> torch.Tensor:
    """Spread of the spectrum of W W^T: sum over the matrices of (largest - smallest eigenvalue)^2, by one power step.

    Zero when every W has orthogonal rows of one length, the best-conditioned case.

    Args:
        weights: [M, Dout, Din].
        probes: [2, M, Dout, 1] start vectors of the two power iterations; uniform on [0, 1) when None.

    Returns:
        0-dim, >= 0, in the unit of the weights to the fourth power; grows with the number of matrices.

    Source: The Principle of Diversity, weight diversity by condition number.
    Differs: matrix-vector products only, all matrices in one batch. As in the released code a single power step
        estimates each end of the spectrum, which is biased low.
    """
    if probes is None:
        probes = torch.rand(2, *weights.shape[:2], 1, dtype=weights.dtype, device=weights.device)
    return spectral_spread(weights, probes).square().sum()
