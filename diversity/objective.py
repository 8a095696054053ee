"""DiversityObjective: the one place where the terms are weighed and summed into the training loss."""

import difflib
import math
from collections.abc import Callable, Mapping

import torch
from torch import nn

from .mixing import MixedTarget, token_cross_entropy
from .regularizers import REGULARIZERS
from .taps import TapOutput

MIXING = "mixing"


class DiversityObjective(nn.Module):
    """loss = classification + sum over terms of coefficient * term.

    classification = (CE_cls + c * sum_p CE_p) / (1 + c * P) with c the "mixing" coefficient: the class token and the P
    patch tokens through one shared head, each against its own mixed label. With distillation, classification is
    (1 - alpha) of the above plus alpha times the distillation loss.

    Args:
        coefs: {name of a term in REGULARIZERS, or "mixing": coefficient >= 0}. A term at 0 is not computed, and `reads`
            does not ask for its taps.
        smoothing: label smoothing, in [0, 1).
        distillation: None, or a callable (samples, logits) -> 0-dim loss with an attribute `alpha` in [0, 1]; it is
            given the logits of the distillation head where the model has one, the class logits otherwise.

    Raises:
        ValueError: an unknown name, a coefficient that is negative or not finite, a smoothing outside [0, 1).

    Source: The Principle of Diversity; coefficients of its runs are each term's `coef`.
    Differs: the mixing coefficient is a multiplier, where the released code reads it as a switch.

    Attributes:
        coefs: the active coefficients.
        reads: names of the taps the active terms need, for `TappedViT`.
        patch_logits: whether they need patch logits.
    """

    def __init__(
        self,
        coefs: Mapping[str, float],
        smoothing: float = 0.0,
        distillation: Callable[..., torch.Tensor] | None = None,
    ):
        super().__init__()
        known = (MIXING, *REGULARIZERS)
        for name, coef in coefs.items():
            if name not in known:
                near = difflib.get_close_matches(name, known, n=3) or known
                raise ValueError(f"unknown term {name!r}; there are {', '.join(near)}")
            if not (math.isfinite(coef) and coef >= 0):
                raise ValueError(f"the coefficient of {name} must be a finite number >= 0; got {coef}")
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must lie in [0, 1); got {smoothing}")
        self.coefs = {name: float(coefs[name]) for name in known if coefs.get(name)}
        self.smoothing = smoothing
        self.distillation = distillation
        self.patch_logits = MIXING in self.coefs
        self.reads = sorted({tap for name in self.coefs if name != MIXING for tap in REGULARIZERS[name].reads})

    def forward(
        self,
        output: TapOutput,
        target: MixedTarget,
        samples: torch.Tensor | None = None,
        probes: Mapping[str, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of one training step and what it is made of.

        Args:
            output: from a `TappedViT` built with this objective's `reads` and `patch_logits`.
            target: from `PatchMixup`.
            samples: [B, 3, S, S], the mixed images; only read by `distillation`.
            probes: {term: start vectors} for terms that draw random ones, to fix them.

        Returns:
            The 0-dim loss, and {name: detached 0-dim tensor} with the raw value of "classification", of its parts
            "cls_ce", "mixing" (the patch tokens' mean cross-entropy) and "distillation", and of every active term. A
            key with "_share" appended holds the part's share of the loss; the shares of the parts sum to 1.

        Raises:
            TypeError: `output` is the plain logits of eval mode.
            ValueError: mixing is on, and patch logits and patch labels are not there for the same patches.
        """
        if not isinstance(output, TapOutput):
            raise TypeError(
                f"the objective needs the TapOutput of a TappedViT in training mode; got {type(output).__name__}"
            )
        raw, weighted = self._classification(output, target, samples)
        classification = sum(weighted.values())
        for name, coef in self.coefs.items():
            if name == MIXING:
                continue
            taps = {tap: getattr(output, tap) for tap in REGULARIZERS[name].reads}
            if probes and name in probes:
                taps["probes"] = probes[name]
            raw[name] = REGULARIZERS[name](**taps)
            weighted[name] = coef * raw[name]
        loss = sum(weighted.values())
        terms = {"classification": classification, **raw}
        terms |= {f"{name}_share": part / loss for name, part in weighted.items()}
        return loss, {name: value.detach() for name, value in terms.items()}

    def _classification(self, output, target, samples):
        """Raw and weighted parts of the classification loss."""
        cls_lam = target.lam[:, None]
        cls_ce = token_cross_entropy(
            output.logits[:, None], target.labels, target.partner, cls_lam, self.smoothing
        ).mean()
        raw, weights = {"cls_ce": cls_ce}, {"cls_ce": 1.0}
        if MIXING in self.coefs:
            logits, lam = (None if t is None else [*t.shape[:2]] for t in (output.patch_logits, target.patch_lam))
            if logits is None or logits != lam:
                raise ValueError(
                    f"mixing needs patch logits and labels of the same [batch, patches]; got {logits} and {lam}. Build "
                    "TappedViT with patch_logits=True and PatchMixup with the model's patch grid"
                )
            patch_ce = token_cross_entropy(
                output.patch_logits, target.labels, target.partner, target.patch_lam, self.smoothing
            )
            patches = self.coefs[MIXING] * patch_ce.shape[1]
            raw[MIXING] = patch_ce.mean()
            weights = {"cls_ce": 1 / (1 + patches), MIXING: patches / (1 + patches)}
        if self.distillation is not None:
            student = output.logits if output.dist_logits is None else output.dist_logits
            raw["distillation"] = self.distillation(samples, student)
            weights = {name: weight * (1 - self.distillation.alpha) for name, weight in weights.items()}
            weights["distillation"] = self.distillation.alpha
        return raw, {name: weights[name] * raw[name] for name in raw}

    def table(self) -> str:
        """The active terms, one line each: name, coefficient and what it reads."""
        lines = [f"{'term':<24}{'coefficient':>12}  reads"]
        for name, coef in self.coefs.items():
            reads = "patch logits, per-patch labels" if name == MIXING else ", ".join(REGULARIZERS[name].reads)
            lines.append(f"{name:<24}{coef:>12g}  {reads}")
        return "\n".join(lines if self.coefs else ["no diversity term: plain training"])
