"""The term on the channels of patch embeddings: feature redundancy, where the other terms compare tokens."""

import torch

from .regularizers import regularizer
from .similarity import unit

VARIANCE_WEIGHT = 25.0
VARIANCE_EPSILON = 1e-4


@regularizer(level="embedding")
def emb_vcreg(last: torch.Tensor) -> torch.Tensor:
    """Variance and covariance of channels: 25 mean_c max(0, 1 - std_c) + 1/D sum over c != d of cov_cd^2.

    The statistics are those of all B * P patch tokens of the batch, each token x scaled to sqrt(D) x / |x|, and std_c
    is sqrt(var_c + 1e-4). The P tokens of one image are usually fewer than D, and D channels of fewer tokens are always
    correlated; those of a batch are enough from B * P > D on. The scale of a token is removed because the final norm
    removes it: otherwise longer tokens would satisfy the hinge, and shorter ones lower the covariances.

    Args:
        last: [B, P, D] or [layers, B, P, D], prefix tokens excluded; each layer has its own statistics. With several
            processes, each uses the tokens of its batch.

    Returns:
        0-dim, >= 0: 0 when all channels have a standard deviation of 1 and no two are correlated; 24.75 when all tokens
        of the batch are parallel.

    Source: VICReg (Bardes et al. 2022, arXiv 2105.04906), its variance and covariance terms with the published weights
        25 and 1.
    Differs: not in the released code. Tokens of the last block in place of embeddings of images, scaled as above;
        variances are divided by the number of tokens, not by one less.
    """
    width = last.shape[-1]
    tokens = width**0.5 * unit(last).flatten(-3, -2)
    centred = tokens - tokens.mean(dim=-2, keepdim=True)
    covariance = centred.mT @ centred / tokens.shape[-2]
    deviations = (covariance.diagonal(dim1=-2, dim2=-1) + VARIANCE_EPSILON).sqrt()
    itself = torch.eye(width, dtype=torch.bool, device=last.device)
    between = covariance.masked_fill(itself, 0).square().sum(dim=(-2, -1)) / width
    return (VARIANCE_WEIGHT * (1 - deviations).relu().mean(dim=-1) + between).mean()
