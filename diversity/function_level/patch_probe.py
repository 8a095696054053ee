"""The patch-level probe: which image a patch comes from, read from its final token."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from ..backbones import Backbone, TapError
from .labelled import LabelledImages, hits, percent
from .registry import NotMeasured, function_measure
from .ridge import Ridge


class Mixed(NamedTuple):
    """The two images of each of n pairs, both with the same box of the other; P patches row by row.

    Attributes:
        images: [2n, 3, S, S].
        labels: [2n, P], of the image that a patch comes from.
        is_pasted: [2n, P], whether a patch comes from the partner.
    """

    images: torch.Tensor
    labels: torch.Tensor
    is_pasted: torch.Tensor


@function_measure(
    "patch probe accuracy",
    "higher",
    {
        "": ("all patches", lambda value: value["all"]),
        "_pasted": ("pasted patches", lambda value: value["pasted"]),
        "_head": ("the model's own head", lambda value: value["head"]),
        "_image": ("the class of the complete image", lambda value: value["image"]),
    },
    needs_head=False,
)
def patch_probe(model, backbone, test, num_classes, seed):
    """Accuracy of a ridge regression from a patch's final token to the label of the image that the patch comes from.

    Test images 2k and 2k + 1 are a pair; both get the same box of the other. A box is a rectangle of complete patches,
    1 to rows - 1 high and 1 to columns - 1 wide, sizes and place uniform, so that no patch is cut. The map is fitted on
    even pairs, the accuracies are those on odd ones: over all patches, over the pasted ones, and of the model's own
    head on every patch. A final token is what the head would classify, after the last norm. What needs no knowledge of
    places: `image` and `image_pasted` give each patch the model's class of the complete mixed image, `majority` the
    label of most patches of its image, `chance` the most frequent label.

    Source: the boxes of CutMix (Yun et al. 2019); the probe is this project's.
    Differs: boxes of CutMix have any size in pixels and may be cut by the border of the image.
    """
    head, ridge = patch_head(model, backbone), None
    for mixed in mixed_pairs(test, backbone.grid, seed, parity=0):
        tokens = final_tokens(model, backbone, mixed.images)
        ridge = ridge or Ridge(tokens.shape[-1], num_classes, tokens.device)
        ridge.add(tokens.flatten(0, 1), mixed.labels.flatten())
    if ridge is None or test.count() < 4:
        raise NotMeasured("the patch probe needs four images")
    weights, bias = ridge.fit()
    names = ("all", "pasted", "head", "image", "image_pasted", "majority")
    right = {name: torch.zeros((), dtype=torch.float64, device=test.device) for name in names}
    of_classes, num_pasted = torch.zeros(num_classes, dtype=torch.float64, device=test.device), 0
    for mixed in mixed_pairs(test, backbone.grid, seed, parity=1):
        tokens = final_tokens(model, backbone, mixed.images)
        logits = tokens.double() @ weights + bias
        right["all"] += hits(logits, mixed.labels)
        right["pasted"] += hits(logits[mixed.is_pasted], mixed.labels[mixed.is_pasted])
        if head:
            of_image = model(mixed.images)[:, None].expand(-1, mixed.labels.shape[1], -1)
            right["head"] += hits(head(tokens), mixed.labels)
            right["image"] += hits(of_image, mixed.labels)
            right["image_pasted"] += hits(of_image[mixed.is_pasted], mixed.labels[mixed.is_pasted])
        of_images = of_classes.new_zeros(len(mixed.labels), num_classes)
        of_images.scatter_add_(1, mixed.labels, torch.ones_like(mixed.labels, dtype=torch.float64))
        right["majority"] += of_images.max(dim=1).values.sum()
        of_classes += of_images.sum(dim=0)
        num_pasted += int(mixed.is_pasted.sum())
    num_patches = int(of_classes.sum())
    if right["majority"] == num_patches:
        raise NotMeasured("the patch probe needs pairs of two labels: give the images in a random order")
    accuracies = {key: percent(count, num_pasted if "pasted" in key else num_patches) for key, count in right.items()}
    if not head:
        accuracies |= dict.fromkeys(("head", "image", "image_pasted"))
    return accuracies | {"chance": percent(of_classes.max(), num_patches), "patches": num_patches}


def patch_head(model: nn.Module, backbone: Backbone) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The model's linear classifier; None where it cannot classify a patch token."""
    try:
        backbone.require_patch_head()
    except TapError:
        return None
    return model.get_submodule(backbone.head[-1])


