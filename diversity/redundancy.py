"""The three levels of redundancy as measurements: for every layer, exact, without gradient.

Images are streamed: only running sums and a few images are held, whatever their number.
"""

import contextlib
import math
import statistics
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.nn import functional as F

from .backbones import WEIGHT_GROUPS, Backbone, block_matrices, holds_padding
from .similarity import cosines, mean_cosine, mean_cross_cosine, without_diagonal

CHUNK = 16  # images that run through the model at a time; maps of all heads are held in float64
FLOAT64_EPSILON = torch.finfo(torch.float64).eps
MEASURES = {
    "embedding": {
        "token_cosine": "mean cosine of two different patch tokens of an image",
        "token_abscosine": "mean absolute cosine of two different patch tokens of an image",
        "first_cosine": "mean cosine of a patch token with its own first embedding",
        "effective_rank": "exp of the entropy of an image's singular values over their sum",
        "components_90": "principal components that hold 90 % of the variance of all images' tokens",
    },
    "attention": {
        "head_cosine": "mean cosine of the maps of two different heads",
        "row_std": "mean standard deviation of a token's attention row",
        "row_entropy": "mean entropy of a token's attention row, in nats",
        "previous_cosine": "mean cosine of a head's map with the maps of the block before",
    },
    "weight": {
        "effective_rank": "exp of the entropy of the singular values over their sum",
        "condition_number": "largest over smallest singular value, at most 1 / the epsilon of float64",
        "row_abscosine": "mean absolute cosine of two different rows",
        "smallest_angle": "smallest angle between the lines along two rows, in degrees",
    },
}
"""{level: {measure: what it is}}. Embeddings are those of patch tokens: layer 0 is the input of the first block, layer
l the output of block l - 1. Attention maps are those after the softmax, prefix tokens included."""


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
        variance: for each layer, the shares of the variance of the principal components, falling.
        spectra: {matrix: for each block, its singular values, falling}.
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
        with meter.hooked():
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


def effective_rank(singular_values: torch.Tensor) -> torch.Tensor:
    """exp(H(s / sum s)) over the last axis: 1 for a matrix of rank 1, n for n equal singular values.

    Source: The effective rank (Roy and Vetterli 2007).
    """
    shares = singular_values / singular_values.sum(dim=-1, keepdim=True).clamp_min(1e-300)
    return torch.special.entr(shares).sum(dim=-1).exp()


class _Meter:
    """Running sums of every layer, filled by hooks while the model runs."""

    def __init__(self, backbone: Backbone):
        self.backbone = backbone
        self.images = 0
        depth = len(backbone.all_blocks)
        self.embedding = [{} for _ in range(depth + 1)]
        self.attention = [{} for _ in range(depth)]
        self.tokens = [_Covariance() for _ in range(depth + 1)]

    def begin(self, images: int):
        """Forget what the last batch left to compare with."""
        self.images += images
        self.batch = images
        self.first = self.previous = None

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        blocks = self.backbone.all_blocks
        handles, fused = [], []
        try:
            for i, block in enumerate(blocks):
                attn = block.attn
                if hasattr(attn, "fused_attn"):
                    fused.append((attn, attn.fused_attn))
                    attn.fused_attn = False
                handles.append(block.register_forward_pre_hook(self._input_hook(i)))
                handles.append(block.register_forward_hook(self._output_hook(i)))
                if not holds_padding(block):
                    handles.append(attn.attn_drop.register_forward_pre_hook(self._maps_hook(i)))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for attn, was_fused in fused:
                attn.fused_attn = was_fused

    def _input_hook(self, i):
        def hook(block, inputs):
            tokens = self.backbone.patch_tokens(inputs[0])
            if i == 0 or tokens.shape != self.first.shape:  # another stage of a Swin: other patches
                self.first = tokens
            if i == 0:
                self._see_tokens(0, tokens)

        return hook

    def _output_hook(self, i):
        return lambda block, inputs, output: self._see_tokens(i + 1, self.backbone.patch_tokens(output))

    def _maps_hook(self, i):
        def hook(module, inputs):
            rows = inputs[0].double()
            maps, shift = rows.flatten(start_dim=2), getattr(self.backbone.all_blocks[i], "shift_size", None)
            values = {
                "row_std": rows.std(dim=-1, unbiased=False).mean(),
                "row_entropy": torch.special.entr(rows).sum(dim=-1).mean(),
            }
            if maps.shape[1] > 1:
                values["head_cosine"] = without_diagonal(mean_cosine(maps), maps).mean()
            if self.previous is not None and (self.previous[0].shape, self.previous[1]) == (maps.shape, shift):
                values["previous_cosine"] = mean_cross_cosine(self.previous[0], maps).mean()
            self._add(self.attention[i], values)
            self.previous = (maps, shift)

        return hook

    def _see_tokens(self, layer: int, tokens: torch.Tensor):
        tokens = tokens.double()
        if not tokens.isfinite().all():
            raise ValueError(f"the tokens of layer {layer} are not finite")
        values = {"first_cosine": F.cosine_similarity(self.first.double(), tokens, dim=-1).mean()}
        if tokens.shape[1] > 1:
            similarity = cosines(tokens)
            values["token_cosine"] = without_diagonal(similarity.mean(dim=(-2, -1)), tokens).mean()
            values["token_abscosine"] = without_diagonal(similarity.abs().mean(dim=(-2, -1)), tokens).mean()
        values["effective_rank"] = effective_rank(_singular_values(tokens)).mean()
        self._add(self.embedding[layer], values)
        self.tokens[layer].add(tokens.flatten(0, 1))

    def _add(self, sums: dict, means: dict):
        """Add a batch's means, weighed by its images."""
        for name, value in means.items():
            sums[name] = sums.get(name, 0) + self.batch * value.item()

    def report(self) -> dict:
        def per_layer(sums, level):
            return {
                name: [layer[name] / self.images if name in layer else None for layer in sums]
                for name in MEASURES[level]
                if name != "components_90"
            }

        variance = [covariance.shares() for covariance in self.tokens]
        embedding = per_layer(self.embedding, "embedding")
        embedding["components_90"] = [int((shares.cumsum(0) < 0.9 - 1e-9).sum()) + 1 for shares in variance]
        return {
            "images": self.images,
            "stages": self.backbone.stages,
            "embedding": embedding,
            "attention": per_layer(self.attention, "attention"),
            "variance": [shares.tolist() for shares in variance],
        }


