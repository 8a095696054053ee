"""Measures of patch tokens, layer by layer."""

import numpy as np
import torch

from ..similarity import mean_cosine, unit, without_diagonal
from .ranks import effective_rank_of
from .registry import measure

OUTLIER = 4.0
"""Standard deviations above the mean from which the norm of a token is high."""


@measure("embedding", "token cosine", unit="cosine", better="lower")
def token_cosine(tokens):
    """Mean cosine of two different patch tokens of an image.

    From -1 / (P - 1) to 1; 1 for parallel tokens, 0 for orthogonal ones.
    """
    return without_diagonal(mean_cosine(tokens), tokens) if tokens.shape[1] > 1 else None


@measure("embedding", "absolute token cosine", unit="absolute cosine", better="lower")
def token_abscosine(tokens, gram, lengths):
    """Mean absolute cosine of two different patch tokens of an image.

    From 0 for orthogonal tokens to 1 for tokens along one line.
    """
    if tokens.shape[1] < 2:
        return None
    inverse = lengths.clamp_min(1e-8).reciprocal().unsqueeze(-1)
    mean = (inverse.mT @ gram.abs() @ inverse).flatten() / tokens.shape[1] ** 2
    return without_diagonal(mean, tokens)


@measure("embedding", "cosine to the first embedding", unit="cosine", better="lower")
def first_cosine(tokens, first):
    """Mean cosine of a patch token and its own first embedding, the input of the first block (of its stage in a Swin).

    From -1 to 1; 1 where the blocks only rescale the tokens.
    """
    return (unit(first) * unit(tokens)).sum(dim=-1).mean(dim=-1)


@measure("embedding", "block influence", unit="1 - cosine", better="higher")
def block_influence(tokens, before):
    """1 - the mean cosine of a patch token before and after the block.

    From 0 for a block that only rescales the tokens to 2.

    Source: ShortGPT (Men et al. 2024), on patch tokens.
    """
    return None if before is None else (unit(tokens) - unit(before)).square().sum(dim=-1).mean(dim=-1) / 2


@measure("embedding", "high-frequency fraction", unit="fraction of the norm", better="higher")
def high_frequency(centred, lengths):
    """|X - 1 mean(X)| / |X| of an image's matrix X of patch tokens, mean(X) its mean token, in Frobenius norms.

    From 0 for equal tokens to 1 for tokens of mean zero.

    Source: Anti-oversmoothing in deep vision transformers (Wang et al., ICLR 2022), over |X| and not over |1 mean(X)|.
    """
    return torch.linalg.vector_norm(centred, dim=(1, 2)) / torch.linalg.vector_norm(lengths, dim=-1)


@measure("embedding", "participation ratio", unit="rank", better="higher")
def participation_ratio(gram, lengths):
    """(sum s^2)^2 / sum s^4 of the singular values s of an image's matrix of patch tokens, which is not centred.

    From 1 for parallel tokens to min(P, D) for orthogonal tokens of one length.

    Source: Participation ratio, as in Gao et al. 2017, "A theory of multineuronal dimensionality".
    """
    lengths = lengths.double()
    return lengths.square().sum(dim=-1).square() / torch.linalg.vector_norm(gram, dim=(1, 2)).double().square()


@measure("embedding", "effective rank", unit="rank", better="higher", optional=True)
def effective_rank(tokens):
    """exp(H(s / sum s)) of the singular values s of an image's matrix of patch tokens, H the entropy.

    From 1 for parallel tokens to min(P, D) for orthogonal tokens of one length.

    Source: The effective rank (Roy and Vetterli 2007).
    """
    tokens = (tokens.mT if tokens.shape[-2] > tokens.shape[-1] else tokens).double()
    return effective_rank_of(torch.linalg.eigvalsh(tokens @ tokens.mT).clamp_min(0).sqrt())


