"""DiversityObjective: the training loss as the weighted sum of the classification loss and the terms."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import nn

from .classification import MIXING, MIXING_BALANCES, MIXING_WHERE, ClassificationLoss
from .mixing import MixedTarget
from .regularizers import ALIASES, REGULARIZERS, resolve_aliases
from .spelling import did_you_mean
from .taps import TapOutput

DERIVED_FROM = {"grad": "tokens"}
"""{what a term reads and the model does not return: the tap from which the objective computes it}."""


class DiversityObjective(nn.Module):
    """loss = classification + sum over terms of coefficient * term.

    classification = (CE_cls + c * sum_p CE_p) / (1 + c * P) with c the "mixing" coefficient, see `ClassificationLoss`.
    All coefficients, c included, may follow a schedule: they are multiplied by min(1, epoch / diversity_warmup), and by
    0 from the epoch `diversity_until` on. Call `set_epoch` at the start of each epoch then.

    Args:
        coefs: {name of a term in REGULARIZERS, its alias, or "mixing": coefficient >= 0}. A term at 0 is not computed,
            and `reads` does not ask for its taps.
        smoothing: label smoothing, in [0, 1).
        distillation: None, or a callable (samples, logits) -> 0-dim loss with an attribute `alpha` in [0, 1]; it is
            given the logits of the distillation head where the model has one, the class logits otherwise.
        mixing_balance: "tokens" or "equal": the weight of the class token beside the patch tokens.
        mixing_where: "always", or "cutmix": patch tokens count only in images whose patches have different labels.
        diversity_warmup: epochs over which the coefficients grow linearly from 0; 0 = no warm-up.
        diversity_until: the first epoch whose coefficients are 0, above `diversity_warmup`; None = no such epoch.
        options: settings of the terms, such as cond_orth_steps=5; each is passed to the terms that have it.

    Raises:
        ValueError: an unknown name, a coefficient that is negative or not finite, a coefficient for a term and for its
            alias, a smoothing outside [0, 1), or a schedule that ends before its warm-up.
        TypeError: an unknown option.

    Source: The Principle of Diversity; coefficients of its runs are each term's `coef`.
    Differs: see `ClassificationLoss`; the schedule.

    Attributes:
        coefs: the active coefficients, without aliases.
        options: the settings of the active terms that were given.
        reads: names of the taps the active terms need, for `TappedViT`.
        patch_logits: whether they need patch logits.
        factor: what the coefficients are multiplied by, a 0-dim buffer that `set_epoch` writes; None = no schedule.
    """

    def __init__(
        self,
        coefs: Mapping[str, float],
        smoothing: float = 0.0,
        distillation: Callable[..., torch.Tensor] | None = None,
        mixing_balance: str = "tokens",
        mixing_where: str = "always",
        diversity_warmup: int = 0,
        diversity_until: int | None = None,
        **options,
    ):
        super().__init__()
        _check(coefs, smoothing, mixing_balance, mixing_where, options)
        _check_schedule(diversity_warmup, diversity_until)
        coefs = resolve_aliases(coefs)
        self.coefs = {name: float(coefs[name]) for name in (MIXING, *REGULARIZERS) if coefs.get(name)}
        mixing = self.coefs.get(MIXING, 0.0)
        self.classification = ClassificationLoss(mixing, smoothing, distillation, mixing_balance, mixing_where)
        self.diversity_warmup, self.diversity_until = diversity_warmup, diversity_until
        is_scheduled = diversity_warmup > 0 or diversity_until is not None
        self.register_buffer("factor", torch.ones(()) if is_scheduled else None, persistent=False)
        self.has_epoch = not is_scheduled
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
            With a schedule, also "diversity_factor".

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
        classification, raw, weighted = self.components(output, target, samples, probes)
        loss = classification + sum(weighted[name] for name in self.terms)
        shares = [part / loss for part in weighted.values()]
        factors = [] if self.factor is None else [self.factor.to(loss)]
        return loss, torch.stack([classification, *raw.values(), *factors, *shares]).detach()

    def components(self, output, target, samples=None, probes=None):
        """What the loss is the sum of, with gradients, from the arguments of `forward`.

        Returns:
            The classification loss, 0-dim; {name: raw value} and {name: the part of the loss}, 0-dim, of its components
            and of the terms.
        """
        if not isinstance(output, TapOutput):
            raise TypeError(
                f"the objective needs the TapOutput of a TappedViT in training mode; got {type(output).__name__}"
            )
        if not self.has_epoch:
            raise ValueError("the coefficients follow a schedule: call set_epoch(epoch) at the start of each epoch")
        dtype = torch.promote_types(output.logits.dtype, torch.float32)
        factor = 1.0 if self.factor is None else self.factor.to(output.logits.device, dtype)
        classification, raw, weighted = self.classification(output, target, samples, factor)
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
            weighted[name] = factor * self.coefs[name] * raw[name]
        return classification, raw, weighted

    def set_epoch(self, epoch: int):
        """Set the coefficients to those of an epoch, counted from 0; without a schedule nothing changes.

        Raises:
            ValueError: a negative epoch, of which the coefficients would have the other sign.
        """
        if epoch < 0:
            raise ValueError(f"epochs are counted from 0; got {epoch}")
        if self.factor is not None:
            self.factor.fill_(self.factor_of(epoch))
            self.has_epoch = True

    def factor_of(self, epoch: int) -> float:
        """What the coefficients are multiplied by in an epoch: from 0 to 1."""
        if self.diversity_until is not None and epoch >= self.diversity_until:
            return 0.0
        return min(1.0, epoch / self.diversity_warmup) if self.diversity_warmup else 1.0

    @property
    def names(self) -> list[str]:
        """The keys of the values that `forward` returns, in their order: raw values, then fractions of the loss."""
        factor = [] if self.factor is None else ["diversity_factor"]
        return ["classification", *self.component_names, *factor, *(f"{name}_share" for name in self.component_names)]

    @property
    def component_names(self) -> list[str]:
        """Of what the loss is the sum of: the components of the classification loss, and the terms."""
        return [*self.classification.names, *self.terms]

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
                balance, where = self.classification.mixing_balance, self.classification.mixing_where
                reads = f"patch logits; mixing_balance={balance}; mixing_where={where}"
            else:
                settings = [f"{option}={value}" for option, value in self.options[name].items() if value is not False]
                reads = "; ".join([", ".join(self.terms[name].reads), *settings])
            lines.append(f"{name:<28}{coef:>12g}  {reads}")
        if self.coefs and self.diversity_warmup:
            lines.append(f"coefficients times min(1, epoch / {self.diversity_warmup})")
        if self.coefs and self.diversity_until is not None:
            lines.append(f"coefficients 0 from epoch {self.diversity_until} on")
        return "\n".join(lines if self.coefs else ["no diversity term: plain training"])


def _check(coefs, smoothing, mixing_balance, mixing_where, options):
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
    if mixing_where not in MIXING_WHERE:
        raise ValueError(f"unknown mixing_where {mixing_where!r}; there are {', '.join(MIXING_WHERE)}")
    unknown = sorted(set(options) - {option for term in REGULARIZERS.values() for option in term.options})
    if unknown:
        raise TypeError(f"no term has an option {unknown[0]!r}")


def _check_schedule(diversity_warmup, diversity_until):
    """Raise for a schedule of `DiversityObjective` that is none."""
    if not diversity_warmup >= 0:
        raise ValueError(f"diversity_warmup must be >= 0 epochs; got {diversity_warmup}")
    if diversity_until is not None and not diversity_until > diversity_warmup:
        raise ValueError(
            f"diversity_until must be above diversity_warmup, {diversity_warmup} epochs; got {diversity_until}"
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
