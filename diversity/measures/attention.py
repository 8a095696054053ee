"""Measures of attention, block by block."""

import torch

from .registry import measure


@measure("attention", "head cosine", unit="cosine", better="lower")
def head_cosine(maps, mean_map):
    """Mean cosine of the flattened attention maps of two different heads.

    From 0 for heads that attend to different tokens to 1 for equal maps.
    """
    heads = maps.shape[1]
    return (heads * mean_map.square().sum(dim=-1) - 1) / (heads - 1) if heads > 1 else None


@measure("attention", "cosine of heads' outputs", unit="cosine", better="lower")
def head_output_cosine(head_gram):
    """Mean cosine of what two different heads add to the tokens, y_h W_O^h, flattened over the tokens.

    From -1 / (H - 1) to 1; 1 for heads that add the same, 0 for orthogonal outputs. LayerScale is left out.

    Source: Unlike maps and values, the products do not depend on the basis in which a head computes.
    """
    heads = head_gram.shape[-1]
    if heads < 2:
        return None
    inverse = head_gram.diagonal(dim1=-2, dim2=-1).clamp_min(1e-16).rsqrt()
    cosines = head_gram * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)
    same = cosines.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    return (cosines.sum(dim=(-2, -1)) - same) / (heads * (heads - 1))


@measure("attention", "standard deviation of a row", unit="standard deviation", better=None)
def row_std(maps):
    """Mean standard deviation of a token's attention row.

    From 0 for uniform attention to about 1 / sqrt(N) for attention to one token.
    """
    centred = maps - maps.mean(dim=-1, keepdim=True)
    return torch.linalg.vector_norm(centred, dim=-1).mean(dim=(-2, -1)) / maps.shape[-1] ** 0.5


@measure("attention", "entropy of a row in nats", unit="nats", better=None)
def row_entropy(maps):
    """Mean entropy of a token's attention row.

    From 0 for attention to one token to log N for uniform attention.
    """
    logarithms = (maps + torch.finfo(maps.dtype).tiny).log_()  # 0 log 0 is 0
    return -logarithms.mul_(maps).sum(dim=-1).mean(dim=(-2, -1))


@measure("attention", "attention distance", unit="patches", better=None)
def attention_distance(maps, distances):
    """Mean distance of a patch to the patches it attends to, weighted by its attention to them.

    From 0 for attention to itself to the diagonal of the grid; a Swin's grid is the window. Prefix tokens are left out.

    Source: Dosovitskiy et al., ICLR 2021 (their figure 7), and Raghu et al., NeurIPS 2021, in patches and not pixels.
    """
    if distances is None:
        return None
    prefix = maps.shape[-1] - len(distances)
    to_patches = maps[..., prefix:, prefix:]
    return ((to_patches * distances).sum(dim=-1) / to_patches.sum(dim=-1)).mean(dim=(-2, -1))


@measure("attention", "attention sink", unit="attention", better=None)
def attention_sink(maps):
    """Attention that the token which a head attends to most receives from all tokens, mean over tokens and heads.

    From 1 / N for uniform attention to 1 where every token attends to one and the same; prefix tokens are tokens.

    Source: Attention sinks (Xiao et al., ICLR 2024), which are first tokens there and any token here.
    """
    return maps.mean(dim=-2).amax(dim=-1).mean(dim=-1)


@measure("attention", "cosine to the block before", unit="cosine", better="lower")
def previous_cosine(mean_map, previous):
    """Mean cosine of the flattened map of a head and each map of the block before; in a Swin only of the same windows.

    From 0 to 1; 1 where all maps of both blocks are equal.
    """
    return None if previous is None else (previous * mean_map).sum(dim=-1)
