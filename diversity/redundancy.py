"""The measures of redundancy computed on a model: for every layer, block and matrix, without gradient.

Images are streamed: only running sums and a few images are held, whatever their number.
"""

import math
import statistics
from collections.abc import Collection, Iterable, Iterator

import torch
from torch import nn

from .backbones import WEIGHT_GROUPS, Backbone, block_matrices, has_padding
from .circuits import circuit_factors
from .hooks import ModelHooks
from .measures import MEASURES, Measure, inputs, measures_of, summary_measures
from .measures.cka import LayerSimilarity
from .measures.sums import LabelCounts, TokenSums

CHUNK = 16  # images that run through the model at a time, as their attention maps need memory

Batch = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


@torch.no_grad()
def measure_redundancy(
    model: nn.Module, batches: Iterable[Batch], num_classes: int | None = None, extra: Collection[str] = ()
) -> dict:
    """Measure a model on images.

    The model is put into eval mode, and back; its attention is un-fused meanwhile, and float32 matrices are multiplied
    in float32 (no TF32). Tokens, maps and the cosines of rows are measured in float32, or float64 where the model is in
    float64, and summed up in float64; spectra are computed in float64. No number is read back from the device before
    the last image.

    On a Swin, windows count as images, the first embedding is that of the stage, maps are compared only with those of
    the same windows, and what is measured of attention is left out where windows hold padding.

    Args:
        model: a timm ViT, DeiT, BEiT, EVA or Swin.
        batches: images [B, 3, S, S] on the model's device, B of any size, or tuples of images and labels [B], which
            only the measures of variance within and between classes need.
        num_classes: labels are below it; default: the number of the model's classes.
        extra: names of optional measures to compute too.

    Returns:
        Numbers and lists only, ready for JSON; None where there is nothing to compare:

        images: how many there were.
        stages: the blocks with which the stages of a Swin begin; [0] for the others.
        embedding, attention, mlp: {measure: one value for each layer or block}.
        weight: {matrix: {measure: one value for each block}}, for q, k, v, proj, fc1, fc2 where the model has them.
        circuit: {"qk" or "ov": {measure: one value for each block}}.
        variance: for each layer, the fractions of the variance along the principal axes, in falling order.
        spectra: {matrix: for each block, its singular values, in falling order}.
        circuit_spectra: {"qk" or "ov": for each block, the mean over the heads of their singular values over the
            largest}, in falling order.
        cka: for each layer its similarities to all layers, see `LayerSimilarity`; None for fewer than 4 images.
        summary: {level_measure: the mean over layers (without layer 0), blocks and matrices}, and where the paper's
            terms act: {embedding_measure_last, attention_measure_first, weight_measure_qkv}, of the last layer, the
            first block and the matrices q, k, v; {circuit_measure_qk, circuit_measure_ov}. Means of condition numbers
            and massive activations are geometric.

    Raises:
        TapError: a model of another family, or one whose attention shows no maps.
        ValueError: there are no images, tokens or weights are not finite, labels are missing or out of range, or
            `extra` names no measure.
    """
    backbone = measurable(model)
    if unknown := [name for name in extra if name not in MEASURES]:
        raise ValueError(f"unknown measure {unknown[0]!r}; there are {', '.join(MEASURES)}")
    meter = _Meter(backbone, getattr(model, "num_classes", 0) if num_classes is None else num_classes, extra)
    modes = [(module, module.training) for module in model.modules()]
    precision = torch.get_float32_matmul_precision()
    model.eval()
    try:
        torch.set_float32_matmul_precision("highest")
        with ModelHooks() as hooks:
            meter.hook(hooks)
            for samples, labels in _chunks(batches):
                meter.begin(samples, labels)
                model(samples)
        if not meter.images:
            raise ValueError("there are no images to measure redundancy on")
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            report = meter.report() | _weights(backbone, extra)
    finally:
        torch.set_float32_matmul_precision(precision)
        for module, training in modes:
            module.training = training
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


def _chunks(batches: Iterable[Batch]) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """`CHUNK` images after the other with their labels, so that the result does not depend on the size of batches.

    Raises:
        ValueError: only some batches have labels, or not one label for each image.
    """
    samples, labels, has_labels = [], [], None
    for batch in batches:
        images, of_images = (batch, None) if torch.is_tensor(batch) else batch
        if has_labels not in (None, of_images is not None):
            raise ValueError("some batches have labels and others have none; give labels for all images or for none")
        has_labels = of_images is not None
        if has_labels and of_images.shape != images.shape[:1]:
            raise ValueError(f"labels must be [{len(images)}], one for each image; got {[*of_images.shape]}")
        samples.append(images)
        labels.append(of_images)
        if sum(map(len, samples)) >= CHUNK:
            *full, rest = torch.cat(samples).split(CHUNK)
            *of_full, of_rest = torch.cat(labels).split(CHUNK) if has_labels else [None] * (len(full) + 1)
            yield from zip(full, of_full, strict=True)
            samples, labels = [rest], [of_rest]
    if sum(map(len, samples)):
        yield torch.cat(samples), torch.cat(labels) if has_labels else None


