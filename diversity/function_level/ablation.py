"""Accuracy without some heads, and without a block."""

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from statistics import fmean

import torch
from torch import nn
from torch.nn import functional as F

from ..backbones import Backbone
from ..remedies.applied import FIRST_VALUES
from .labelled import LabelledImages, hits, percent
from .registry import NotMeasured, function_measure

FRACTIONS = tuple(i / 10 for i in range(11))
RANDOM_ORDERS = 3


@function_measure("top-1 accuracy", "higher", {"": ("", lambda value: value["accuracy"])})
def accuracy(model, test):
    """Top-1 accuracy of the complete model on the test images.

    Source: none; the curves below start from it.
    """
    right = sum(hits(model(images), labels) for _, images, labels in test)
    return {"accuracy": percent(right, test.count())}


@function_measure(
    "accuracy with heads removed",
    None,
    {
        "_50": ("half, least important first", lambda value: value["least_important"][5]),
        "_50_random": ("half, in random order", lambda value: value["random"][5]),
    },
)
def heads(model, backbone, test, seed):
    """Top-1 accuracy with 0, 10, ... 100 % of all heads removed, least important first and in random order.

    A removed head's output y_h is 0 before proj. The importance of a head is the increase of the mean cross-entropy
    when it alone is removed, on the images of even number; the accuracies are those on the others. The random curve is
    the mean of three orders.

    Source: Michel et al. 2019 (Are Sixteen Heads Really Better than One?).
    Differs: they order by the gradient of a mask; here the increase itself is measured, on images that the accuracy is
    not measured on.
    """
    with head_masks(backbone) as masks:
        of_heads = [mask[h : h + 1] for mask in masks for h in range(len(mask))]  # views
        importance = _increases(model, test, of_heads)
        generator = torch.Generator().manual_seed(seed)
        orders = [importance.argsort(stable=True).tolist()]
        orders += [torch.randperm(len(of_heads), generator=generator).tolist() for _ in range(RANDOM_ORDERS)]
        removed = [rounded(fraction * len(of_heads)) for fraction in FRACTIONS]
        accuracies = _accuracies(model, test, of_heads, orders, removed)
    least, *random = accuracies
    of_blocks = importance.split([len(mask) for mask in masks])
    return {
        "fractions": [*FRACTIONS],
        "removed": removed,
        "least_important": least,
        "random": [sum(points) / len(points) for points in zip(*random, strict=True)],
        "random_orders": random,
        "importance": [increases.tolist() for increases in of_blocks],
    }


@function_measure(
    "accuracy with a block skipped", None, {"": ("mean over the blocks", lambda value: fmean(value["skipped"]))}
)
def blocks(model, backbone, test):
    """Top-1 accuracy with each block skipped: the tokens that it returns are those that it was given.

    Remedies that read the values of the first block read them also where that block is skipped.

    Source: Veit et al. 2016 (Residual Networks Behave Like Ensembles of Relatively Shallow Networks).
    """
    right = torch.zeros(len(backbone.all_blocks), dtype=torch.float64, device=test.device)
    for _, images, labels in test:
        for i, block in enumerate(backbone.all_blocks):
            with block.register_forward_hook(_input_of):
                right[i] += hits(model(images), labels)
    return {"skipped": percent(right, test.count())}


@contextlib.contextmanager
def head_masks(backbone: Backbone) -> Iterator[list[torch.Tensor]]:
    """Masks [H] of the heads of each block, all 1; a head whose entry is set to 0 adds nothing to the tokens.

    Raises:
        NotMeasured: a block has no linear `attn.proj` that joins heads.
    """
    with contextlib.ExitStack() as hooks:
        masks = []
        for i, block in enumerate(backbone.all_blocks):
            attn = getattr(block, "attn", None)
            proj, num_heads = getattr(attn, "proj", None), getattr(attn, "num_heads", 0)
            if not isinstance(proj, nn.Linear) or not num_heads:
                raise NotMeasured(f"heads are not removed: block {i} has no linear attn.proj behind its heads")
            masks.append(torch.ones(num_heads, dtype=proj.weight.dtype, device=proj.weight.device))
            hooks.enter_context(proj.register_forward_pre_hook(partial(_masked, masks[-1])))
        yield masks


def _masked(mask: torch.Tensor, proj: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
    return (inputs[0].unflatten(-1, (len(mask), -1)) * mask[:, None]).flatten(-2)


def _input_of(block: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
    """The input of a block in place of its output, with the values of the first block that remedies read later."""
    tokens, values = inputs[0], getattr(output, FIRST_VALUES, None)
    if values is not None and not hasattr(tokens, FIRST_VALUES):  # the first block itself, which was computed
        tokens = tokens.view_as(tokens)
        setattr(tokens, FIRST_VALUES, values)
    return tokens


def _increases(model: nn.Module, test: LabelledImages, of_heads: Sequence[torch.Tensor]) -> torch.Tensor:
    """Increase of the mean cross-entropy on images of even number when a head alone is removed, [heads]."""
    losses = torch.zeros(1 + len(of_heads), dtype=torch.float64, device=test.device)
    count = 0
    for images, labels in _half(test, 0):
        count += len(labels)
        losses[0] += _loss(model, images, labels)
        for number, mask in enumerate(of_heads, 1):
            mask.zero_()
            losses[number] += _loss(model, images, labels)
            mask.fill_(1)
    return ((losses[1:] - losses[0]) / count).cpu()


def _loss(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(images).double(), labels, reduction="sum")


def _accuracies(
    model: nn.Module,
    test: LabelledImages,
    of_heads: Sequence[torch.Tensor],
    orders: list[list[int]],
    removed: list[int],
) -> list[list[float]]:
    """Accuracies on images of odd number for each order of heads and each number of removed ones."""
    right = torch.zeros(len(orders), len(removed), dtype=torch.float64, device=test.device)
    count = 0
    for images, labels in _half(test, 1):
        count += len(labels)
        for order, of_order in zip(orders, right, strict=True):
            for point, number in enumerate(removed):
                if number in (0, len(of_heads)) and order is not orders[0]:  # the same heads in every order
                    of_order[point] = right[0, point]
                    continue
                for place, head in enumerate(order):
                    of_heads[head].fill_(float(place >= number))
                of_order[point] += hits(model(images), labels)
    return percent(right, count)


def _half(test: LabelledImages, parity: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Images and labels of even (0) or odd (1) number."""
    for first, images, labels in test:
        start = (first + parity) % 2
        if len(labels[start::2]):
            yield images[start::2], labels[start::2]


def rounded(number: float) -> int:
    """To the nearest integer, halves upwards."""
    return int(number + 0.5 + 1e-9)
