"""A diversified training step the way one first writes it: plain, dense and slow.

The paper's five terms on a stock timm DeiT, written directly from their formulas, without code of the package. The
tests compare the package with it, and benchmark.py times it. Every block forms its attention maps, every pair of items
its cosine, every patch its target, every weight matrix its Gram matrix. Pairs come out of batched products, and patches
out of `patch_logits[:, p]`, whose backward pass fills a gradient of [B, P, C] for each of them. Under autocast the
losses run in the precision that autocast picks for them.

B images, N tokens, P of them patches, D embed dim, H heads, C classes, L blocks.
"""

from typing import NamedTuple

import torch
from timm.loss import SoftTargetCrossEntropy
from timm.models import VisionTransformer
from torch.nn import functional as F


class Outputs(NamedTuple):
    """What the losses read.

    Attributes:
        logits: [B, C], of the class token.
        patch_logits: [B, P, C], the same head on every patch token.
        first: [B, P, D], patch tokens at the input of the first block.
        last: [B, P, D], patch tokens at the output of the last block, before the final norm.
        attention: [B, H, N, N], softmax maps of the first block, before dropout.
    """

    logits: torch.Tensor
    patch_logits: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor
    attention: torch.Tensor


def knows(model: torch.nn.Module) -> bool:
    """Whether `forward` is written for it."""
    return type(model) is VisionTransformer and model.global_pool == "token"


def forward(model: VisionTransformer, samples: torch.Tensor) -> Outputs:
    """The model's forward pass written out; samples [B, 3, S, S]. The model classifies by one class token."""
    if not knows(model):
        raise TypeError(f"the textbook knows plain ViTs with a class token; got {type(model).__name__}")
    x = model.patch_embed(samples)
    prefix = [token.expand(len(x), -1, -1) for token in (model.cls_token, model.reg_token) if token is not None]
    if model.no_embed_class:
        x = torch.cat([*prefix, x + model.pos_embed], dim=1)
    else:
        x = torch.cat([*prefix, x], dim=1) + model.pos_embed
    x = first = model.norm_pre(model.pos_drop(x))
    maps = []
    for block in model.blocks:
        attended, block_maps = attend(block.attn, block.norm1(x))
        x = x + block.drop_path1(block.ls1(attended))
        x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        maps.append(block_maps)
    logits = model.head(model.head_drop(model.fc_norm(model.norm(x))))
    patches = slice(model.num_prefix_tokens, None)
    return Outputs(logits[:, 0], logits[:, patches], first[:, patches], x[:, patches], maps[0])