def final_tokens(model: nn.Module, backbone: Backbone, images: torch.Tensor) -> torch.Tensor:
    """The patch tokens [B, P, D] as the classifier would read them.

    Raises:
        NotMeasured: the model returns other tokens than those of its grid.
    """
    tokens = backbone.patch_tokens(model.forward_features(images))
    if tokens.shape[1] != backbone.grid[0] * backbone.grid[1]:
        raise NotMeasured(f"the patch probe needs the tokens of a grid of {backbone.grid}; there are {tokens.shape[1]}")
    for name in backbone.head[:-1]:
        tokens = model.get_submodule(name)(tokens)
    return tokens


def mixed_pairs(test: LabelledImages, grid: tuple[int, int], seed: int, parity: int) -> Iterator[Mixed]:
    """The mixed images of the pairs whose number is even (parity 0) or odd (1).

    Raises:
        NotMeasured: a patch of this grid is not a rectangle of pixels, or the only one.
    """
    number, left = 0, None  # of the next pair; an image that waits for its partner
    for _, images, labels in test:
        if left is not None:
            images, labels = torch.cat((left[0], images)), torch.cat((left[1], labels))
        of_pairs = len(labels) // 2 * 2
        left = (images[of_pairs:], labels[of_pairs:]) if of_pairs < len(labels) else None
        chosen = slice((parity - number) % 2, None, 2)
        numbers = range(number, number + of_pairs // 2)[chosen]
        if numbers:
            images, labels = (x[:of_pairs].unflatten(0, (-1, 2))[chosen] for x in (images, labels))
            boxes = torch.stack([box(grid, seed, pair) for pair in numbers]).to(labels.device)
            yield mix(images, labels, boxes)
        number += of_pairs // 2


def box(grid: tuple[int, int], seed: int, pair: int) -> torch.Tensor:
    """Which patches of a grid are in the box of a pair, boolean [rows, columns].

    Raises:
        NotMeasured: there is one patch.
    """
    if grid[0] * grid[1] < 2:
        raise NotMeasured("the patch probe needs two patches; the model has one")
    generator, inside = np.random.default_rng((seed, pair)), []
    for length in grid:
        size = int(generator.integers(1, max(2, length)))
        start = int(generator.integers(0, length - size + 1))
        inside.append((torch.arange(length) >= start) & (torch.arange(length) < start + size))
    return inside[0][:, None] & inside[1]


def mix(images: torch.Tensor, labels: torch.Tensor, boxes: torch.Tensor) -> Mixed:
    """Pairs of images [n, 2, 3, S, S] with labels [n, 2] and boxes [n, rows, columns] -> both mixed images of each."""
    scales = [side / length for side, length in zip(images.shape[-2:], boxes.shape[1:], strict=True)]
    if any(scale != int(scale) for scale in scales):
        raise NotMeasured(f"the patch probe needs patches of complete pixels; a patch is {scales[0]} x {scales[1]}")
    pixels = boxes.repeat_interleave(int(scales[0]), dim=1).repeat_interleave(int(scales[1]), dim=2)
    mixed = torch.where(pixels[:, None, None], images.flip(1), images)
    patches = boxes.flatten(1)[:, None]  # [n, 1, P]
    of_patches = torch.where(patches, labels.flip(1)[..., None], labels[..., None])
    return Mixed(mixed.flatten(0, 1), of_patches.flatten(0, 1), patches.expand_as(of_patches).flatten(0, 1))
