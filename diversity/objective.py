"""DiversityObjective: the training loss as the weighted sum of the classification loss and the terms."""

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from .cross_entropy import token_cross_entropy
from .mixing import MixedTarget
from .regularizers import ALIASES, REGULARIZERS, resolve_aliases
from .spelling import did_you_mean
from .taps import TapOutput

MIXING = "mixing"
MIXING_BALANCES = ("tokens", "equal")
DERIVED_FROM = {"grad": "tokens"}
"""{what a term reads and the model does not return: the tap from which the objective computes it}."""


class DiversityObjective(nn.Module):
    """loss = classification + sum over terms of coefficient * term.

    classification = (CE_cls + c * sum_p CE_p) / (1 + c * P) with c the "mixing" coefficient: the class token and the P
    patch tokens through one shared head, each against its own mixed label. This gives the class token a weight of only
    1 / (1 + c * P); "equal" balance is (CE_cls + c * mean_p CE_p) / (1 + c). With distillation, classification is
    (1 - alpha) of the above plus alpha times the distillation loss.

    Args:
        coefs: {name of a term in REGULARIZERS, its alias, or "mixing": coefficient >= 0}. A term at 0 is not computed,
            and `reads` does not ask for its taps.
        smoothing: label smoothing, in [0, 1).
        distillation: None, or a callable (samples, logits) -> 0-dim loss with an attribute `alpha` in [0, 1]; it is
            given the logits of the distillation head where the model has one, the class logits otherwise.
        mixing_balance: "tokens" or "equal".
        options: settings of the terms, such as cond_orth_steps=5; each is passed to the terms that have it.

    Raises:
        ValueError: an unknown name, a coefficient that is negative or not finite, a coefficient for a term and for its
            alias, or a smoothing outside [0, 1).
        TypeError: an unknown option.

    Source: The Principle of Diversity; coefficients of its runs are each term's `coef`.
    Differs: the mixing coefficient is a multiplier, where the released code reads it as a switch; equal balance.

    Attributes:
        coefs: the active coefficients, without aliases.
        options: the settings of the active terms that were given.
        reads: names of the taps the active terms need, for `TappedViT`.
        patch_logits: whether they need patch logits.
    """

    def __init__(
        self,
        coefs: Mapping[str, float],
        smoothing: float = 0.0,
        distillation: Callable[..., torch.Tensor] | None = None,
        mixing_balance: str = "tokens",
        **options,
    ):
        super().__init__()
        _check(coefs, smoothing, mixing_balance, options)
        coefs = resolve_aliases(coefs)
        self.coefs = {name: float(coefs[name]) for name in (MIXING, *REGULARIZERS) if coefs.get(name)}
        self.smoothing = smoothing
        self.distillation = distillation
        self.mixing_balance = mixing_balance
        self.terms = {name: REGULARIZERS[name] for name in self.coefs if name != MIXING}
        self.options = {
            name: {option: options[option] for option in term.options if option in options}
            for name, term in self.terms.items()
        }
        self.patch_logits = MIXING in self.coefs
        self.reads = sorted({DERIVED_FROM.get(tap, tap) for term in self.terms.values() for tap in term.reads})

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
            target: from `PatchMixup`; or, without mixing, integer labels [B] or soft ones [B, C] such as those of
                timm's Mixup. Smoothing applies to all of them.
            samples: [B, 3, S, S], the mixed images; only read by `distillation`.
            probes: {term: start vectors} for terms that draw random ones, to fix them.

        Returns:
            The 0-dim loss, and {name: detached 0-dim tensor} with the raw value of "classification", of its components
            "cls_ce", "mixing" (the patch tokens' mean cross-entropy) and "distillation", and of every active term. A
            name with "_share" appended is the component's or term's fraction of the loss; these fractions sum to 1.

        Raises:
            TypeError: `output` is the plain logits of eval mode, or lacks what a term reads; or mixing is on, and
                `target` has no patch labels.
            ValueError: labels that do not fit the logits; a term reads the gradient at tokens that need none; or mixing
                is on, and patch logits and patch labels are not there for the same patches.
        """
        loss, values = self.loss_and_values(output, target, samples, probes)
        return loss, dict(zip(self.names, values.unbind(), strict=True))

    def loss_and_values(self, output, target, samples=None, probes=None) -> tuple[torch.Tensor, torch.Tensor]:
        """What `forward` returns, with the values of `names` as one tensor [n].

        Compiled, a loss without any term and its detached copy would otherwise be one output, without a gradient.
        """
        if not isinstance(output, TapOutput):
            raise TypeError(
                f"the objective needs the TapOutput of a TappedViT in training mode; got {type(output).__name__}"
            )
        classification, raw, weighted = self._classification(output, target, samples)
        taps = output._asdict()
        if output.tokens is not None and self.readers("tokens"):
            taps["grad"] = _token_gradient(classification, output.tokens)
        for name, term in self.terms.items():
            fixed = {"probes": probes[name]} if probes and name in probes else {}
            settings = self.options[name] | fixed
            source = taps
            if term.skips_prefix and output.with_prefix:
                source = output.with_prefix
                settings["num_prefix_tokens"] = output.num_prefix_tokens
            raw[name] = term(**{tap: source.get(tap) for tap in term.reads}, **settings)
            weighted[name] = self.coefs[name] * raw[name]
        loss = classification + sum(weighted[name] for name in self.terms)
        shares = [part / loss for part in weighted.values()]
        return loss, torch.stack([classification, *raw.values(), *shares]).detach()

    def _classification(self, output, target, samples):
        """The classification loss, and the raw and the weighted values of its components."""
        is_mixed = isinstance(target, MixedTarget)
        _check_labels(target.labels if is_mixed else target, output.logits)
        if is_mixed:
            cross_entropy = partial(
                token_cross_entropy, labels=target.labels, partner=target.partner, smoothing=self.smoothing
            )
            cls_logits, cls_lam = output.logits[:, None], target.lam[:, None]
        if MIXING not in self.coefs:
            if is_mixed:
                ce = cross_entropy(cls_logits, lam=cls_lam).mean()
            else:
                with torch.autocast(device_type=target.device.type, enabled=False):
                    logits = output.logits.to(torch.promote_types(output.logits.dtype, torch.float32))
                    ce = F.cross_entropy(logits, target, label_smoothing=self.smoothing)
            raw, weights = {"cls_ce": ce}, {"cls_ce": 1.0}
        elif not is_mixed:
            raise TypeError(
                "mixing needs a label for every patch: the MixedTarget of a PatchMixup, not labels of the images alone"
            )
        else:
            logits, lam = (None if t is None else [*t.shape[:2]] for t in (output.patch_logits, target.patch_lam))
            if logits is None or logits != lam:
                raise ValueError(
                    f"mixing needs patch logits and labels of the same [batch, patches]; got {logits} and {lam}. Build "
                    "TappedViT with patch_logits=True and PatchMixup with the model's patch grid"
                )
            num_patches = logits[1]
            patches = self.coefs[MIXING] * (num_patches if self.mixing_balance == "tokens" else 1)
            weights = {"cls_ce": 1 / (1 + patches), MIXING: patches / (1 + patches)}
            if output.token_logits is None:
                raw = {
                    "cls_ce": cross_entropy(cls_logits, lam=cls_lam).mean(),
                    MIXING: cross_entropy(output.patch_logits, lam=target.patch_lam).mean(),
                }
                ce = sum(weights[name] * raw[name] for name in raw)
            else:  # one pass over the logits, whose gradient takes one weight a token
                token_ce = cross_entropy(output.token_logits, lam=torch.cat((cls_lam, target.patch_lam), dim=1))
                is_class_token = torch.arange(1 + num_patches, device=token_ce.device) == 0
                patch_weight = token_ce.new_full((), weights[MIXING] / num_patches)
                token_weights = torch.where(is_class_token, weights["cls_ce"], patch_weight)
                ce = (token_ce * token_weights).sum(dim=1).mean()
                token_ce = token_ce.detach()
                raw = {"cls_ce": token_ce[:, 0].mean(), MIXING: token_ce[:, 1:].mean()}
        if self.distillation is not None:
            student = output.logits if output.dist_logits is None else output.dist_logits
            raw["distillation"] = self.distillation(samples, student)
            alpha = self.distillation.alpha
            weights = {name: weight * (1 - alpha) for name, weight in weights.items()} | {"distillation": alpha}
            ce = (1 - alpha) * ce + alpha * raw["distillation"]
        return ce, raw, {name: weights[name] * raw[name] for name in raw}

    @property
    def names(self) -> list[str]:
        """The keys of the values that `forward` returns, in their order: raw values, then fractions of the loss."""
        parts = ["cls_ce", *([MIXING] if self.patch_logits else []), *(["distillation"] if self.distillation else [])]
        parts += self.terms
        return ["classification", *parts, *(f"{name}_share" for name in parts)]

    def readers(self, tap: str) -> list[str]:
        """Names of the active terms that need a tap of `reads`, or "patch_logits"."""
        if tap == "patch_logits":
            return [MIXING]
        return [
            name for name, term in self.terms.items() if tap in [DERIVED_FROM.get(read, read) for read in term.reads]
        ]

    @property
    def differentiating(self) -> list[str]:
        """Names of the active terms that read a gradient, which torch.compile computes wrongly."""
        return [name for name, term in self.terms.items() if DERIVED_FROM.keys() & set(term.reads)]

    def table(self) -> str:
        """The active terms, one line each: name, coefficient, what it reads and its settings."""
        lines = [f"{'term':<28}{'coefficient':>12}  reads"]
        for name, coef in self.coefs.items():
            if name == MIXING:
                reads = f"patch logits, per-patch labels; mixing_balance={self.mixing_balance}"
            else:
                settings = [f"{option}={value}" for option, value in self.options[name].items() if value is not False]
                reads = "; ".join([", ".join(self.terms[name].reads), *settings])
            lines.append(f"{name:<28}{coef:>12g}  {reads}")
        return "\n".join(lines if self.coefs else ["no diversity term: plain training"])


def _check(coefs, smoothing, mixing_balance, options):
    """Raise for arguments of `DiversityObjective` that it cannot take."""
    known = (MIXING, *REGULARIZERS, *ALIASES)
    for name, coef in coefs.items():
        if name not in known:
            hint = did_you_mean(name, known, f"; there are {', '.join(known)}")
            raise ValueError(f"unknown term {name!r}{hint}")
        if not (math.isfinite(coef) and coef >= 0):
            raise ValueError(f"the coefficient of {name} must be a finite number >= 0; got {coef}")
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing must lie in [0, 1); got {smoothing}")
    if mixing_balance not in MIXING_BALANCES:
        raise ValueError(f"unknown mixing_balance {mixing_balance!r}; there are {', '.join(MIXING_BALANCES)}")
    unknown = sorted(set(options) - {option for term in REGULARIZERS.values() for option in term.options})
    if unknown:
        raise TypeError(f"no term has an option {unknown[0]!r}")


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


def _token_gradient(classification: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Gradient of the classification loss at the output of the last block, [B, N, D], itself differentiable.

    It passes the final norm and the head only. Times the number of tokens, so that half precision does not flush it
    to zero.
    """
    if not tokens.requires_grad:
        raise ValueError("the gradient at the tokens is read, but none flows to them: is the backbone frozen?")
    count = tokens.shape[:-1].numel()
    return torch.autograd.grad(classification * count, tokens, create_graph=True)[0].flatten(1, -2)
