"""Sums over all images from which the measures of sets follow, in float64 on the device of the tokens.

Adding a chunk of images never waits for the device.
"""

import torch

from .inputs import AllTokens, ChunkTokens

FLOAT64 = torch.finfo(torch.float64)


class LabelCounts:
    """Images of each class.

    Args:
        num_classes: labels are 0 to num_classes - 1; others are counted apart, and found by `check`.
    """

    def __init__(self, num_classes: int, device: torch.device):
        self.num_classes = num_classes
        self.counts = torch.zeros(num_classes + 1, dtype=torch.float64, device=device)

    def add(self, labels: torch.Tensor) -> torch.Tensor:
        """labels [B]; returns them with `num_classes` in place of labels out of range."""
        known = (labels >= 0) & (labels < self.num_classes)
        labels = torch.where(known, labels, self.num_classes)
        self.counts.index_add_(0, labels, torch.ones_like(labels, dtype=torch.float64))
        return labels

    def check(self):
        """Raise ValueError for labels out of range."""
        if unknown := int(self.counts[-1]):
            raise ValueError(
                f"{unknown} of {int(self.counts.sum())} labels are not among the {self.num_classes} classes, which "
                f"are 0 to {self.num_classes - 1}; give num_classes"
            )

    def can_be_compared(self) -> bool:
        """Whether there are two classes, and two images of one."""
        return bool((self.counts > 0).sum() > 1) and bool(self.counts.max() > 1)


class TokenSums:
    """Sums over the patch tokens of one layer: within images, over their mean tokens, and over those of a class."""

    def __init__(self):
        self.images, self.patches, self.epsilon = 0, 0, FLOAT64.eps
        self.within, self.moment, self.sum, self.of_classes = 0.0, 0.0, 0.0, None

    def add(self, chunk: ChunkTokens, labels: torch.Tensor | None, num_classes: int):
        """Add images; `labels` [B] are below `num_classes`."""
        rows, means = chunk.centred.flatten(0, 1), chunk.mean.double()
        self.images += len(means)
        self.patches = chunk.tokens.shape[1]
        self.epsilon = torch.finfo(rows.dtype).eps
        self.within = self.within + (rows.mT @ rows).double()
        self.moment = self.moment + means.mT @ means
        self.sum = self.sum + means.sum(dim=0)
        if labels is not None:
            if self.of_classes is None:
                self.of_classes = means.new_zeros(num_classes, means.shape[1])
            self.of_classes.index_add_(0, labels, means)

    def inputs(self, counts: torch.Tensor | None) -> AllTokens:
        """What the measures of sets read; `counts` are the images of each class where classes can be compared."""
        mean = self.sum / self.images
        between = self.patches * (self.moment - self.images * torch.outer(mean, mean))
        classes = None
        if counts is not None:
            present = counts > 0
            of_classes = self.of_classes[present] / counts[present, None] - mean
            classes = self.patches * (counts[present] * of_classes.square().sum(dim=1)).sum()
        squares = self.within.trace(), between.trace().clamp_min(0), classes
        values = self._significant(torch.linalg.eigvalsh(self.moment).flip(0), self.moment.trace() * FLOAT64.eps)
        return AllTokens(self._fractions(self.within + between), self.images, *squares, values.sqrt())

    def _fractions(self, scatter: torch.Tensor) -> torch.Tensor:
        """Fractions of the variance along the principal axes, in falling order; without variance the first is 1."""
        total = self.within.trace() + self.patches * self.moment.trace()
        rounding = len(scatter) * FLOAT64.eps + 4 * self.epsilon**2
        variances = torch.linalg.eigvalsh(scatter).flip(0)
        variances = self._significant(variances, rounding * total + self.epsilon * scatter.trace())
        variances[0] = torch.where(variances.any(), variances[0], 1)
        return variances / variances.sum()

    @staticmethod
    def _significant(values: torch.Tensor, rounding: torch.Tensor) -> torch.Tensor:
        """The values, and 0 in place of those that are not above what rounding makes of 0."""
        return torch.where(values > rounding, values, 0)
