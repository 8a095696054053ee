"""The three levels of redundancy as measurements: for every layer, exact, without gradient.

Images are streamed: only running sums and a few images are held, whatever their number.
"""

import statistics
from collections.abc import Iterable
from functools import partial

import torch
from torch import nn

from .backbones import WEIGHT_GROUPS, Backbone, block_matrices, has_padding
from .hooks import ModelHooks
from .measures import FLOAT64_EPSILON, measures_of, summary_measures

CHUNK = 16  # images that run through the model at a time; maps of all heads are held in float64


@torch.no_grad()
def measure_redundancy(model: nn.Module, batches: Iterable[torch.Tensor]) -> dict:
    """Measure a model on images.

    The model is put into eval mode, and back; its attention is un-fused meanwhile. On a Swin, windows count as images,
    the first embedding is that of the stage, maps are compared only with those of the same windows, and maps of windows
    that hold padding are left out.

    Args:
        model: a timm ViT, DeiT, BEiT, EVA or Swin.
        batches: images [B, 3, S, S] on the model's device, B of any size.

    Returns:
        Numbers and lists only, ready for JSON; None where there is nothing to compare:

        images: how many there were.
        stages: the blocks with which the stages of a Swin begin; [0] for the others.
        embedding, attention: {measure: one value for each layer}.
        weight: {matrix: {measure: one value for each block}}, for q, k, v, proj, fc1, fc2 where the model has them.
        variance: for each layer, the fractions of the variance along the principal axes, in falling order.
        spectra: {matrix: for each block, its singular values, in falling order}.
        summary: {level_measure: the mean over layers (without layer 0) and matrices}, and where the paper's terms act:
            {embedding_measure_last, attention_measure_first, weight_measure_qkv}, of the last layer, the first block
            and the matrices q, k, v. Means of condition numbers are geometric.

    Raises:
        TapError: a model of another family, or one whose attention shows no maps.
        ValueError: there are no images, or tokens or weights are not finite.
    """
    backbone = measurable(model)
    meter = _Meter(backbone)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with ModelHooks() as hooks:
            meter.hook(hooks)
            for samples in (chunk for batch in batches for chunk in batch.split(CHUNK)):
                if len(samples):
                    meter.begin(len(samples))
                    model(samples)
    finally:
        for module, training in modes:
            module.training = training
    if not meter.images:
        raise ValueError("there are no images to measure redundancy on")
    report = meter.report() | _weights(backbone)
    return report | {"summary": _summary(report)}


def measurable(model: nn.Module) -> Backbone:
    """The parts of a model that can be measured.

    Raises:
        TapError: a model of another family, or one whose attention shows no maps.
    """
    backbone = Backbone.require(model, "tokens")
    for i, block in enumerate(backbone.all_blocks):
        backbone.require_maps("attention", i, block)
    return backbone


