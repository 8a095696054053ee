"""Terms on patch embeddings.

`first` is the input of the first block, `last` the output of the last block before the final norm (or of each chosen
block, stacked in front); both are patch tokens only. A term is the mean over images, and over layers.
"""

import torch

from .regularizers import regularizer
from .similarity import (
    contrast,
    cosine_contrast,
    cosines,
    log_gram_determinant,
    mean_cosine,
    mean_cross_cosine,
    orthogonality_gap,
    separation,
    unit,
    without_diagonal,
)
from .spectral import spectral_spread


@regularizer(level="embedding", coef=0.5)
def emb_cos_within(last: torch.Tensor, *, num_prefix_tokens: int = 0) -> torch.Tensor:
    """Mean cosine between all pairs of patch tokens of an image: signed, a token with itself included.

    Args:
        last: [B, P, D] or [layers, B, P, D], prefix tokens excluded.
        num_prefix_tokens: leave out this many tokens at the front of `last`, [B, num_prefix_tokens + P, D].

    Returns:
        0-dim, in [0, 1]: 1 when all tokens of an image are parallel, 1/P when they are orthogonal.

    Source: The Principle of Diversity, within-layer patch diversity.
    Differs: computed as the squared norm of the mean unit token, which equals the mean over pairs.
    """
    return mean_cosine(last, num_prefix_tokens).mean()


@regularizer(level="embedding")
def emb_abscos_within(last: torch.Tensor) -> torch.Tensor:
    """Mean absolute cosine between all pairs of patch tokens of an image, a token with itself included.

    Args:
        last: [B, P, D] or [layers, B, P, D], prefix tokens excluded.

    Returns:
        0-dim, in [1/P, 1]: 1 when all tokens of an image lie on one line, 1/P when they are orthogonal.

    Source: The Principle of Diversity, within-layer patch diversity; a variant in the released code.
    Differs: none.
    """
    return cosines(last).abs().mean()


@regularizer(level="embedding")
def emb_offdiag_cos_within(last: torch.Tensor) -> torch.Tensor:
    """Mean signed cosine between two different patch tokens of an image.

    Args:
        last: [B, P, D] or [layers, B, P, D], prefix tokens excluded, P >= 2.

    Returns:
        0-dim, in [-1/(P-1), 1]: 1 when all tokens of an image are parallel, 0 when they are orthogonal.

    Raises:
        ValueError: fewer than two patch tokens.

    Source: emb_cos_within without the constant part that a token's cosine with itself adds.
    Differs: not in the released code.
    """
    return without_diagonal(mean_cosine(last), last).mean()


@regularizer(level="embedding")
def emb_offdiag_abscos_within(last: torch.Tensor) -> torch.Tensor:
    """Mean absolute cosine between two different patch tokens of an image.

    Args:
        last: [B, P, D] or [layers, B, P, D], prefix tokens excluded, P >= 2.

    Returns:
        0-dim, in [0, 1]: 1 when all tokens of an image lie on one line, 0 when they are orthogonal.

    Raises:
        ValueError: fewer than two patch tokens.

    Source: DiversePatch (Gong et al. 2021, arXiv 2104.12753), patch-wise cosine loss.
    Differs: not in the released code.
    """
    return without_diagonal(cosines(last).abs().mean(dim=(-2, -1)), last).mean()


