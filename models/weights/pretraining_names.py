"""The layouts of pre-training that differ from timm's names: DINOv2 with its blocks in chunks."""

import re
from collections.abc import Collection

from torch import nn

from models.weights.layouts import Layout, enter
from models.weights.names import Tensors

CHUNKED = re.compile(r"blocks\.\d+\.(\d+)\.(.+)")


def _is_chunked(names: Collection[str]) -> bool:
    return any(CHUNKED.fullmatch(name) for name in names)


def _to_timm(weights: Tensors, model: nn.Module) -> tuple[Tensors, list[str]]:
    return {CHUNKED.sub(r"blocks.\1.\2", name): tensor for name, tensor in weights.items()}, []


enter(
    Layout(
        "DINOv2 in chunks",
        "Checkpoints of DINOv2's training, whose blocks have the number of their chunk in front of their own.",
        "patch_embed.proj.weight",
        _is_chunked,
        _to_timm,
    )
)
