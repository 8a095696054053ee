"""What can be read from the features of each layer: k-NN and a linear map, fitted on training images."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn import functional as F

from ..backbones import Backbone
from ..hooks import ModelHooks
from ..similarity import precise
from .labelled import hits, percent
from .registry import function_measure
from .ridge import Ridge

NEIGHBOURS, TEMPERATURE = 20, 0.07
LAST = {"_last": ("last layer", lambda value: value["layers"][-1])}

Features = list[torch.Tensor | None]
"""Of some images, [B, D] for each layer; None for a layer that has the same for all images."""


@function_measure("k-NN accuracy", "higher", LAST, needs_head=False)
def knn(model, backbone, train, test, num_classes):
    """Top-1 accuracy of a vote of the 20 training images whose features have the highest cosine with a test image's.

    A neighbour's class gets exp(cosine / 0.07). Features of the last layer are the input of the classifier; those of
    the others are the class token of the block's output (without one that the head reads: the mean of its patch tokens)
    minus its mean over its standard deviation. Layer 0 is the input of block 0, where a class token says nothing.

    Source: Wu et al. 2018, with the settings of DINO (Caron et al. 2021).
    """
    with layer_features(model, backbone) as features:
        chunks = [(_units(features(images)), labels) for _, images, labels in test]
        labels = torch.cat([of_chunk for _, of_chunk in chunks])
        queries = [_joined(layer) for layer in zip(*(units for units, _ in chunks), strict=True)]
        nearest = [None if layer is None else Nearest(layer) for layer in queries]
        for _, images, of_bank in train:
            for layer, units in zip(nearest, _units(features(images)), strict=True):
                if layer is not None:
                    layer.add(units, of_bank)
    votes = [None if layer is None else layer.votes(num_classes) for layer in nearest]
    return {"layers": [None if vote is None else percent(hits(vote, labels), len(labels)) for vote in votes]}


@function_measure("linear probe accuracy", "higher", LAST, needs_head=False)
def probe(model, backbone, train, test, num_classes):
    """Top-1 accuracy of a ridge regression onto one-hot labels, fitted in closed form on the training images.

    The features of a layer are those of `knn`. The penalty is 0.01 times the mean variance of a feature.

    Source: Alain and Bengio 2016 (linear classifier probes).
    Differs: a squared error in closed form in place of logistic regression.
    """
    with layer_features(model, backbone) as features:
        ridges = None
        for _, images, labels in train:
            layers = features(images)
            ridges = ridges or [x if x is None else Ridge(x.shape[1], num_classes, x.device) for x in layers]
            for ridge, layer in zip(ridges, layers, strict=True):
                if ridge is not None:
                    ridge.add(layer, labels)
        maps = [None if ridge is None else ridge.fit() for ridge in ridges]
        right = [None if fitted is None else 0 for fitted in maps]
        for _, images, labels in test:
            for i, layer in enumerate(features(images)):
                if maps[i] is not None:
                    weights, bias = maps[i]
                    right[i] = right[i] + hits(layer.double() @ weights + bias, labels)
    return {"layers": [None if count is None else percent(count, test.count()) for count in right]}


@contextlib.contextmanager
def layer_features(model: nn.Module, backbone: Backbone) -> Iterator[Callable[[torch.Tensor], Features]]:
    """A function from images to the features of each layer, from the input of block 0 to that of the classifier."""
    reads_class_token = getattr(model, "global_pool", None) == "token" and getattr(model, "cls_token", None) is not None
    layers: Features = []

    def see(tokens: torch.Tensor):
        pooled = tokens[:, 0] if reads_class_token else backbone.patch_tokens(tokens).mean(dim=1)
        layers.append(F.layer_norm(precise(pooled), pooled.shape[-1:]))

    def features(images: torch.Tensor) -> Features:
        layers.clear()
        if reads_class_token:
            layers.append(None)
        model(images)
        return [*layers]

    with ModelHooks() as hooks:
        if not reads_class_token:
            hooks.on_input(backbone.all_blocks[0], see)
        for block in backbone.all_blocks[:-1]:
            hooks.on_output(block, see)
        classifier = model.get_submodule(backbone.head[-1])
        hooks.on_input(classifier, lambda pooled: layers.append(precise(pooled)))
        yield features


class Nearest:
    """The training images nearest to each query, from a stream; memory does not grow with their number."""

    def __init__(self, queries: torch.Tensor):
        self.queries = queries
        self.cosines = queries.new_empty(len(queries), 0)
        self.labels = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)

    def add(self, units: torch.Tensor, labels: torch.Tensor):
        """Further training images: unit features [n, D] and labels [n]."""
        cosines = torch.cat((self.cosines, self.queries @ units.mT), dim=1)
        of_all = torch.cat((self.labels, labels.expand(len(self.queries), -1)), dim=1)
        self.cosines, places = cosines.topk(min(NEIGHBOURS, cosines.shape[1]), dim=1)
        self.labels = of_all.gather(1, places)

    def votes(self, num_classes: int) -> torch.Tensor:
        """Of each query for each class, [n, C]."""
        weights = ((self.cosines - 1) / TEMPERATURE).exp()
        return weights.new_zeros(len(weights), num_classes).scatter_add_(1, self.labels, weights)


def _units(features: Features) -> Features:
    return [None if layer is None else F.normalize(layer, dim=1) for layer in features]


def _joined(chunks: tuple[torch.Tensor | None, ...]) -> torch.Tensor | None:
    return None if chunks[0] is None else torch.cat(chunks)
