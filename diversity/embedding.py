"""Terms on patch embeddings. `first` is the input of the first block, `last` the output of the last block before the
final norm; both hold patch tokens only, [B, P, D].
"""

import torch

from .regularizers import regularizer
from .similarity import contrast, mean_cosine


@regularizer(level="embedding", coef=0.5)
def emb_cos_within(last: torch.Tensor) -> torch.Tensor:
    """Mean cosine between all pairs of patch tokens of the last layer: signed, a token with itself included.

    Args:
        last: [B, P, D], prefix tokens excluded.

    Returns:
        0-dim, in [0, 1]: 1 when all tokens of an image are parallel, 1/P when they are orthogonal.

    Source: The Principle of Diversity, within-layer patch diversity.
    Differs: computed as the squared norm of the mean unit token, which equals the mean over pairs.
    """
    return mean_cosine(last).mean()


@regularizer(level="embedding", coef=0.5)
def emb_contrast_cross(first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Contrast across layers: each last-layer token keeps closer to its own first-layer token than to the others.

    Mean over images and tokens of softplus(neg_i - pos_i): pos_i is the cosine of token i in the first and the last
    layer, neg_i the mean cosine of first-layer token i with the other last-layer tokens. Gradients reach both layers.

    Args:
        first, last: [B, P, D], prefix tokens excluded, P >= 2.

    Returns:
        0-dim, positive; log 2 when a token is as close to the others as to its own.

    Raises:
        ValueError: fewer than two patch tokens.

    Source: The Principle of Diversity, cross-layer patch diversity.
    Differs: negatives are summed once per image, not pair by pair; the value is the same.
    """
    return contrast(first, last).mean()