class _Covariance:
    """Sums from which the covariance of all rows seen follows."""

    def __init__(self):
        self.count, self.sum, self.squares = 0, 0.0, 0.0

    def add(self, rows: torch.Tensor):
        """rows [n, D]."""
        self.count += len(rows)
        self.sum = self.sum + rows.sum(dim=0)
        self.squares = self.squares + rows.mT @ rows

    def shares(self) -> torch.Tensor:
        """Shares of the variance along the principal axes, falling, [D]; without any variance, one axis has it all."""
        mean, squares = self.sum / self.count, self.squares / self.count
        variances = torch.linalg.eigvalsh(squares - torch.outer(mean, mean)).flip(0)
        variances[variances < len(mean) * FLOAT64_EPSILON * squares.trace()] = 0  # rounding, not variance
        if not variances.any():
            variances[0] = 1
        return variances / variances.sum()


def _singular_values(items: torch.Tensor) -> torch.Tensor:
    """Singular values of float64 matrices [..., rows, columns], through the smaller of the two Gram matrices."""
    items = items.mT if items.shape[-2] > items.shape[-1] else items
    return torch.linalg.eigvalsh(items @ items.mT).clamp_min(0).sqrt()


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
                similarity = cosines(matrix).abs()
                mean = without_diagonal(similarity.mean(), matrix)
                closest = similarity.fill_diagonal_(0).max().clamp_max(1)
                measures = {
                    "effective_rank": effective_rank(values).item(),
                    "condition_number": 1 / max((values[-1] / values[0]).nan_to_num().item(), FLOAT64_EPSILON),
                    "row_abscosine": mean.item(),
                    "smallest_angle": math.degrees(math.acos(closest.item())),
                }
                for measure, value in measures.items():
                    weight.setdefault(name, {}).setdefault(measure, []).append(value)
                spectra.setdefault(name, []).append(values.tolist())
    return {"weight": weight, "spectra": spectra}


def _summary(report: dict) -> dict[str, float]:
    """Means over layers and matrices, and over those that the paper's terms read."""
    values = {}
    for measure, layers in report["embedding"].items():
        values[f"embedding_{measure}"], values[f"embedding_{measure}_last"] = layers[1:], layers[-1:]
    for measure, blocks in report["attention"].items():
        values[f"attention_{measure}"], values[f"attention_{measure}_first"] = blocks, blocks[:1]
    for suffix, names in (("", report["weight"]), ("_qkv", [n for n in ("q", "k", "v") if n in report["weight"]])):
        for measure in MEASURES["weight"]:
            values[f"weight_{measure}{suffix}"] = [x for name in names for x in report["weight"][name][measure]]
    means = {}
    for name, of_name in values.items():
        mean = statistics.geometric_mean if "condition_number" in name else statistics.fmean
        if there := [value for value in of_name if value is not None]:
            means[name] = mean(there)
    return means
