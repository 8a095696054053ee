"""The formulas as a textbook writes them: double loops and dense matrices, float64, without code of the package.

The paper's five terms are those of benchmarks/textbook_step.py, which are written in the same way.

`TEXTBOOK` holds one function for every term of the registry, under the term's name, with the taps as keywords. Terms
with random start vectors take them as `probes`, and options under the names that they have there.
"""

import torch

from benchmarks import textbook_step
from benchmarks.textbook_step import (
    attn_cos_within,
    contrast,
    cosines,
    emb_contrast_cross,
    emb_cos_within,
    rayleigh_quotient,
    soft_targets,
)

OPTION_VALUES = {
    "cond_orth_steps": 3,
    "cond_orth_exact": True,
    "cond_orth_normalize": True,
    "mhs_collapse_aware": True,
}
"""A value other than the default for every option of a term."""


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def flat(attention):
    """[B, H, N, N] -> a [H, N * N] matrix for each image."""
    return [maps.reshape(len(maps), -1) for maps in attention]


def pairs(matrix):
    """Entries (i, j) of a square matrix with i != j."""
    return [matrix[i, j] for i in range(len(matrix)) for j in range(len(matrix)) if i != j]


def cos(a, b):
    return cosines(a, b).mean()


def abscos(a, b):
    return cosines(a, b).abs().mean()


def soft_orthogonality(gram):
    return sum((gram[i, j] - float(i == j)) ** 2 for i in range(len(gram)) for j in range(len(gram)))


def mhs(items, mhs_collapse_aware=False):
    closest = torch.stack([2 - 2 * cosine for cosine in pairs(cosines(items, items))]).min()
    return -closest.sqrt() if mhs_collapse_aware else -closest


def mgd(items):
    kernel = torch.exp(-(2 - 2 * cosines(items, items)))
    return -torch.logdet(kernel + 1e-6 * torch.eye(len(items), dtype=kernel.dtype))


def rayleigh(matrix, x, eps):
    """<A x, x> / (<x, x> + eps)."""
    squared = (x * x).sum()
    return rayleigh_quotient(matrix, x) * squared / (squared + eps)


def spread(gram, start, eps=0.0, cond_orth_steps=1, cond_orth_exact=False):
    """Largest minus smallest eigenvalue: exact, or one power step from the two start vectors of `start`.

    With k steps the start vectors first take k - 1 steps as constants; the second one's are on the matrix that is
    shifted by what the first one, k - 1 steps on, says of the largest eigenvalue.
    """
    if cond_orth_exact:
        eigenvalues = torch.linalg.eigvalsh(gram)
        return eigenvalues[-1] - eigenvalues[0]
    identity = torch.eye(len(gram), dtype=gram.dtype)
    constant, (x, z) = gram.detach(), start
    for _ in range(cond_orth_steps - 1):
        x = constant @ x / (constant @ x).norm()
    constant = constant - rayleigh(constant, x, eps) * identity
    for _ in range(cond_orth_steps - 1):
        z = constant @ z / (constant @ z).norm()
    largest = rayleigh(gram, gram @ x, eps)
    shifted = gram - largest * identity
    smallest = rayleigh(shifted, shifted @ z, eps) + largest
    return largest - smallest


def feature_cond_orth(grams, probes, **options):
    return mean(spread(gram, probes[:, b], eps=1e-6, **options) ** 2 for b, gram in enumerate(grams))


def weight_cond_orth(weights, probes, cond_orth_normalize=False, **options):
    spreads = [spread(w @ w.T, probes[:, k], **options) for k, w in enumerate(weights)]
    if cond_orth_normalize:
        return mean((value / min(weights[0].shape)) ** 2 for value in spreads)
    return sum(value**2 for value in spreads)


def koleo(items):
    units = [x / x.norm() for x in items]
    nearest = [min((x - y).norm() for j, y in enumerate(units) if j != i) for i, x in enumerate(units)]
    return -mean((distance + 1e-4).log() for distance in nearest)


def uniformity(items):
    units = [x / x.norm() for x in items]
    squares = [((units[i] - units[j]) ** 2).sum() for i in range(len(units)) for j in range(i)]
    return mean((-2 * square).exp() for square in squares).log()


def coding_rate(items):
    count, width = items.shape
    units = torch.stack([x / x.norm() for x in items])
    covariance = sum(torch.outer(x, x) for x in units)
    return torch.logdet(torch.eye(width, dtype=items.dtype) + width / (count * 0.5**2) * covariance) / 2


def vcreg(tokens):
    """25 times the mean hinge of the channels' standard deviations, plus the squared covariances over their number."""
    width = len(tokens[0])
    channels = torch.stack([width**0.5 * x / x.norm() for x in tokens]).T
    centred = [channel - channel.mean() for channel in channels]
    covariances = [[(a * b).mean() for b in centred] for a in centred]
    hinges = [max(torch.zeros_like(v), 1 - (v + 1e-4).sqrt()) for v in (covariances[i][i] for i in range(width))]
    squares = [covariances[i][j] ** 2 for i in range(width) for j in range(width) if i != j]
    return 25 * mean(hinges) + sum(squares) / width


def dense(circuits):
    """[M, H, 2, hd, D] -> a [H, D * D] matrix for each of the M: the circuits left^T right of its heads."""
    return [torch.stack([(left.T @ right).flatten() for left, right in heads]) for heads in circuits]


def grad_diversity(grad):
    return -sum((g * g).sum() for g in grad) / (sum(grad) * sum(grad)).sum()


def mean_of(function, *taps, **options):
    """Mean over the images of a function of each image's items."""
    return mean(function(*items, **options) for items in zip(*taps, strict=True))


