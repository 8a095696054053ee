"""Ridge regression onto one-hot labels in closed form, from sums over a stream."""

import torch

STRENGTH = 1e-2
ROUNDING = 1e-13  # fraction of the mean square below which a variance is rounding


class Ridge:
    """The linear map that ridge regression fits from features to one-hot labels, from running sums in float64.

    Minimises mean |W^T x + b - onehot(label)|^2 + strength * v |W|^2, v the mean variance of a feature: b is not
    penalised, and a common scale or shift of all features changes no prediction. Memory does not grow with the number
    of rows.

    Args:
        num_features: D.
        num_classes: C.
        strength: of the penalty, relative to v.
    """

    def __init__(self, num_features: int, num_classes: int, device: torch.device, strength: float = STRENGTH):
        self.strength, self.rows = strength, 0
        self.sum = torch.zeros(num_features, dtype=torch.float64, device=device)
        self.squares = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)
        self.of_classes = torch.zeros(num_classes, num_features, dtype=torch.float64, device=device)
        self.counts = torch.zeros(num_classes, dtype=torch.float64, device=device)

    def add(self, features: torch.Tensor, labels: torch.Tensor):
        """Features [n, D] with labels [n].

        Raises:
            ValueError: a feature is not finite.
        """
        features = features.double()
        if not features.isfinite().all():
            raise ValueError("the features are not finite")
        self.rows += len(features)
        self.sum += features.sum(dim=0)
        self.squares += features.mT @ features
        self.of_classes.index_add_(0, labels, features)
        self.counts += torch.bincount(labels, minlength=len(self.counts))

    def fit(self) -> tuple[torch.Tensor, torch.Tensor]:
        """W [D, C] and b [C] for the rows so far. Features without variance predict the most frequent class."""
        mean, shares = self.sum / self.rows, self.counts / self.rows
        covariance = self.squares / self.rows - torch.outer(mean, mean)
        with_labels = self.of_classes.mT / self.rows - torch.outer(mean, shares)
        variance = covariance.diagonal().mean()
        if variance <= ROUNDING * self.squares.diagonal().mean() / self.rows:
            return torch.zeros_like(with_labels), shares
        covariance.diagonal().add_(self.strength * variance)
        weights = torch.linalg.solve(covariance, with_labels)
        return weights, shares - mean @ weights
