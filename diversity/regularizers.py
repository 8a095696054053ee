"""The registry of diversity terms: what a term is, and the decorator that enters one.

A term is one decorated function. Its parameters name the taps it reads; everything else (command-line flag, hooks, log
column, README row, tests) follows from its entry in `REGULARIZERS`.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

LEVELS = ("embedding", "attention", "weight")


@dataclass(frozen=True)
class Regularizer:
    """One diversity term: a pure function of tapped tensors that returns a 0-dim tensor to be minimised.

    Call it with its taps as keyword arguments, `term(last=tokens)`. It computes in float32, or float64 when given it,
    also under autocast.

    Attributes:
        name: the term's name and the stem of its flag, `--<name>_coef`.
        level: "embedding", "attention" or "weight".
        reads: names of the taps it needs, in the order of its parameters.
        options: {name: default} of its settings, which are flags too: `cond_orth_steps` is `--cond-orth-steps`.
        doc: its docstring.
        coef: coefficient in the paper's training runs; 0 where the paper's runs leave the term off.
        skips_prefix: whether it takes `num_prefix_tokens`, and then `first` and `last` with their prefix tokens.
        function: the decorated function.
    """

    name: str
    level: str
    reads: tuple[str, ...]
    options: dict[str, object]
    doc: str
    coef: float
    skips_prefix: bool
    function: Callable[..., torch.Tensor]

    def __call__(self, **taps) -> torch.Tensor:
        missing = [name for name in self.reads if taps.get(name) is None]
        if missing:
            raise TypeError(f"{self.name} reads {', '.join(self.reads)}; missing: {', '.join(missing)}")
        device_type = next(_tensors(taps[self.reads[0]])).device.type
        with torch.autocast(device_type=device_type, enabled=False):
            return self.function(**{name: _full_precision(value) for name, value in taps.items()})

    @property
    def formula(self) -> str:
        """The first paragraph of the docstring on one line, for tables."""
        return " ".join(self.doc.split("\n\n")[0].split())

    def option_help(self, option: str) -> str:
        """The line about an option in the docstring's Args; without one, which term has the option."""
        found = re.search(rf"^ +{option}: (.*(?:\n {{8,}}.*)*)", self.doc, flags=re.MULTILINE)
        return " ".join(found[1].split()).rstrip(".") if found else f"setting of {self.name}"


class _Registry(dict):
    def __missing__(self, name: str) -> Regularizer:
        if name in ALIASES:
            return self[ALIASES[name]]
        raise KeyError(name)


REGULARIZERS: dict[str, Regularizer] = _Registry()
"""Every term under its name; looking up an alias finds its term too."""

ALIASES: dict[str, str] = {}
"""{other name of a term: its name}."""


def regularizer(level: str, coef: float = 0.0, alias: str | None = None):
    """Enter the decorated function into `REGULARIZERS` under its own name.

    The function's positional parameters are the taps it reads; keyword-only parameters are options with a default,
    `probes`, the random start vectors it draws when given none, and `num_prefix_tokens`, see `Regularizer`.

    Args:
        level: one of `LEVELS`.
        coef: coefficient in the paper's training runs.
        alias: another name of the term, for `ALIASES`.
    """
    assert level in LEVELS, f"unknown level {level!r}"

    def enter(function: Callable[..., torch.Tensor]) -> Regularizer:
        parameters = inspect.signature(function).parameters
        reads = tuple(name for name, p in parameters.items() if p.kind is not inspect.Parameter.KEYWORD_ONLY)
        no_options = (*reads, "probes", "num_prefix_tokens")
        options = {name: p.default for name, p in parameters.items() if name not in no_options}
        skips_prefix = "num_prefix_tokens" in parameters
        assert function.__name__ not in REGULARIZERS, f"{function.__name__} is entered twice"
        doc = inspect.getdoc(function) or function.__name__
        term = Regularizer(function.__name__, level, reads, options, doc, coef, skips_prefix, function)
        REGULARIZERS[term.name] = term
        if alias is not None:
            ALIASES[alias] = term.name
        return term

    return enter


def resolve_aliases(coefs: Mapping[str, float]) -> dict[str, float]:
    """Coefficients with the names of `REGULARIZERS` in place of aliases.

    Raises:
        ValueError: a term has a coefficient under both of its names.
    """
    resolved = {}
    for name, coef in coefs.items():
        term = ALIASES.get(name, name)
        if coef and resolved.get(term):
            alias = next(alias for alias in ALIASES if ALIASES[alias] == term)
            raise ValueError(f"{alias} is another name of {term}; give one of them a coefficient, not both")
        resolved[term] = coef or resolved.get(term, coef)
    return resolved


def markdown_table() -> str:
    """The table of terms in the docs, one row per entry of `REGULARIZERS`."""
    aliases = {name: f" Alias: `--{alias}_coef`." for alias, name in ALIASES.items()}
    rows = ["| flag | level | reads | paper's value | minimises |", "|---|---|---|---|---|"]
    for term in REGULARIZERS.values():
        reads = ", ".join(f"`{tap}`" for tap in term.reads)
        coef = f"{term.coef:g}" if term.coef else "off"
        rows.append(
            f"| `--{term.name}_coef` | {term.level} | {reads} | {coef} | {term.formula}{aliases.get(term.name, '')} |"
        )
    return "\n".join(rows)


def _tensors(value) -> Iterator[torch.Tensor]:
    """The tensors of a tap: one, or a sequence of them."""
    return iter([value] if torch.is_tensor(value) else value)


def _full_precision(value):
    """Half-precision tensors, alone or in a sequence, as float32; everything else as it is."""
    if isinstance(value, (tuple, list)):
        return [_full_precision(item) for item in value]
    return value.float() if torch.is_tensor(value) and value.dtype in (torch.float16, torch.bfloat16) else value