TEXTBOOK = {
    "emb_cos_within": emb_cos_within,
    "emb_abscos_within": lambda last: mean_of(abscos, last, last),
    "emb_offdiag_cos_within": lambda last: mean_of(lambda x: mean(pairs(cosines(x, x))), last),
    "emb_offdiag_abscos_within": lambda last: mean_of(lambda x: mean(pairs(cosines(x, x).abs())), last),
    "emb_cos_cross": lambda first, last: mean_of(cos, first, last),
    "emb_abscos_cross": lambda first, last: mean_of(abscos, first, last),
    "emb_contrast_cross": emb_contrast_cross,
    "emb_dot_contrast_cross": lambda first, last: contrast(first @ last.mT),
    "emb_so": lambda last: mean_of(lambda x: soft_orthogonality(cosines(x, x)), last),
    "emb_cond_orth": lambda last, probes, **options: feature_cond_orth(
        [cosines(x, x) for x in last], probes, **options
    ),
    "emb_mhs": lambda last, **options: mean_of(mhs, last, **options),
    "emb_mgd": lambda last: mean_of(mgd, last),
    "emb_grad_diversity": lambda grad: mean_of(grad_diversity, grad),
    "attn_cos_within": attn_cos_within,
    "attn_abscos_within": lambda attention: mean_of(abscos, flat(attention), flat(attention)),
    "attn_offdiag_cos_within": lambda attention: mean_of(lambda x: mean(pairs(cosines(x, x))), flat(attention)),
    "attn_cos_cross": lambda attention_first, attention_last: mean_of(cos, flat(attention_first), flat(attention_last)),
    "attn_abscos_cross": lambda attention_first, attention_last: mean_of(
        abscos, flat(attention_first), flat(attention_last)
    ),
    "attn_contrast_cross": lambda attention_first, attention_last: contrast(
        cosines(attention_first.flatten(2), attention_last.flatten(2))
    ),
    "attn_so": lambda attention: mean_of(lambda x: soft_orthogonality(x @ x.T), flat(attention)),
    "attn_cond_orth": lambda attention, probes, **options: feature_cond_orth(
        [x @ x.T for x in flat(attention)], probes, **options
    ),
    "attn_mhs": lambda attention, **options: mean_of(mhs, flat(attention), **options),
    "attn_mgd": lambda attention: mean_of(mgd, flat(attention)),
    "weight_mha_cond_orth": weight_cond_orth,
    "weight_mha_cond_orth_in": lambda weights, **options: weight_cond_orth([w.T for w in weights], **options),
    "weight_mha_so": lambda weights: sum(soft_orthogonality(w @ w.T) for w in weights),
    "weight_mha_mhs": lambda weights, **options: sum(mhs(w, **options) for w in weights),
    "weight_mha_mgd": lambda weights: sum(mgd(w) for w in weights),
    "emb_koleo": lambda last: mean_of(koleo, last),
    "emb_uniformity": lambda last: mean_of(uniformity, last),
    "emb_coding_rate": lambda last: -mean_of(coding_rate, last),
    "attn_koleo": lambda attention: mean_of(koleo, flat(attention)),
    "attn_uniformity": lambda attention: mean_of(uniformity, flat(attention)),
    "attn_coding_rate": lambda attention: -mean_of(coding_rate, flat(attention)),
    "weight_mha_koleo": lambda weights: sum(koleo(w) for w in weights),
    "weight_mha_uniformity": lambda weights: sum(uniformity(w) for w in weights),
    "weight_mha_coding_rate": lambda weights: -sum(coding_rate(w) for w in weights),
    "emb_vcreg": lambda last: vcreg([token for tokens in last for token in tokens]),
    "weight_circuit_abscos": lambda circuits: mean_of(lambda x: mean(pairs(cosines(x, x).abs())), dense(circuits)),
    "weight_circuit_koleo": lambda circuits: mean_of(koleo, dense(circuits)),
    "weight_circuit_uniformity": lambda circuits: mean_of(uniformity, dense(circuits)),
    "weight_circuit_coding_rate": lambda circuits: -mean_of(coding_rate, dense(circuits)),
}


def token_cross_entropy(logits, labels, partner, lam, smoothing):
    """[B, T] cross-entropies against the dense targets."""
    targets = soft_targets(labels, partner, lam, logits.shape[-1], smoothing)
    return -(targets * torch.log(torch.softmax(logits, dim=-1))).sum(dim=-1)


def mixing_loss(logits, patch_logits, labels, partner, lam, patch_lam, smoothing, coef):
    """(CE_cls + c * sum_p CE_p) / (1 + c * P), averaged over the images."""
    ces = textbook_step.cross_entropies(logits, patch_logits, labels, partner, lam, patch_lam, smoothing)
    return textbook_step.mixing_loss(*ces, patch_lam.shape[1], coef)


def mixing_loss_of_cut_images(logits, patch_logits, target, smoothing, coef, balance):
    """Mean over the images of their classification loss: CE_cls alone where all patches have the same label."""
    losses = []
    for b in range(len(logits)):
        labels = target.labels[b : b + 1], target.partner[b : b + 1]
        (cls_ce,) = token_cross_entropy(logits[None, b : b + 1], *labels, target.lam[b][None, None], smoothing)[0]
        if len(set(target.patch_lam[b].tolist())) == 1:
            losses.append(cls_ce)
            continue
        patches = [
            token_cross_entropy(patch_logits[None, b, p : p + 1], *labels, patch_lam[None, None], smoothing)[0, 0]
            for p, patch_lam in enumerate(target.patch_lam[b])
        ]
        weight = coef if balance == "tokens" else coef / len(patches)
        losses.append((cls_ce + weight * sum(patches)) / (1 + weight * len(patches)))
    return mean(losses)
