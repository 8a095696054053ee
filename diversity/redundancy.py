"""The measures of redundancy computed on a model: for every layer, block and matrix, without gradient.

Images are streamed: only running sums and a few images are held, whatever their number.
"""

import statistics
from collections.abc import Collection, Iterable, Iterator

import torch
from torch import nn

from .backbones import WEIGHT_GROUPS, Backbone
from .block_parts import block_matrices
from .circuits import circuit_factors
from .hooks import ModelHooks, eval_mode
from .measures import MEASURES, chosen, inputs, summary_measures
from .measures.meter import Meter, numbers
from .similarity import precise

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
        model: a timm ViT, DeiT, BEiT, EVA or Swin, or a ViT, DeiT, DINOv2 or BEiT of transformers.
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
    meter = Meter(backbone, backbone.num_classes if num_classes is None else num_classes, extra)
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        with eval_mode(model), ModelHooks() as hooks:
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
        if has_labels and (of_images.shape != images.shape[:1] or of_images.is_floating_point()):
            found = f"{[*of_images.shape]} of {of_images.dtype}"
            raise ValueError(f"labels must be [{len(images)}], one class for each image; got {found}")
        samples.append(images)
        labels.append(of_images)
        if sum(map(len, samples)) >= CHUNK:
            *full, rest = torch.cat(samples).split(CHUNK)
            *of_full, of_rest = torch.cat(labels).split(CHUNK) if has_labels else [None] * (len(full) + 1)
            yield from zip(full, of_full, strict=True)
            samples, labels = [rest], [of_rest]
    if sum(map(len, samples)):
        yield torch.cat(samples), torch.cat(labels) if has_labels else None


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
                tall = matrix.mT if matrix.shape[0] < matrix.shape[1] else matrix  # LAPACK takes half as long
                values = torch.linalg.svdvals(tall.double())
                _append(report["weight"], "weight", name, inputs.Matrix(precise(matrix), values), extra)
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
    for key, measure in chosen(level, extra).items():
        report.setdefault(name, {}).setdefault(key, []).extend(numbers([measure(source)]))


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