class _Meter:
    """Running sums of every layer, filled by hooks while the model runs."""

    def __init__(self, backbone: Backbone):
        self.backbone = backbone
        self.images = 0
        depth = len(backbone.all_blocks)
        self.sums = {"embedding": [{} for _ in range(depth + 1)], "attention": [{} for _ in range(depth)]}
        self.tokens = [_Covariance() for _ in range(depth + 1)]

    def begin(self, images: int):
        """Forget what the last batch left to compare with."""
        self.images += images
        self.batch = images
        self.first, self.previous = None, (None, None)

    def hook(self, hooks: ModelHooks):
        """Measure what the model computes from now on."""
        for i, block in enumerate(self.backbone.all_blocks):
            hooks.on_input(block, partial(self._see_input, i))
            hooks.on_output(block, partial(self._see_output, i))
            if not has_padding(block):
                hooks.on_maps(block.attn, partial(self.add_maps, i))

    def _see_input(self, i: int, tokens: torch.Tensor):
        tokens = self.backbone.patch_tokens(tokens)
        if i == 0 or tokens.shape != self.first.shape:  # another stage of a Swin: other patches
            self.first = tokens
        if i == 0:
            self._see_tokens(0, tokens)

    def _see_output(self, i: int, tokens: torch.Tensor):
        self._see_tokens(i + 1, self.backbone.patch_tokens(tokens))

    def _see_tokens(self, layer: int, tokens: torch.Tensor):
        tokens = tokens.double()
        if not tokens.isfinite().all():
            raise ValueError(f"the tokens of layer {layer} are not finite")
        self._add("embedding", layer, tokens=tokens, first=self.first.double())
        self.tokens[layer].add(tokens.flatten(0, 1))

    def add_maps(self, i: int, maps: torch.Tensor):
        """Measure the maps [B, H, N, N] of block i; they are compared with those before if both are of one window."""
        maps, windows = maps.double(), (maps.shape, getattr(self.backbone.all_blocks[i], "shift_size", None))
        previous, previous_windows = self.previous
        self._add("attention", i, maps=maps, previous=previous if windows == previous_windows else None)
        self.previous = maps, windows

    def _add(self, level: str, layer: int, **inputs: torch.Tensor | None):
        """Add a batch's means, weighted by its images."""
        sums = self.sums[level][layer]
        for key, measure in measures_of(level).items():
            value = None if "variance" in measure.reads else measure(**inputs)
            if value is not None:
                sums[key] = sums.get(key, 0) + self.batch * value.mean().item()

    def report(self) -> dict:
        variance = [covariance.fractions() for covariance in self.tokens]
        report = {"images": self.images, "stages": self.backbone.stages}
        for level, layers in self.sums.items():
            report[level] = {
                key: [measure(variance=fractions).item() for fractions in variance]
                if "variance" in measure.reads
                else [sums[key] / self.images if key in sums else None for sums in layers]
                for key, measure in measures_of(level).items()
            }
        return report | {"variance": [fractions.tolist() for fractions in variance]}


class _Covariance:
    """Sums from which the covariance of all rows seen follows."""

    def __init__(self):
        self.count, self.sum, self.squares = 0, 0.0, 0.0

    def add(self, rows: torch.Tensor):
        """rows [n, D]."""
        self.count += len(rows)
        self.sum = self.sum + rows.sum(dim=0)
        self.squares = self.squares + rows.mT @ rows

    def fractions(self) -> torch.Tensor:
        """Fractions of the variance along the principal axes [D], in falling order; without variance the first is 1."""
        mean, squares = self.sum / self.count, self.squares / self.count
        variances = torch.linalg.eigvalsh(squares - torch.outer(mean, mean)).flip(0)
        variances[variances < len(mean) * FLOAT64_EPSILON * squares.trace()] = 0  # rounding, not variance
        if not variances.any():
            variances[0] = 1
        return variances / variances.sum()


def _weights(backbone: Backbone) -> dict:
    """The measures and the spectra of every block's matrices."""
    names = {"qkv": ("q", "k", "v")}
    weight, spectra = {}, {}
    for block in backbone.all_blocks:
        for group in WEIGHT_GROUPS:
            matrices = [matrix for stack in block_matrices(block, group) or [] for matrix in stack.double()]
            for name, matrix in zip(names.get(group, (group,)), matrices, strict=False):
                if not matrix.isfinite().all():
                    raise ValueError(f"the weights {name} of a block are not finite")
                values = torch.linalg.svdvals(matrix)
                for key, measure in measures_of("weight").items():
                    value = measure(matrix=matrix, singular_values=values)
                    of_blocks = weight.setdefault(name, {}).setdefault(key, [])
                    of_blocks.append(None if value is None else value.item())
                spectra.setdefault(name, []).append(values.tolist())
    return {"weight": weight, "spectra": spectra}


def _summary(report: dict) -> dict[str, float]:
    """Means over layers and matrices, and over those that the paper's terms read; without those of no value."""
    values = {}
    for key, layers in report["embedding"].items():
        values[f"embedding_{key}"], values[f"embedding_{key}_last"] = layers[1:], layers[-1:]
    for key, blocks in report["attention"].items():
        values[f"attention_{key}"], values[f"attention_{key}_first"] = blocks, blocks[:1]
    for suffix, names in (("", report["weight"]), ("_qkv", [n for n in ("q", "k", "v") if n in report["weight"]])):
        for key in measures_of("weight"):
            values[f"weight_{key}{suffix}"] = [x for name in names for x in report["weight"][name][key]]
    known, means = summary_measures(), {}
    for name, of_name in values.items():
        mean = statistics.geometric_mean if known[name][0].geometric else statistics.fmean
        if compared := [value for value in of_name if value is not None]:
            means[name] = mean(compared)
    return means