def _precise(tensor: torch.Tensor) -> torch.Tensor:
    """float64 as it is, and everything else as float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class _Meter:
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
        self.first, self.before, self.previous = None, None, (None, None)
        self.labels = None
        if labels is not None:
            if self.label_counts is None:
                self.label_counts = LabelCounts(self.num_classes, samples.device)
            self.labels = self.label_counts.add(labels.to(samples.device, non_blocking=True))

    def hook(self, hooks: ModelHooks):
        """Measure what the model computes from now on."""
        for i, block in enumerate(self.blocks):
            hooks.on_input(block, self._see(self.add_input, i))
            hooks.on_output(block, self._see(self.add_output, i))
            if not has_padding(block):
                hooks.on_maps(block.attn, self._see(self.add_maps, i))
                if isinstance(getattr(block.attn, "proj", None), nn.Linear):
                    hooks.on_input(block.attn.proj, self._see(self.add_heads, i))
            if isinstance(activation := getattr(getattr(block, "mlp", None), "act", None), nn.Module):
                hooks.on_output(activation, self._see(self.add_units, i))

    @staticmethod
    def _see(add, i: int):
        """What a hook calls: `add` in full precision, also where the model runs under autocast."""

        def see(tensor: torch.Tensor):
            with torch.autocast(tensor.device.type, enabled=False):
                add(i, _precise(tensor))

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
        attn = self.blocks[i].attn
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
        grid = tuple(getattr(block, "window_size", self.backbone.grid))
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
        for key, measure in self._measures(level).items():
            if isinstance(chunk, measure.source) and (value := measure(chunk)) is not None:
                sums[key] = sums.get(key, 0) + self.chunk * value.mean(dtype=torch.float64)

    def _measures(self, level: str) -> dict[str, Measure]:
        return _chosen(level, self.extra)

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
                key: _numbers(
                    measure(of_all[level][i])
                    if level in of_all and isinstance(of_all[level][i], measure.source)
                    else self.sums[level][i][key] / self.images
                    if key in self.sums[level][i]
                    else None
                    for i in range(layers)
                )
                for key, measure in self._measures(level).items()
            }
        cka = self.similarity.cka()
        report["cka"] = None if cka is None else [_numbers(row) for row in cka]
        return report | {"variance": [of_layer.variance.tolist() for of_layer in of_all["embedding"]]}


def _chosen(level: str, extra: Collection[str]) -> dict[str, Measure]:
    """{key: the measures of a level}, without the optional ones that `extra` does not name."""
    return {
        key: measure for key, measure in measures_of(level).items() if not measure.optional or measure.name in extra
    }


def _numbers(values: Iterable[torch.Tensor | None]) -> list[float | None]:
    """The values as numbers; None in place of one that is not finite, as the ratio of two zeros."""
    values = [*values]
    known = [value.double() for value in values if value is not None]
    numbers = iter(torch.stack(known).tolist() if known else ())
    numbers = [None if value is None else next(numbers) for value in values]
    return [number if number is not None and math.isfinite(number) else None for number in numbers]


def _weights(backbone: Backbone, extra: Collection[str] = ()) -> dict:
    """The measures and the spectra of every block's matrices and circuits."""
    names = {"qkv": ("q", "k", "v")}
    report = {"weight": {}, "circuit": {}, "spectra": {}, "circuit_spectra": {}}
    for block in backbone.all_blocks:
        for group in WEIGHT_GROUPS:
            matrices = [matrix for stack in block_matrices(block, group) or [] for matrix in stack]
            for name, matrix in zip(names.get(group, (group,)), matrices, strict=False):
                if not matrix.isfinite().all():
                    raise ValueError(f"the weights {name} of a block are not finite")
                values = torch.linalg.svdvals(matrix.double())
                _append(report["weight"], "weight", name, inputs.Matrix(_precise(matrix), values), extra)
                report["spectra"].setdefault(name, []).append(values.tolist())
        for name, factors in (circuit_factors(block) or {}).items():
            circuit = inputs.Circuit(*(factor.double() for factor in factors))
            _append(report["circuit"], "circuit", name, circuit, extra)
            values = circuit.singular_values
            fractions = (values / values[:, :1].clamp_min(1e-300)).mean(dim=0)
            report["circuit_spectra"].setdefault(name, []).append(fractions.tolist())
    return report


def _append(report: dict, level: str, name: str, source: object, extra: Collection[str]):
    """Append the measures of a level to the lists of `report[name]`."""
    for key, measure in _chosen(level, extra).items():
        report.setdefault(name, {}).setdefault(key, []).extend(_numbers([measure(source)]))


def _summary(report: dict) -> dict[str, float]:
    """Means over layers and matrices, and over those that the paper's terms read; without those of no value."""
    values = {}
    for key, layers in report["embedding"].items():
        values[f"embedding_{key}"], values[f"embedding_{key}_last"] = layers[1:], layers[-1:]
    for key, blocks in report["attention"].items():
        values[f"attention_{key}"], values[f"attention_{key}_first"] = blocks, blocks[:1]
    values |= {f"mlp_{key}": blocks for key, blocks in report["mlp"].items()}
    for suffix, names in (("", report["weight"]), ("_qkv", [n for n in ("q", "k", "v") if n in report["weight"]])):
        for key in {key: None for name in names for key in report["weight"][name]}:
            values[f"weight_{key}{suffix}"] = [x for name in names for x in report["weight"][name][key]]
    for name, measures in report["circuit"].items():
        values |= {f"circuit_{key}_{name}": blocks for key, blocks in measures.items()}
    known, means = summary_measures(), {}
    for name in known:
        mean = statistics.geometric_mean if known[name][0].geometric else statistics.fmean
        if compared := [value for value in values.get(name, ()) if value is not None]:
            means[name] = mean(compared)
    return means
