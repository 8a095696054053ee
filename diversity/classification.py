"""ClassificationLoss: cross-entropy of the class token and of the patch tokens, and distillation."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from .cross_entropy import token_cross_entropy
from .mixing import MixedTarget

MIXING = "mixing"
MIXING_BALANCES = ("tokens", "equal")
MIXING_WHERE = ("always", "cutmix")
ROUNDING = 1e-6
"""Patch labels of an image that differ by less are the same."""


class ClassificationLoss(nn.Module):
    """(CE_cls + c * sum_p CE_p) / (1 + c * P), averaged over the images; with distillation, (1 - alpha) of it.

    CE_cls is the cross-entropy of the class token and CE_p that of patch token p, through one shared head, each against
    its own mixed label. This gives the class token a weight of only 1 / (1 + c * P); "equal" balance is
    (CE_cls + c * mean_p CE_p) / (1 + c). With "cutmix", c is 0 for every image whose patches all have the same label:
    where Mixup or nothing mixed the image, its patch labels say nothing about single patches, and patch mixing would
    make its patch tokens similar. With distillation, alpha times its loss is added.

    Args:
        mixing: the coefficient c; 0 = the class token alone, and no patch logits are read.
        smoothing: label smoothing, in [0, 1).
        distillation: None, or a callable (samples, logits) -> 0-dim loss with an attribute `alpha` in [0, 1].
        mixing_balance: "tokens" or "equal".
        mixing_where: "always" or "cutmix".

    Source: the mixing loss of The Principle of Diversity; distillation as in DeiT.
    Differs: the mixing coefficient is a multiplier, where the released code reads it as a switch; "equal"; "cutmix".
    """

    def __init__(
        self,
        mixing: float = 0.0,
        smoothing: float = 0.0,
        distillation: Callable[..., torch.Tensor] | None = None,
        mixing_balance: str = "tokens",
        mixing_where: str = "always",
    ):
        super().__init__()
        self.mixing = mixing
        self.smoothing = smoothing
        self.distillation = distillation
        self.mixing_balance = mixing_balance
        self.mixing_where = mixing_where

    @property
    def names(self) -> list[str]:
        """Of the components of this loss, in their order."""
        return ["cls_ce", *([MIXING] if self.mixing else []), *(["distillation"] if self.distillation else [])]

    def forward(self, output, target, samples=None, factor: float | torch.Tensor = 1.0):
        """The loss of a batch.

        Args:
            output, target, samples: see `DiversityObjective.forward`.
            factor: of the mixing coefficient.

        Returns:
            The 0-dim loss; {name: raw value}, of which "mixing" is the mean over all patch tokens of all images; and
            {name: the part of the loss}, which sums to the loss.
        """
        is_mixed = isinstance(target, MixedTarget)
        _check_labels(target.labels if is_mixed else target, output.logits)
        if self.mixing:
            loss, raw, weighted = self._with_patches(output, target, factor)
        else:
            loss = self._class_token(output.logits, target)
            raw, weighted = {"cls_ce": loss}, {"cls_ce": 1.0 * loss}
        if self.distillation is not None:
            alpha = self.distillation.alpha
            raw["distillation"] = self.distillation(
                samples, output.logits if output.dist_logits is None else output.dist_logits
            )
            loss = (1 - alpha) * loss + alpha * raw["distillation"]
            weighted = {name: (1 - alpha) * value for name, value in weighted.items()}
            weighted["distillation"] = alpha * raw["distillation"]
        return loss, raw, weighted

    def _class_token(self, logits: torch.Tensor, target: MixedTarget | torch.Tensor) -> torch.Tensor:
        if isinstance(target, MixedTarget):
            return self._cross_entropy(target)(logits[:, None], lam=target.lam[:, None]).mean()
        with torch.autocast(device_type=target.device.type, enabled=False):
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            return F.cross_entropy(logits, target, label_smoothing=self.smoothing)

    def _with_patches(self, output, target: MixedTarget, factor: float | torch.Tensor):
        """What `forward` returns, without distillation."""
        num_patches = _check_patches(output, target)
        cross_entropy, cls_lam = self._cross_entropy(target), target.lam[:, None]
        patches = factor * (self.mixing * (num_patches if self.mixing_balance == "tokens" else 1))
        if self.mixing_where == "cutmix":  # [B, 1], as the weights are then
            lam = target.patch_lam
            patches = patches * (lam.amax(dim=1, keepdim=True) - lam.amin(dim=1, keepdim=True) > ROUNDING).to(lam.dtype)
        weights = {"cls_ce": 1 / (1 + patches), MIXING: patches / (1 + patches)}
        if output.token_logits is None:
            ces = {
                "cls_ce": cross_entropy(output.logits[:, None], lam=cls_lam),
                MIXING: cross_entropy(output.patch_logits, lam=target.patch_lam),
            }
            weighted = _weighted_means(ces, weights)
            return sum(weighted.values()), {name: ce.mean() for name, ce in ces.items()}, weighted
        # One pass over the logits, whose gradient takes one weight a token.
        ce = cross_entropy(output.token_logits, lam=torch.cat((cls_lam, target.patch_lam), dim=1))
        is_class_token = torch.arange(1 + num_patches, device=ce.device) == 0
        patch_weight = weights[MIXING] / num_patches
        if not torch.is_tensor(patch_weight):  # a product with a tensor costs passes over the logits when compiled
            patch_weight = ce.new_full((), patch_weight)
        loss = (ce * torch.where(is_class_token, weights["cls_ce"], patch_weight)).sum(dim=1).mean()
        ces = {"cls_ce": ce.detach()[:, :1], MIXING: ce.detach()[:, 1:]}
        return loss, {name: ce.mean() for name, ce in ces.items()}, _weighted_means(ces, weights)

    def _cross_entropy(self, target: MixedTarget) -> Callable[..., torch.Tensor]:
        return partial(token_cross_entropy, labels=target.labels, partner=target.partner, smoothing=self.smoothing)


def _weighted_means(ces: dict[str, torch.Tensor], weights: dict) -> dict[str, torch.Tensor]:
    """Means over images and tokens of weight * cross-entropy [B, T]; a weight is one number, or [B, 1]."""
    return {
        name: (weights[name] * ce).mean() if getattr(weights[name], "ndim", 0) else weights[name] * ce.mean()
        for name, ce in ces.items()
    }


def _check_patches(output, target: MixedTarget | torch.Tensor) -> int:
    """The number of patches, or an error if patch logits or patch labels are not there."""
    if not isinstance(target, MixedTarget):
        raise TypeError(
            "mixing needs a label for every patch: the MixedTarget of a PatchMixup, not labels of the images alone"
        )
    logits, lam = (None if t is None else [*t.shape[:2]] for t in (output.patch_logits, target.patch_lam))
    if logits is None or logits != lam:
        raise ValueError(
            f"mixing needs patch logits and labels of the same [batch, patches]; got {logits} and {lam}. Build "
            "TappedViT with patch_logits=True and PatchMixup with the model's patch grid"
        )
    return logits[1]


def _check_labels(labels: torch.Tensor, logits: torch.Tensor):
    """Raise for labels that do not fit the logits [B, C]; the range is checked on a CPU alone, as a GPU would wait."""
    soft = labels.is_floating_point()
    if labels.shape != (logits.shape if soft else logits.shape[:1]):
        raise ValueError(
            f"logits of shape {[*logits.shape]} need labels [B], integers, or [B, C], floats; got "
            f"{labels.dtype} of shape {[*labels.shape]}"
        )
    if soft or labels.device.type != "cpu" or torch.compiler.is_compiling() or not len(labels):
        return
    low, high = labels.min().item(), labels.max().item()
    if low < 0 or high >= logits.shape[1]:
        raise ValueError(
            f"labels must be from 0 to {logits.shape[1] - 1} for logits of {logits.shape[1]} classes; got "
            f"{low if low < 0 else high}. Build the model with the num_classes of the data, and count labels from 0"
        )
