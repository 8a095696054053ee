"""Weights of JAX in .npz files (big_vision, the original ViT and AugReg), which timm's models read by themselves."""

import copy
import re
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from models.weights.layouts import groups
from models.weights.names import Tensors

POSITIONS = ("Transformer/posembed_input/pos_embedding", "pos_embedding", "img/pos_embedding")
IGNORED = r"(opt|t|txt|pre_logits)(/.*)?|.*pre_logits.*"


def convert_archive(path: str, stored: Mapping[str, np.ndarray], model: nn.Module) -> tuple[Tensors, list[str]]:
    """The weights that timm's `load_pretrained` of the model reads from an .npz file, with timm's names.

    Args:
        stored: the content of the file.

    Returns:
        The weights, without those that the file does not have, and one line for each tensor that was resampled and for
        what timm does not read.

    Raises:
        ValueError: the file is not of this kind, or has another number of blocks.
    """
    blank = copy.deepcopy(model).cpu()
    if not hasattr(blank, "load_pretrained"):
        raise ValueError(f"{path} is an archive of JAX, which timm does not read for {type(model).__name__}")
    with torch.no_grad():
        for parameter in blank.parameters():
            parameter.fill_(torch.nan)
    shapes = {name: array.shape for name, array in stored.items()}
    try:
        blank.load_pretrained(path)
    except Exception as error:  # timm raises many types for a file that is not of this kind
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} cannot be read as an archive of JAX for {type(model).__name__}: {reason}") from None
    _check_depth(path, shapes, blank)
    weights = {name: tensor for name, tensor in blank.state_dict().items() if not tensor.isnan().any()}
    weights = _classifier(stored) | weights
    return weights, _notes(shapes, weights)


def _classifier(stored: Mapping[str, np.ndarray]) -> Tensors:
    """The classifier of an archive, which timm reads only if it has as many classes as the model."""
    start = next((start for start in ("", "img/", "params/img/") if f"{start}head/kernel" in stored), None)
    if start is None:
        return {}
    weight, bias = stored[f"{start}head/kernel"].T, stored[f"{start}head/bias"]
    return {"head.weight": torch.from_numpy(weight.copy()), "head.bias": torch.from_numpy(bias)}


def _check_depth(path: str, shapes: dict[str, tuple[int, ...]], model: nn.Module):
    """timm reads as many blocks as the model has, so further ones would be left out silently."""
    found = [int(match[1]) for name in shapes if (match := re.search(r"encoderblock_(\d+)/", name))]
    depth = max(found, default=-1) + 1
    if depth and depth != len(model.blocks):
        raise ValueError(f"{path} has {depth} blocks, and the model {len(model.blocks)}")


def _notes(shapes: dict[str, tuple[int, ...]], weights: Tensors) -> list[str]:
    notes = []
    positions = next((shapes[name] for name in POSITIONS if name in shapes), None)
    if positions and "pos_embed" in weights and positions[-2] != weights["pos_embed"].shape[1]:
        notes.append(f"pos_embed resampled to {[*weights['pos_embed'].shape]}")
    kernel = next((shape for name, shape in shapes.items() if name.endswith("embedding/kernel")), None)
    projection = weights.get("patch_embed.proj.weight")
    if kernel and projection is not None and kernel[:2] != projection.shape[2:]:
        notes.append(f"patch_embed.proj.weight resampled to {[*projection.shape]}")
    left = [name.replace("/", ".") for name in shapes if re.fullmatch(IGNORED, name)]
    if left:
        notes.append(f"left out by timm: {groups(left)}")
    return notes