@regularizer(level="embedding")
def emb_cos_cross(first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Mean signed cosine between all first-layer and all last-layer patch tokens of an image.

    Args:
        first: [B, P, D], prefix tokens excluded.
        last: [B, P, D] or [layers, B, P, D], prefix tokens excluded.

    Returns:
        0-dim, in [-1, 1]: 1 when all tokens of both layers are parallel.

    Source: The Principle of Diversity, cross-layer patch diversity; a variant in the released code.
    Differs: computed as the inner product of the two mean unit tokens, which equals the mean over pairs.
    """
    return mean_cross_cosine(first, last).mean()


@regularizer(level="embedding")
def emb_abscos_cross(first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Mean absolute cosine between all first-layer and all last-layer patch tokens of an image.

    Args:
        first: [B, P, D], prefix tokens excluded.
        last: [B, P, D] or [layers, B, P, D], prefix tokens excluded.

    Returns:
        0-dim, in [0, 1]: 1 when all tokens of both layers lie on one line, 0 when the layers are orthogonal.

    Source: The Principle of Diversity, cross-layer patch diversity; a variant in the released code.
    Differs: none.
    """
    return cosines(first, last).abs().mean()


@regularizer(level="embedding", coef=0.5)
def emb_contrast_cross(first: torch.Tensor, last: torch.Tensor, *, num_prefix_tokens: int = 0) -> torch.Tensor:
    """Contrast across layers: each last-layer token keeps closer to its own first-layer token than to the others.

    Mean over images and tokens of softplus(neg_i - pos_i): pos_i is the cosine of token i in the first and the last
    layer, neg_i the mean cosine of first-layer token i with the other last-layer tokens. Gradients reach both layers.

    Args:
        first: [B, P, D], prefix tokens excluded, P >= 2.
        last: [B, P, D] or [layers, B, P, D], prefix tokens excluded.
        num_prefix_tokens: leave out this many tokens at the front of `first` and `last`.

    Returns:
        0-dim, in [softplus(-2), softplus(2)]; log 2 when a token is as close to the others as to its own.

    Raises:
        ValueError: fewer than two patch tokens.

    Source: The Principle of Diversity, cross-layer patch diversity.
    Differs: negatives are summed once per image, not pair by pair; the value is the same.
    """
    return cosine_contrast(first, last, num_prefix_tokens).mean()


@regularizer(level="embedding")
def emb_dot_contrast_cross(first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """emb_contrast_cross on raw inner products of the tokens in place of cosines.

    Args:
        first: [B, P, D], prefix tokens excluded, P >= 2.
        last: [B, P, D] or [layers, B, P, D], prefix tokens excluded.

    Returns:
        0-dim, positive and unbounded; log 2 when a token is as close to the others as to its own.

    Raises:
        ValueError: fewer than two patch tokens.

    Source: DiversePatch (Gong et al. 2021, arXiv 2104.12753), patch-wise contrastive loss.
    Differs: not in the released code.
    """
    return contrast(first, last).mean()


@regularizer(level="embedding")
def emb_so(last: torch.Tensor) -> torch.Tensor:
    """Soft orthogonality of patch tokens: squared Frobenius norm of (T T^T - I), T the unit tokens of an image.

    Args:
        last: [B, P, D] or [layers, B, P, D], prefix tokens excluded.

    Returns:
        0-dim, in [0, P (P-1)]: 0 when the tokens of an image are orthogonal; grows with the number of tokens.

    Source: The Principle of Diversity, orthogonality regularization; a variant in the released code.
    Differs: none.
    """
    return orthogonality_gap(unit(last)).mean()


@regularizer(level="embedding")
def emb_cond_orth(
    last: torch.Tensor,
    *,
    probes: torch.Tensor | None = None,
    cond_orth_steps: int = 1,
    cond_orth_exact: bool = False,
) -> torch.Tensor:
    """Spread of the spectrum of T T^T: (largest - smallest eigenvalue)^2, T the unit tokens of an image.

    Args:
        last: [B, P, D] or [layers, B, P, D], prefix tokens excluded.
        probes: [2, B, P, 1] (or [2, layers, B, P, 1]) start vectors of the power iterations; standard normal when None.
        cond_orth_steps: power steps; one, as released, is biased low.
        cond_orth_exact: eigenvalues by a dense solver, without probes and steps.

    Returns:
        0-dim, in [0, P^2]: 0 when the tokens of an image are orthogonal.

    Source: The Principle of Diversity, conditional orthogonality; a variant in the released code.
    Differs: matrix-vector products only; more steps and the exact spread are options.
    """
    spread = spectral_spread(unit(last), probes, cond_orth_steps, cond_orth_exact, torch.randn, eps=1e-6)
    return spread.square().mean()


@regularizer(level="embedding")
def emb_mhs(last: torch.Tensor, *, mhs_collapse_aware: bool = False) -> torch.Tensor:
    """Maximum hyperspherical separation: pushes apart the two closest unit patch tokens of an image.

    Minus the smallest squared distance 2 - 2 cos between two tokens of an image.

    Args:
        last: [B, P, D] or [layers, B, P, D], prefix tokens excluded, P >= 2.
        mhs_collapse_aware: the distance in place of its square, which also separates tokens that coincide.

    Returns:
        0-dim, in [-4, 0] ([-2, 0] when collapse-aware): 0 when two tokens of each image are parallel.

    Raises:
        ValueError: fewer than two patch tokens.

    Source: The Principle of Diversity, maximum hyperspherical separation; a variant in the released code.
    Differs: no 1e-8 inside the norms; the collapse-aware form is an option.
    """
    return -separation(last, mhs_collapse_aware).mean()


@regularizer(level="embedding")
def emb_mgd(last: torch.Tensor) -> torch.Tensor:
    """Maximum Gram determinant: -logdet(exp(-(2 - 2 cos)) + 1e-6 I) over the patch tokens of an image.

    Args:
        last: [B, P, D] or [layers, B, P, D], prefix tokens excluded.

    Returns:
        0-dim, >= -P log(1 + 1e-6); highest when all tokens of an image are parallel.

    Source: The Principle of Diversity, maximum Gram determinant; a variant in the released code.
    Differs: no 1e-8 inside the norms; the determinant is taken in float64.
    """
    return -log_gram_determinant(last).mean()


@regularizer(level="embedding")
def emb_grad_diversity(grad: torch.Tensor) -> torch.Tensor:
    """Gradient diversity: minus the sum of squared norms over the squared norm of the sum of the tokens' gradients.

    Where only the class token is classified (token pooling, no mixing) it alone has a gradient, and the value is -1.
    `DiversityObjective` takes the gradient inside the step, which torch.compile cannot trace.

    Args:
        grad: [B, N, D], gradient of the classification loss at the output of the last block, prefix tokens included;
            its scale does not matter.

    Returns:
        0-dim, <= -1/N: -1/N when all tokens of an image have one gradient, -1 when they are orthogonal, without
        bound as they cancel. 0 when there is no gradient at all.

    Source: Gradient diversity (Yin et al. 2018); a variant in the released code.
    Differs: none.
    """
    total = grad.sum(dim=-2).square().sum(dim=-1).clamp_min(torch.finfo(grad.dtype).tiny)
    return -(grad.square().sum(dim=(-2, -1)) / total).mean()
