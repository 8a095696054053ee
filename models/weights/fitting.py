"""Fitting weights with timm's names to a model: timm's own conversions, sizes, pooling, what is left out."""

import contextlib
import inspect
import io
import re
import sys

import torch
from torch import nn

from models.weights.layouts import groups
from models.weights.names import Tensors

RESAMPLED = ("pos_embed", "patch_embed.proj.weight", "relative_position_bias_table")
"""Ends of the names of tensors that timm resamples."""

PRETRAINING = {
    r"decoder(_\w+)?(\..*)?|mask_token|masked_embed": "of masked pre-training",
    r"head\.(mlp|last_layer|\d+)\..*|(dino_head|ibot_head|projector|projection_head|prediction_head|predictor)\..*"
    r"|prototypes\..*": "of a projection head of pre-training",
}
"""{names: what they are}: what a classifier has no use for."""

COMPUTED = re.compile(r".*(relative_position_index|relative_coords_table|attn_mask|\.periods|\.bias_mask)|rope\..*")
"""Names of buffers that timm computes."""

REPLACED = re.compile(
    r"\.[qkv]_proj\.|^visual\.(trunk\.)?(pos_embed|positional_embedding|conv1\.weight|patch_embed\.proj\.weight)$"
)
"""Names of tensors that timm joins, or renames and resamples."""


def fit(model: nn.Module, weights: Tensors, new_head: bool = True) -> tuple[Tensors, list[str]]:
    """Weights as timm's function for the model converts them, without what only pre-training needs.

    Args:
        new_head: whether a classifier that was trained with another pooling may be loaded.

    Returns:
        The weights, and one line for each tensor that was resampled or renamed, and each group that was left out.

    Raises:
        ValueError: the classifier of the file reads other tokens than that of the model.
    """
    own, before = model.state_dict(), weights
    weights = _converted(model, weights)
    storages = {_storage(tensor) for tensor in before.values()}
    notes = [
        f"{name} resampled to {[*tensor.shape]}"
        for name, tensor in weights.items()
        if name.endswith(RESAMPLED) and name in own and _storage(tensor) not in storages
    ]
    weights, renamed = _average_pooling(own, weights, new_head)
    notes += renamed
    of_pretraining = set()
    for pattern, what in PRETRAINING.items():
        names = [name for name in {**before, **weights} if name not in own and re.fullmatch(pattern, name)]
        of_pretraining.update(names)
        if names:
            notes.append(f"left out, {what}: {groups(names)}")
    kept = {name: tensor for name, tensor in weights.items() if name not in of_pretraining}
    return kept, notes + _vanished({name: before[name] for name in before.keys() - of_pretraining}, weights)


def _converted(model: nn.Module, weights: Tensors) -> Tensors:
    """`weights` after timm's checkpoint_filter_fn of the model's module; unchanged if it does not serve them."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return weights
    options = {}
    if "adapt_layer_scale" in inspect.signature(convert).parameters:  # timm sets it for DeiT-III, whose file needs it
        options["adapt_layer_scale"] = any(re.fullmatch(r"blocks\.\d+\.gamma_[12]", name) for name in weights)
    with (
        contextlib.suppress(RuntimeError, AttributeError, ValueError, AssertionError),  # `load_state_dict` reports it
        contextlib.redirect_stdout(io.StringIO()),
    ):
        return convert(dict(weights), model, **options)
    return weights


def _average_pooling(own: Tensors, weights: Tensors, new_head: bool) -> tuple[Tensors, list[str]]:
    """The last norm as timm's `fc_norm` if the model has only that one, as MAE's models for average pooling do."""
    norm, fc_norm = "norm.weight", "fc_norm.weight"
    if fc_norm in weights and fc_norm not in own and norm in own and norm not in weights:
        raise ValueError("averages the patch tokens (fc_norm), and the model does not: --model-kwargs global_pool=avg")
    if norm not in weights or fc_norm in weights or norm in own or fc_norm not in own:
        return weights, []
    if "head.weight" in weights and not new_head:
        raise ValueError(
            "has a classifier of the class token (norm), and the model averages the patch tokens (fc_norm): "
            "--model-kwargs global_pool=token"
        )
    names = {f"norm.{last}": f"fc_norm.{last}" for last in ("weight", "bias")}
    note = "norm loaded as fc_norm: the model averages the patch tokens, and normalises the average"
    return {names.get(name, name): tensor for name, tensor in weights.items()}, [note]


def _vanished(before: Tensors, weights: Tensors) -> list[str]:
    """A line about tensors that timm's conversion left out."""
    kept = {_storage(tensor) for tensor in weights.values()}
    names = [name for name, tensor in before.items() if name not in weights and _storage(tensor) not in kept]
    names = [name for name in names if not COMPUTED.fullmatch(name) and not REPLACED.search(name)]
    return [f"left out by timm's conversion: {groups(sorted(names))}"] if names else []


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
