"""Terms on attention maps, [B, H, N, N]: after the softmax, before dropout, prefix tokens included."""

import torch

from .regularizers import regularizer
from .similarity import mean_cosine


@regularizer(level="attention", coef=1e-4)
def attn_cos_within(attention: torch.Tensor) -> torch.Tensor:
    """Mean cosine between all pairs of heads' attention maps of the tapped block, a head with itself included.

    Args:
        attention: [B, H, N, N], rows sum to 1.

    Returns:
        0-dim, in [1/H, 1]: 1 when all heads of an image attend alike, 1/H when no two heads attend to a common place.

    Source: The Principle of Diversity, attention diversity.
    Differs: computed as the squared norm of the mean unit map, which equals the mean over pairs.
    """
    return mean_cosine(attention.flatten(start_dim=2)).mean()
