"""Measures of what a model computes on images: hooks that pass tokens, maps and units on, and what is kept of them."""

import math
from collections.abc import Callable, Collection, Iterable

import torch
from torch import nn

from ..backbones import Backbone
from ..block_parts import activation_of, attention_of, has_padding
from ..hooks import ModelHooks
from ..similarity import precise
from . import inputs
from .cka import LayerSimilarity
from .registry import chosen
from .sums import LabelCounts, TokenSums


def numbers(values: Iterable[torch.Tensor | None]) -> list[float | None]:
    """The values as numbers; None in place of one that is not finite, as the ratio of two zeros."""
    values = [*values]
    known = [value.double() for value in values if value is not None]
    known = iter(torch.stack(known).tolist() if known else ())
    found = [None if value is None else next(known) for value in values]
    return [number if number is not None and math.isfinite(number) else None for number in found]


class Meter:
    """Running sums of every layer and block, filled by hooks while the model runs."""

    def __init__(self, backbone: Backbone, num_classes: int, extra: Collection[str] = ()):
        self.backbone, self.num_classes, self.extra = backbone, num_classes, extra
        self.blocks = backbone.all_blocks
        depth = len(self.blocks)
        self.images, self.label_counts = 0, None
        self.layers = {"embedding": depth + 1, "attention": depth, "mlp": depth}
        self.sums = {level: [{} for _ in range(layers)] for level, layers in self.layers.items()}
        self.tokens = [TokenSums() for _ in range(depth + 1)]
        self.similarity = LayerSimilarity(depth + 1)
        self.maxima: list[torch.Tensor | None] = [None] * depth
        self._distances, self._projections = {}, {}

    def begin(self, samples: torch.Tensor, labels: torch.Tensor | None):
        """Count a chunk of images that the model is about to see, and forget what the last one left to compare with."""
        self.images += len(samples)
        self.chunk = len(samples)
        self.grid = self.backbone.grid_of(samples)
        self.first, self.before, self.previous = None, None, (None, None)
        self.labels = None
        if labels is not None:
            if self.label_counts is None:
                self.label_counts = LabelCounts(self.num_classes, samples.device)
            self.labels = self.label_counts.add(labels.to(samples.device, torch.int64, non_blocking=True))

    def hook(self, hooks: ModelHooks):
        """Measure what the model computes from now on."""
        for i, block in enumerate(self.blocks):
            hooks.on_input(block, self._see(self.add_input, i))
            hooks.on_output(block, self._see(self.add_output, i))
            if not has_padding(block):
                attn = attention_of(block)
                hooks.on_maps(attn, self._see(self.add_maps, i))
                if isinstance(getattr(attn, "proj", None), nn.Linear):
                    hooks.on_input(attn.proj, self._see(self.add_heads, i))
            if (activation := activation_of(block)) is not None:
                hooks.on_output(activation, self._see(self.add_units, i))

    @staticmethod
    def _see(add: Callable[[int, torch.Tensor], None], i: int) -> Callable[[torch.Tensor], None]:
        """What a hook calls: `add` in full precision, also where the model runs under autocast."""

        def see(tensor: torch.Tensor):
            with torch.autocast(tensor.device.type, enabled=False):
                add(i, precise(tensor))

        return see

    def add_input(self, i: int, tokens: torch.Tensor):
        """The input of block i."""
        tokens = self.backbone.patch_tokens(tokens)
        if i == 0 or tokens.shape != self.first.shape:  # another stage of a Swin: other patches
            self.first = tokens
        if i == 0:
            self._add_tokens(0, tokens)
        self.before = tokens

    def add_output(self, i: int, tokens: torch.Tensor):
        """The output of block i."""
        self._add_tokens(i + 1, self.backbone.patch_tokens(tokens))

    def _add_tokens(self, layer: int, tokens: torch.Tensor):
        chunk = inputs.ChunkTokens(tokens, self.first, self.before)
        self._add("embedding", layer, chunk)
        self.tokens[layer].add(chunk, self.labels, self.num_classes + 1)
        self.similarity.add(layer, chunk.mean)

    def add_maps(self, i: int, maps: torch.Tensor):
        """The maps [B, H, N, N] of block i; they are compared with those before if both are of one window."""
        windows = (maps.shape[0], maps.shape[-1], getattr(self.blocks[i], "shift_size", None))
        previous, previous_windows = self.previous
        chunk = inputs.ChunkMaps(maps, previous if windows == previous_windows else None, self._grid(i, maps))
        self._add("attention", i, chunk)
        self.previous = chunk.mean_map, windows

    def add_heads(self, i: int, outputs: torch.Tensor):
        """The input [B, N, D] of the output projection of block i."""
        attn = attention_of(self.blocks[i])
        if i not in self._projections:
            weight = attn.proj.weight.double()
            self._projections[i] = (weight.mT @ weight).to(outputs.dtype)
        self._add("attention", i, inputs.ChunkHeads(outputs, self._projections[i], attn.num_heads))

    def add_units(self, i: int, units: torch.Tensor):
        """The output [..., units] of the activation function in the MLP of block i."""
        greatest = units.flatten(0, -2).amax(dim=0)
        self.maxima[i] = greatest if self.maxima[i] is None else torch.maximum(self.maxima[i], greatest)

    def _grid(self, i: int, maps: torch.Tensor) -> torch.Tensor | None:
        """Distances [P, P] between the patches of block i's maps; None where they do not lie on the grid."""
        block = self.blocks[i]
        grid = tuple(getattr(block, "window_size", self.grid))
        if not 1 < math.prod(grid) == maps.shape[-1] - self.backbone.num_prefix_tokens:
            return None
        if grid not in self._distances:
            rows, columns = (torch.arange(side, dtype=maps.dtype, device=maps.device) for side in grid)
            places = torch.cartesian_prod(rows, columns)
            self._distances[grid] = torch.linalg.vector_norm(places[:, None] - places, dim=-1)
        return self._distances[grid]

    def _add(self, level: str, layer: int, chunk: object):
        """Add a chunk's means, weighted by its images."""
        sums = self.sums[level][layer]
        for key, measure in chosen(level, self.extra).items():
            if isinstance(chunk, measure.source) and (value := measure(chunk)) is not None:
                sums[key] = sums.get(key, 0) + self.chunk * value.mean(dtype=torch.float64)

    def report(self) -> dict:
        """What was measured; the first time that numbers are read back.

        Raises:
            ValueError: tokens are not finite, or labels are out of range.
        """
        for layer, sums in enumerate(self.tokens):
            if not sums.sum.isfinite().all():
                raise ValueError(f"the tokens of layer {layer} are not finite")
        counts = None
        if self.label_counts is not None:
            self.label_counts.check()
            counts = self.label_counts.counts if self.label_counts.can_be_compared() else None
        of_all = {"embedding": [sums.inputs(counts) for sums in self.tokens]}
        of_all["mlp"] = [None if maxima is None else inputs.AllUnits(maxima) for maxima in self.maxima]
        report = {"images": self.images, "stages": self.backbone.stages}
        for level, layers in self.layers.items():
            report[level] = {
                key: numbers(
                    measure(of_all[level][i])
                    if level in of_all and isinstance(of_all[level][i], measure.source)
                    else self.sums[level][i][key] / self.images
                    if key in self.sums[level][i]
                    else None
                    for i in range(layers)
                )
                for key, measure in chosen(level, self.extra).items()
            }
        cka = self.similarity.cka()
        report["cka"] = None if cka is None else [numbers(row) for row in cka]
        return report | {"variance": [of_layer.variance.tolist() for of_layer in of_all["embedding"]]}
