"""Which parameters of a model are trained, and the initial weights of its head: for fine-tuning and linear probes."""

from timm.layers import trunc_normal_
from torch import nn

from models.weights.structure import classifiers

FREEZE = {
    "none": "train everything",
    "backbone": "train the head alone (a linear probe), while the rest computes as in evaluation",
    "patch-embed": "train everything but the patch embedding",
}
"""What can be frozen, in words for the help."""


def freeze(model: nn.Module, what: str):
    """Let the parameters of a part of the model require no gradient.

    Optimizers of timm, and DistributedDataParallel, then leave them out. Freeze a model before it is given to them.

    Args:
        model: a timm model.
        what: a key of `FREEZE`.

    Raises:
        ValueError: the model has no such part, or nothing would be left to train.
    """
    if what == "backbone":
        if not (heads := classifiers(model)):
            raise ValueError(f"{type(model).__name__} has no head, so that nothing is left to train")
        model.requires_grad_(False)
        for head in heads:
            head.requires_grad_(True)
    elif what == "patch-embed":
        if not isinstance(getattr(model, "patch_embed", None), nn.Module):
            raise ValueError(f"{type(model).__name__} has no module patch_embed")
        model.patch_embed.requires_grad_(False)


def frozen_modules(model: nn.Module, what: str) -> list[nn.Module]:
    """The modules of a frozen part, whose dropout and running statistics are those of evaluation during training.

    The dropout before the classifier, timm's `head_drop` or a part of its head, is that of training.

    Args:
        model: after `freeze`.
        what: as for `freeze`.
    """
    if what == "backbone":
        heads = {*classifiers(model)}
        return [
            child for name, child in model.named_children() if name != "head_drop" and not heads & {*child.modules()}
        ]
    return [model.patch_embed] if what == "patch-embed" else []


def init_head(model: nn.Module, std: float):
    """Draw the weights of the head from a normal distribution truncated at 2; the biases become 0.

    Args:
        model: a timm model.
        std: standard deviation; 0 = all weights are 0.

    Raises:
        ValueError: the model has no linear head.

    Source: MAE, with 2e-5 in fine-tuning and 0.01 in linear probes.
    """
    layers = [layer for head in classifiers(model) for layer in head.modules() if isinstance(layer, nn.Linear)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no linear head")
    for layer in layers:
        trunc_normal_(layer.weight, std=std) if std else nn.init.zeros_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def trained_line(model: nn.Module, what: str) -> str:
    """How many parameters are trained, for the log; empty where all are."""
    if what == "none":
        return ""
    counts = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    total = sum(parameter.numel() for parameter in model.parameters())
    return f"--freeze {what}: {sum(counts):,} of {total:,} parameters are trained: {FREEZE[what]}"
