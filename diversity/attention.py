"""Terms on attention maps, with the heads as items: maps after the softmax, before dropout, prefix tokens included.

`attention` is the maps of the first block (or of each chosen block, stacked in front); cross-layer terms compare the
first block with the last. A term is the mean over images, and over layers.
"""

import torch

from .regularizers import regularizer
from .similarity import (
    contrast,
    log_gram_determinant,
    mean_cross_cosine,
    mean_map_cosine,
    orthogonality_gap,
    separation,
    unit,
    without_diagonal,
)
from .spectral import spectral_spread


def _flat(attention: torch.Tensor) -> torch.Tensor:
    """[..., H, N, N] -> [..., H, N * N]."""
    return attention.flatten(start_dim=-2)


@regularizer(level="attention", coef=1e-4, alias="attn_abscos_within")
def attn_cos_within(attention: torch.Tensor) -> torch.Tensor:
    """Mean cosine between all pairs of heads' attention maps, a head with itself included.

    The absolute cosine is the same, since maps are not negative.

    Args:
        attention: [B, H, N, N] or [layers, B, H, N, N], rows sum to 1.

    Returns:
        0-dim, in [1/H, 1]: 1 when all heads have the same map, 1/H when no two heads attend to a common place.

    Source: The Principle of Diversity, attention diversity.
    Differs: computed as the squared norm of the mean unit map, which equals the mean over pairs.
    """
    return mean_map_cosine(attention).mean()


@regularizer(level="attention")
def attn_offdiag_cos_within(attention: torch.Tensor) -> torch.Tensor:
    """Mean cosine between the attention maps of two different heads.

    Args:
        attention: [B, H, N, N] or [layers, B, H, N, N], rows sum to 1, H >= 2.

    Returns:
        0-dim, in [0, 1]: 1 when all heads of an image have the same map, 0 when no two heads attend to a common place.

    Raises:
        ValueError: a single head.

    Source: attn_cos_within without the constant part that a head's cosine with itself adds.
    Differs: not in the released code.
    """
    return without_diagonal(mean_map_cosine(attention), _flat(attention)).mean()


@regularizer(level="attention", alias="attn_abscos_cross")
def attn_cos_cross(attention_first: torch.Tensor, attention_last: torch.Tensor) -> torch.Tensor:
    """Mean cosine between all heads' attention maps of the first block and all of the last block.

    The absolute cosine is the same, since maps are not negative.

    Args:
        attention_first, attention_last: [B, H, N, N], rows sum to 1.

    Returns:
        0-dim, in [0, 1]: 1 when all heads of both blocks have the same map, 0 when no two attend to a common place.

    Source: The Principle of Diversity, attention diversity across layers; a variant in the released code.
    Differs: computed as the inner product of the two mean unit maps, which equals the mean over pairs.
    """
    return mean_cross_cosine(_flat(attention_first), _flat(attention_last)).mean()


@regularizer(level="attention")
def attn_contrast_cross(attention_first: torch.Tensor, attention_last: torch.Tensor) -> torch.Tensor:
    """Contrast across blocks: each head's last-block map keeps closer to its own first-block map than to the others.

    Mean over images and heads of softplus(neg_h - pos_h), as emb_contrast_cross with the heads as tokens.

    Args:
        attention_first, attention_last: [B, H, N, N], rows sum to 1, H >= 2.

    Returns:
        0-dim, in [softplus(-1), softplus(1)]; log 2 when a head is as close to the others as to its own.

    Raises:
        ValueError: a single head.

    Source: The Principle of Diversity, attention diversity across layers; a variant in the released code.
    Differs: negatives are summed once per image, not pair by pair; the value is the same.
    """
    return contrast(unit(_flat(attention_first)), unit(_flat(attention_last))).mean()


@regularizer(level="attention")
def attn_so(attention: torch.Tensor) -> torch.Tensor:
    """Soft orthogonality of heads: squared Frobenius norm of (A A^T - I), A the heads' flattened maps, not normalised.

    Args:
        attention: [B, H, N, N] or [layers, B, H, N, N], rows sum to 1.

    Returns:
        0-dim, >= 0: 0 when the heads' maps are orthogonal and of length 1; a map has length between 1 and sqrt(N).

    Source: The Principle of Diversity, orthogonality regularization; a variant in the released code.
    Differs: none.
    """
    return orthogonality_gap(_flat(attention)).mean()


@regularizer(level="attention")
def attn_cond_orth(
    attention: torch.Tensor,
    *,
    probes: torch.Tensor | None = None,
    cond_orth_steps: int = 1,
    cond_orth_exact: bool = False,
) -> torch.Tensor:
    """Spread of the spectrum of A A^T: (largest - smallest eigenvalue)^2, A the heads' flattened maps, not normalised.

    Args:
        attention: [B, H, N, N] or [layers, B, H, N, N], rows sum to 1.
        probes: [2, B, H, 1] (or [2, layers, B, H, 1]) start vectors of the power iterations; standard normal when None.
        cond_orth_steps: power steps; one, as released, is biased low.
        cond_orth_exact: eigenvalues by a dense solver, without probes and steps.

    Returns:
        0-dim, >= 0: 0 when the heads' maps are orthogonal and of one length.

    Source: The Principle of Diversity, conditional orthogonality; a variant in the released code.
    Differs: more steps and the exact spread are options.
    """
    spread = spectral_spread(_flat(attention), probes, cond_orth_steps, cond_orth_exact, torch.randn, eps=1e-6)
    return spread.square().mean()


@regularizer(level="attention")
def attn_mhs(attention: torch.Tensor, *, mhs_collapse_aware: bool = False) -> torch.Tensor:
    """Maximum hyperspherical separation: pushes apart the unit maps of the two closest heads.

    Minus the smallest squared distance 2 - 2 cos between two heads of an image.

    Args:
        attention: [B, H, N, N] or [layers, B, H, N, N], rows sum to 1, H >= 2.
        mhs_collapse_aware: the distance in place of its square, which also separates maps that coincide.

    Returns:
        0-dim, in [-2, 0] ([-sqrt 2, 0] when collapse-aware): 0 when two heads of each image have the same map.

    Raises:
        ValueError: a single head.

    Source: The Principle of Diversity, maximum hyperspherical separation; a variant in the released code.
    Differs: no 1e-8 inside the norms; the collapse-aware form is an option.
    """
    return -separation(_flat(attention), mhs_collapse_aware).mean()


@regularizer(level="attention")
def attn_mgd(attention: torch.Tensor) -> torch.Tensor:
    """Maximum Gram determinant: -logdet(exp(-(2 - 2 cos)) + 1e-6 I) over the heads' maps.

    Args:
        attention: [B, H, N, N] or [layers, B, H, N, N], rows sum to 1.

    Returns:
        0-dim, >= -H log(1 + 1e-6); highest when all heads of an image have the same map.

    Source: The Principle of Diversity, maximum Gram determinant; a variant in the released code.
    Differs: no 1e-8 inside the norms; the determinant is taken in float64.
    """
    return -log_gram_determinant(_flat(attention)).mean()