def attend(attn, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Self-attention of tokens x [B, N, D]: the new tokens [B, N, D] and the softmax maps [B, H, N, N]."""
    batch, tokens, _ = x.shape
    qkv = attn.qkv(x).reshape(batch, tokens, 3, attn.num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, H, N, D / H] each
    maps = (attn.q_norm(q) * attn.scale @ attn.k_norm(k).mT).softmax(dim=-1)
    x = (attn.attn_drop(maps) @ v).transpose(1, 2).reshape(batch, tokens, -1)
    return attn.proj_drop(attn.proj(attn.norm(x))), maps


def soft_targets(labels, partner, lam, num_classes: int, smoothing: float) -> torch.Tensor:
    """Dense mixtures of two smoothed one-hot labels: labels and partner [B], lam [B, T] -> [B, T, C]."""
    one, other = (
        (1 - smoothing) * F.one_hot(classes, num_classes).to(lam.dtype) + smoothing / num_classes
        for classes in (labels, partner)
    )
    return lam[..., None] * one[:, None] + (1 - lam[..., None]) * other[:, None]


def cross_entropies(logits, patch_logits, labels, partner, lam, patch_lam, smoothing: float):
    """The class token's cross-entropy and the sum of the patch tokens', one patch after the other; 0-dim."""
    criterion = SoftTargetCrossEntropy()
    lams = torch.cat([lam[:, None], patch_lam], dim=1)
    targets = soft_targets(labels, partner, lams, logits.shape[-1], smoothing)
    cls_ce, patch_ce = criterion(logits, targets[:, 0]), 0
    for p in range(patch_lam.shape[1]):
        patch_ce = patch_ce + criterion(patch_logits[:, p], targets[:, 1 + p])
    return cls_ce, patch_ce


def mixing_loss(cls_ce, patch_ce, num_patches: int, coef: float):
    """The classification loss from what `cross_entropies` returns."""
    return (cls_ce + coef * patch_ce) / (1 + coef * num_patches)


def cosines(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Cosine of every pair of items: [B, items, D] twice -> [B, items, items]."""
    return F.normalize(a, dim=-1, eps=1e-8) @ F.normalize(b, dim=-1, eps=1e-8).mT


def emb_cos_within(last: torch.Tensor) -> torch.Tensor:
    """Mean cosine between the patch tokens [B, P, D] of an image; 0-dim."""
    return cosines(last, last).mean()


def emb_contrast_cross(first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """A last token is to resemble its own first token more than the others do: [B, P, D] twice -> 0-dim."""
    return contrast(cosines(first, last))


def contrast(similarity: torch.Tensor) -> torch.Tensor:
    """Mean over i of -log(exp(pos_i) / (exp(pos_i) + exp(neg_i))): [B, items, items] -> 0-dim.

    pos_i is the similarity of i with itself, neg_i the mean of those with the others.
    """
    items = similarity.shape[-1]
    itself = torch.eye(items, dtype=torch.bool, device=similarity.device)
    positive = similarity.diagonal(dim1=1, dim2=2)
    negative = similarity.masked_fill(itself, 0).sum(dim=-1) / (items - 1)
    return F.softplus(negative - positive).mean()


def attn_cos_within(attention: torch.Tensor) -> torch.Tensor:
    """Mean cosine between the flattened maps of an image's heads: [B, H, N, N] -> 0-dim."""
    maps = attention.flatten(start_dim=2)
    return cosines(maps, maps).mean()


def weight_mha_cond_orth(model: VisionTransformer, probes: torch.Tensor | None = None) -> torch.Tensor:
    """Sum over all W = q, k, v of (largest - smallest eigenvalue of W W^T)^2, one power step each; 0-dim.

    `probes`: [2, 3 L, D, 1] start vectors, block by block and q, k, v; uniform on [0, 1) when None.
    """
    weights = [weight for block in model.blocks for weight in block.attn.qkv.weight.chunk(3)]
    total = 0
    for k, weight in enumerate(weights):
        start, fresh = weight.new_empty(2, len(weight), 1).uniform_() if probes is None else probes[:, k]
        gram = weight @ weight.T
        largest = rayleigh_quotient(gram, gram @ start)
        shifted = gram - largest * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        smallest = rayleigh_quotient(shifted, shifted @ fresh) + largest
        total = total + (largest - smallest) ** 2
    return total


def rayleigh_quotient(matrix: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """<A y, y> / <y, y> of A [D, D] and y [D, 1]; 0-dim."""
    return (matrix @ y * y).sum() / (y * y).sum()


def loss(outputs: Outputs, model, labels, partner, lam, patch_lam, coefs: dict, smoothing: float, probes=None):
    """The loss of the step, 0-dim, and the raw value of each of its parts.

    labels, partner [B], lam [B] and patch_lam [B, P] as in a MixedTarget; coefs {"mixing" or one of the four terms:
    coefficient}, all five; probes as in `weight_mha_cond_orth`.
    """
    logits, patches = (outputs.logits, outputs.patch_logits), patch_lam.shape[1]
    cls_ce, patch_ce = cross_entropies(*logits, labels, partner, lam, patch_lam, smoothing)
    classification = mixing_loss(cls_ce, patch_ce, patches, coefs["mixing"])
    terms = {
        "emb_cos_within": emb_cos_within(outputs.last),
        "emb_contrast_cross": emb_contrast_cross(outputs.first, outputs.last),
        "attn_cos_within": attn_cos_within(outputs.attention),
        "weight_mha_cond_orth": weight_mha_cond_orth(model, probes),
    }
    total = classification + sum(coefs[name] * term for name, term in terms.items())
    parts = {"classification": classification, "cls_ce": cls_ce, "mixing": patch_ce / patches} | terms
    return total, {name: part.detach() for name, part in parts.items()}
