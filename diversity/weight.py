"""Terms on weight matrices, with the rows as items: the sum over all chosen matrices.

`weights` is [M, Dout, Din], all chosen matrices stacked, block by block and q, k, v within a block; where they differ
in shape, a sequence of such stacks, one for each shape.
"""

from collections.abc import Callable, Sequence

import torch

from .regularizers import regularizer
from .similarity import log_gram_determinant, orthogonality_gap, separation
from .spectral import spectral_spread

Stacks = torch.Tensor | Sequence[torch.Tensor]


def of_each(function: Callable[..., torch.Tensor], *stacks: Stacks) -> torch.Tensor:
    """`function` of every stack ([M, ...] -> [M]), its values side by side: one for each matrix."""
    if torch.is_tensor(stacks[0]):
        return function(*stacks)
    return torch.cat([function(*of_one_shape) for of_one_shape in zip(*stacks, strict=True)])


def _spectral_term(weights, probes, steps, exact, normalize):
    """Sum over the matrices of squared spreads; `normalize`d, the mean of the spreads over the width, squared."""

    def spread(matrices, start=None):
        value = spectral_spread(matrices, start, steps, exact, torch.rand)
        return value / min(matrices.shape[1:]) if normalize else value

    spreads = of_each(spread, weights) if probes is None else of_each(spread, weights, probes)
    return spreads.square().mean() if normalize else spreads.square().sum()


@regularizer(level="weight", coef=5e-4)
def weight_mha_cond_orth(
    weights: Stacks,
    *,
    probes: Stacks | None = None,
    cond_orth_steps: int = 1,
    cond_orth_exact: bool = False,
    cond_orth_normalize: bool = False,
) -> torch.Tensor:
    """Spread of the spectrum of W W^T: sum over the matrices of (largest - smallest eigenvalue)^2.

    Zero when every W has orthogonal rows of one length, the best-conditioned case.

    Args:
        weights: [M, Dout, Din], or a sequence of such stacks.
        probes: [2, M, Dout, 1] start vectors of the two power iterations (a sequence, if `weights` is one); uniform on
            [0, 1) when None.
        cond_orth_steps: power steps; one, as released, is biased low.
        cond_orth_exact: eigenvalues by a dense solver, without probes and steps.
        cond_orth_normalize: the mean over the matrices of ((largest - smallest) / D)^2, D the smaller side of a matrix.
            At timm's initial weights, whose standard deviation is 0.02 at any width, this does not depend on width and
            depth, so a coefficient carries over. A coefficient c of the plain sum over M matrices becomes c * M * D^2.

    Returns:
        0-dim, >= 0, in the unit of the weights to the fourth power; grows with M unless normalized.

    Source: The Principle of Diversity, weight diversity by condition number.
    Differs: matrix-vector products only, all matrices of one shape in one batch; more steps, the exact spread and the
        normalization are options.
    """
    return _spectral_term(weights, probes, cond_orth_steps, cond_orth_exact, cond_orth_normalize)


@regularizer(level="weight")
def weight_mha_cond_orth_in(
    weights: Stacks,
    *,
    probes: Stacks | None = None,
    cond_orth_steps: int = 1,
    cond_orth_exact: bool = False,
    cond_orth_normalize: bool = False,
) -> torch.Tensor:
    """weight_mha_cond_orth on W^T W: the columns of every W in place of its rows.

    Args:
        weights: [M, Dout, Din], or a sequence of such stacks.
        probes: [2, M, Din, 1] start vectors (a sequence, if `weights` is one); uniform on [0, 1) when None.
        cond_orth_steps, cond_orth_exact, cond_orth_normalize: as in weight_mha_cond_orth.

    Returns:
        0-dim, >= 0, in the unit of the weights to the fourth power; grows with M unless normalized.

    Source: The Principle of Diversity, weight diversity by condition number; a variant in the released code.
    Differs: as weight_mha_cond_orth.
    """
    columns = weights.mT if torch.is_tensor(weights) else [matrices.mT for matrices in weights]
    return _spectral_term(columns, probes, cond_orth_steps, cond_orth_exact, cond_orth_normalize)


@regularizer(level="weight")
def weight_mha_so(weights: Stacks) -> torch.Tensor:
    """Soft orthogonality of rows: sum over the matrices of the squared Frobenius norm of (W W^T - I).

    Args:
        weights: [M, Dout, Din], or a sequence of such stacks.

    Returns:
        0-dim, >= 0: 0 when the rows of every matrix are orthonormal; grows with the number of matrices.

    Source: The Principle of Diversity, orthogonality regularization; a variant in the released code.
    Differs: none.
    """
    return of_each(orthogonality_gap, weights).sum()


@regularizer(level="weight")
def weight_mha_mhs(weights: Stacks, *, mhs_collapse_aware: bool = False) -> torch.Tensor:
    """Maximum hyperspherical separation: pushes apart the two closest unit rows of every matrix.

    Minus the sum over the matrices of the smallest squared distance 2 - 2 cos between two rows.

    Args:
        weights: [M, Dout, Din] with Dout >= 2, or a sequence of such stacks.
        mhs_collapse_aware: the distance in place of its square, which also separates rows that coincide.

    Returns:
        0-dim, in [-4 M, 0] ([-2 M, 0] when collapse-aware): 0 when two rows of each matrix are parallel.

    Raises:
        ValueError: a matrix with a single row.

    Source: The Principle of Diversity, maximum hyperspherical separation; a variant in the released code.
    Differs: no 1e-8 inside the norms; the collapse-aware form is an option.
    """
    return -of_each(lambda matrices: separation(matrices, mhs_collapse_aware), weights).sum()


@regularizer(level="weight")
def weight_mha_mgd(weights: Stacks) -> torch.Tensor:
    """Maximum Gram determinant: -logdet(exp(-(2 - 2 cos)) + 1e-6 I) over the rows, summed over the matrices.

    Args:
        weights: [M, Dout, Din], or a sequence of such stacks.

    Returns:
        0-dim, >= -M Dout log(1 + 1e-6); highest when all rows of every matrix are parallel.

    Source: The Principle of Diversity, maximum Gram determinant; a variant in the released code.
    Differs: no 1e-8 inside the norms; the determinant is taken in float64.
    """
    return -of_each(log_gram_determinant, weights).sum()
