"""The formulas as a textbook writes them: double loops and dense matrices, float64, no shared code with the package.

`TEXTBOOK` holds one function for every term of the registry, under the term's name, with the taps as keywords. Terms
with random start vectors take them as `probes`.
"""

import torch


def cosines(a, b):
    """Dense [len(a), len(b)] matrix of cosines between the rows, x^ = x / max(|x|, 1e-8)."""

    def unit(x):
        return torch.stack([row / torch.linalg.vector_norm(row).clamp(min=1e-8) for row in x])

    return unit(a) @ unit(b).T


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def emb_cos_within(last):
    return mean(mean(row.mean() for row in cosines(tokens, tokens)) for tokens in last)


def emb_contrast_cross(first, last):
    values = []
    for first_tokens, last_tokens in zip(first, last, strict=True):
        cosine = cosines(first_tokens, last_tokens)
        for i in range(len(cosine)):
            negative = mean(cosine[i, j] for j in range(len(cosine)) if j != i)
            values.append(-torch.log(torch.exp(cosine[i, i]) / (torch.exp(cosine[i, i]) + torch.exp(negative))))
    return mean(values)


def attn_cos_within(attention):
    values = []
    for maps in attention:
        cosine = cosines(maps.flatten(1), maps.flatten(1))
        values += [cosine[h, other] for h in range(len(maps)) for other in range(len(maps))]
    return mean(values)


def rayleigh(matrix, x):
    """<G y, y> / <y, y> for y = G x."""
    y = matrix @ x
    return ((matrix @ y) * y).sum() / (y * y).sum()


def weight_mha_cond_orth(weights, probes):
    total = 0.0
    for k in range(len(weights)):
        gram = weights[k] @ weights[k].T
        largest = rayleigh(gram, probes[0, k])
        smallest = rayleigh(gram - largest * torch.eye(len(gram), dtype=gram.dtype), probes[1, k]) + largest
        total = total + (largest - smallest) ** 2
    return total


TEXTBOOK = {
    "emb_cos_within": emb_cos_within,
    "emb_contrast_cross": emb_contrast_cross,
    "attn_cos_within": attn_cos_within,
    "weight_mha_cond_orth": weight_mha_cond_orth,
}


def soft_targets(labels, partner, lam, num_classes, smoothing):
    """Dense [B, T, C] targets: a mixture of two one-hot labels, smoothed towards the uniform distribution."""
    targets = torch.full((*lam.shape, num_classes), smoothing / num_classes, dtype=torch.float64)
    for b in range(lam.shape[0]):
        for t in range(lam.shape[1]):
            targets[b, t, labels[b]] += (1 - smoothing) * lam[b, t]
            targets[b, t, partner[b]] += (1 - smoothing) * (1 - lam[b, t])
    return targets


def token_cross_entropy(logits, labels, partner, lam, smoothing):
    """[B, T] cross-entropies against the dense targets."""
    targets = soft_targets(labels, partner, lam, logits.shape[-1], smoothing)
    return -(targets * torch.log(torch.softmax(logits, dim=-1))).sum(dim=-1)


def mixing_loss(logits, patch_logits, labels, partner, lam, patch_lam, smoothing, coef):
    """(CE_cls + c * sum_p CE_p) / (1 + c * P), averaged over the images."""
    cls_ce = token_cross_entropy(logits[:, None], labels, partner, lam[:, None], smoothing)
    patch_ce = token_cross_entropy(patch_logits, labels, partner, patch_lam, smoothing)
    patches = patch_ce.shape[1]
    return mean((cls_ce[b, 0] + coef * patch_ce[b].sum()) / (1 + coef * patches) for b in range(len(logits)))