@measure("embedding", "tokens of high norm", unit="fraction of tokens", better=None)
def high_norm_tokens(lengths):
    """Fraction of an image's patch tokens whose norm is above the mean + 4 standard deviations of its tokens.

    From 0 to 1 / 17; none with fewer than 18 patches, where no norm can be so far from the mean.

    Source: Vision transformers need registers (Darcet et al., ICLR 2024), whose threshold is a norm chosen by hand.
    """
    if lengths.shape[1] <= OUTLIER**2 + 1:
        return None
    std, mean = torch.std_mean(lengths, dim=-1, correction=0, keepdim=True)
    return (lengths > mean + OUTLIER * std).to(lengths.dtype).mean(dim=-1)


@measure("embedding", "massive activation", unit="over the median", better=None, geometric=True)
def massive_activation(tokens):
    """Largest absolute value in an image's patch tokens over the median absolute value.

    From 1 for entries of one size; a value is called massive from about 1000 on; means over layers are geometric.

    Source: Massive activations in large language models (Sun et al., COLM 2024).
    """
    sizes = tokens.flatten(start_dim=1).abs()
    return sizes.amax(dim=-1) / median(sizes)


@measure("embedding", "components of 90 % of the variance", unit="principal components", better="higher")
def components_90(variance):
    """Number of principal components that hold 90 % of the variance of all images' patch tokens.

    From 1 to 90 % of D.
    """
    return (variance.cumsum(0) < 0.9 - 1e-9).sum() + 1


@measure("embedding", "stable rank", unit="rank", better="higher")
def stable_rank(variance):
    """Variance of all images' patch tokens over their variance along the first principal axis.

    From 1 for tokens along one line to D for equal variances.

    Source: Stable rank |X|_F^2 / |X|_2^2 (Rudelson and Vershynin 2007) of the centred tokens.
    """
    return 1 / variance[0]


@measure("embedding", "RankMe of mean tokens", unit="rank", better="higher")
def rankme(mean_singular_values, images):
    """exp(H(s / sum s)) of the singular values s (not s^2) of the matrix of all images' mean patch tokens.

    From 1 to min(images, D); none for a single image.

    Source: RankMe (Garrido et al., ICML 2023), without the 1e-7 that it adds to each fraction.
    """
    return effective_rank_of(mean_singular_values) if images > 1 else None


@measure("embedding", "variance within images", unit="fraction of the variance", better=None)
def within_image(images, squares_within_images, squares_between_images):
    """Fraction of the variance of all images' patch tokens that is around the mean token of their image.

    From 0 to 1; with the two below the sum is 1; none for a single image.

    Source: Analysis of variance: sums of squares, which are larger between groups the fewer members they have.
    """
    total = squares_within_images + squares_between_images
    return squares_within_images / total if images > 1 else None


@measure("embedding", "variance between images of a class", unit="fraction of the variance", better=None)
def within_class(squares_within_images, squares_between_images, squares_between_classes):
    """Fraction of the variance of all images' patch tokens that is of the images' means around the mean of their class.

    From 0 to 1; none without labels, with a single class, or without two images of one class.

    Source: As the variance within images.
    """
    if squares_between_classes is None:
        return None
    within_classes = (squares_between_images - squares_between_classes).clamp_min(0)
    return within_classes / (squares_within_images + squares_between_images)


@measure("embedding", "variance between classes", unit="fraction of the variance", better=None)
def between_class(squares_within_images, squares_between_images, squares_between_classes):
    """Fraction of the variance of all images' patch tokens that is of the classes' means around the mean of all.

    From 0 to 1; none without labels, with a single class, or without two images of one class.

    Source: As the variance within images.
    """
    if squares_between_classes is None:
        return None
    return squares_between_classes / (squares_within_images + squares_between_images)


def median(rows: torch.Tensor) -> torch.Tensor:
    """Median over the last axis, the lower of two; NumPy's partition is ten times as fast as torch's on the CPU."""
    if rows.device.type != "cpu":
        return rows.median(dim=-1).values
    middle = (rows.shape[-1] - 1) // 2
    return torch.from_numpy(np.partition(rows.numpy(), middle, axis=-1)[..., middle])
