"""Accuracy without some of the patch tokens, from the middle block on."""

import contextlib
import math
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ..backbones import Backbone
from ..hooks import ModelHooks
from ..remedies import REMEDIES
from ..similarity import precise
from .ablation import rounded
from .labelled import hits, percent
from .registry import NotMeasured, function_measure

FRACTIONS = tuple(i / 10 for i in range(10))


@function_measure(
    "accuracy with patch tokens dropped",
    None,
    {
        "_50_random": ("half, at random", lambda value: value["random"][5]),
        "_50_similar": ("half, most similar first", lambda value: value["most_similar"][5]),
        "_50_attended": ("half, least attended first", lambda value: _at(value["least_attended"], 5)),
    },
)
def tokens(model, backbone, test, seed):
    """Top-1 accuracy with 0, 10, ... 90 % of an image's patch tokens dropped in front of the middle block L // 2.

    The later blocks and the head see only the others and the prefix tokens. Dropped are random tokens; the most
    similar, which are the last ones when tokens are kept farthest first (the first is the one whose cosine to the mean
    unit token is lowest, each next the one whose highest cosine to a kept one is lowest); or the least attended, to
    which the class token (without one: the mean over all tokens) gives the least attention, mean over heads, in the
    block before.

    Source: Naseer et al. 2021 (random patches), Liang et al. 2022 (attention of the class token), Bolya et al. 2023
    (similar tokens).
    Differs: they drop patches of the image, fuse the dropped tokens, or merge pairs; here tokens are only dropped.
    """
    block = middle_block(model, backbone)
    orders = {
        "random": lambda first, tokens, attention: random_order(seed, first, tokens),
        "most_similar": lambda first, tokens, attention: most_similar_last(tokens),
        "least_attended": lambda first, tokens, attention: attention.argsort(dim=1, descending=True, stable=True),
    }
    if not shows_class_attention(backbone, block - 1):
        del orders["least_attended"]
    right = torch.zeros(len(orders), len(FRACTIONS), dtype=torch.float64, device=test.device)
    for first, images, labels in test:
        seen, attention = seen_tokens(model, backbone, block, images, maps="least_attended" in orders)
        for order, of_order in zip(orders.values(), right, strict=True):
            kept_first = order(first, seen, attention)
            for point, fraction in enumerate(FRACTIONS):
                number = max(1, seen.shape[1] - rounded(fraction * seen.shape[1]))
                with only(backbone, block, kept_first[:, :number].sort(dim=1).values):
                    of_order[point] += hits(model(images), labels)
    accuracies = dict(zip(orders, percent(right, test.count()), strict=True))
    return {"fractions": [*FRACTIONS], "block": block} | {"least_attended": None} | accuracies


def _at(curve: list[float] | None, point: int) -> float | None:
    return None if curve is None else curve[point]


def middle_block(model: nn.Module, backbone: Backbone) -> int:
    """The index of the block in front of which tokens are dropped.

    Raises:
        NotMeasured: the model needs all tokens of its grid, or has no block in the middle.
    """
    biases = [getattr(block.attn, "relative_position_bias_table", None) for block in backbone.blocks]
    biases.append(getattr(model, "rel_pos_bias", None))
    keeps_first = [name for name in getattr(model, "remedies", ()) if "first_values" in REMEDIES[name].reads]
    if hasattr(backbone.blocks[0], "window_size"):
        reason = "its windows need every patch of the grid"
    elif any(bias is not None for bias in biases):
        reason = "its relative position bias needs every patch of the grid"
    elif keeps_first:
        reason = f"its remedy {keeps_first[0]} needs every token of the first block in the later ones"
    elif len(backbone.blocks) < 2:
        reason = "it has a single block"
    elif math.prod(backbone.grid) < 2:
        reason = "it has a single patch"
    else:
        return len(backbone.blocks) // 2
    raise NotMeasured(f"tokens are not dropped: {reason}")


def shows_class_attention(backbone: Backbone, block: int) -> bool:
    """Whether the attention maps of a block can be read, one for each head."""
    attn = backbone.blocks[block].attn
    return isinstance(getattr(attn, "attn_drop", None), nn.Module) and not hasattr(attn, "lambda_init")


def seen_tokens(
    model: nn.Module, backbone: Backbone, block: int, images: torch.Tensor, maps: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The patch tokens [B, P, D] that a block is given, and the attention [B, P] that they got in the block before."""
    seen, prefix = {}, backbone.num_prefix_tokens
    has_class_token = getattr(model, "cls_token", None) is not None

    def see_maps(attention: torch.Tensor):  # [B, H, N, N]
        rows = attention.float().mean(dim=1)
        seen["attention"] = (rows[:, 0] if has_class_token else rows.mean(dim=1))[:, prefix:]

    with ModelHooks() as hooks:
        hooks.on_input(backbone.blocks[block], lambda tokens: seen.update(tokens=backbone.patch_tokens(tokens)))
        if maps:
            hooks.on_maps(backbone.blocks[block - 1].attn, see_maps)
        model(images)
    return seen["tokens"], seen.get("attention")


def random_order(seed: int, first: int, tokens: torch.Tensor) -> torch.Tensor:
    """A random order of the patches for each image, [B, P], which depends on the seed and the image's number."""
    batch, patches = tokens.shape[:2]
    orders = [np.random.default_rng((seed, first + i)).permutation(patches) for i in range(batch)]
    return torch.from_numpy(np.stack(orders)).to(tokens.device)


def most_similar_last(tokens: torch.Tensor) -> torch.Tensor:
    """An order of the tokens [B, P, D] in which each is as far as possible from those before it, [B, P]."""
    unit = F.normalize(precise(tokens), dim=-1)
    images = torch.arange(len(unit), device=unit.device)
    chosen = (unit @ unit.mean(dim=1)[..., None])[..., 0].argmin(dim=1)
    order, highest = [chosen], torch.full(unit.shape[:2], -torch.inf, dtype=unit.dtype, device=unit.device)
    for _ in range(unit.shape[1] - 1):
        highest = torch.maximum(highest, (unit @ unit[images, chosen][..., None])[..., 0])
        highest[images, chosen] = torch.inf  # kept already
        chosen = highest.argmin(dim=1)
        order.append(chosen)
    return torch.stack(order, dim=1)


@contextlib.contextmanager
def only(backbone: Backbone, block: int, kept: torch.Tensor) -> Iterator[None]:
    """From a block on, the model has only its prefix tokens and the patch tokens `kept` [B, P'], in rising order."""
    with contextlib.ExitStack() as hooks:
        for i, module in enumerate(backbone.blocks[block:]):
            hook = partial(_dropped, kept, backbone.num_prefix_tokens if i == 0 else None)
            hooks.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield


def _dropped(kept: torch.Tensor, prefix: int | None, block: nn.Module, args: tuple, kwargs: dict):
    """The inputs of a block: in the first one without the dropped tokens (`prefix` in front), in all without their
    rotary angles, [P, 2 head_dim] or [H, P, 2 head_dim]."""
    tokens, *others = args
    if prefix is not None:
        front = torch.arange(prefix, device=kept.device).expand(len(kept), -1)
        places = torch.cat((front, kept + prefix), dim=1)
        tokens = tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[-1]))
    if kwargs.get("rope") is not None:
        angles = kwargs["rope"][..., kept, :]  # [B, P', ...] or [H, B, P', ...]
        kwargs = kwargs | {"rope": angles[:, None] if angles.dim() == 3 else angles.transpose(0, 1)}
    return (tokens, *others), kwargs
