"""Random inputs of the objective in float64, and a distillation loss."""

import textbook
import torch
from golden_inputs import normals
from torch import nn

from diversity import (
    MixedTarget,
    TapOutput,
)

BATCH, PATCHES, CLASSES = 3, 6, 5


def outputs(dist_logits=False):
    """Float64 tensors for every field of a TapOutput."""
    return TapOutput(
        logits=normals(0, BATCH, CLASSES),
        dist_logits=normals(1, BATCH, CLASSES) if dist_logits else None,
        patch_logits=normals(2, BATCH, PATCHES, CLASSES),
        first=normals(3, BATCH, PATCHES, 4),
        last=normals(4, BATCH, PATCHES, 4),
        attention=normals(5, BATCH, 2, 7, 7).softmax(dim=-1),
        weights=normals(6, 3, 4, 4),
    )


def targets():
    labels = torch.tensor([0, 3, 4])
    shares = torch.rand(BATCH, 1 + PATCHES, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return MixedTarget(labels, labels.flip(0), shares[:, 0], shares[:, 1:])


def textbook_classification(coef, smoothing):
    output, target = outputs(), targets()
    return textbook.mixing_loss(
        output.logits, output.patch_logits, **target._asdict(), smoothing=smoothing, coef=coef
    ).item()


class Distillation(nn.Module):
    """A distillation loss that keeps what it was called with."""

    def __init__(self, alpha):
        super().__init__()
        self.alpha = alpha

    def forward(self, samples, logits):
        self.called_with = samples, logits
        return logits.square().mean() + samples.mean()
