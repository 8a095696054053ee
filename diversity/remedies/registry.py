"""The registry of remedies: what a remedy is, and the decorator that enters one.

A remedy is one decorated `nn.Module` class. The keyword-only parameters of its constructor are its settings. Flags,
checks, table and tests follow from its entry in `REMEDIES`.
"""

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from ..spelling import did_you_mean


class RemedyError(ValueError):
    """The model lacks what a remedy needs.

    Attributes:
        remedy: name of the remedy.
    """

    def __init__(self, remedy: str, model: nn.Module, missing: str):
        super().__init__(f"{type(model).__name__} cannot have the remedy {remedy}: {missing}")
        self.remedy = remedy


@dataclass(frozen=True)
class Remedy:
    """A change of the architecture, applied to a stock model by hooks.

    Attributes:
        name: its name, and the prefix of its parameters in the state_dict, `remedies.<name>.`
        formula: the first paragraph of its docstring on one line.
        doc: its docstring.
        parameters: the numbers that it learns, in words.
        source: the paper.
        settings: {name: default}.
        changes: the tensors of a block that it replaces, names of `sites.CHANGED`.
        reads: the tensors of a block that it also reads, names of `sites.READ`.
        module: the class that computes it and has its parameters.
    """

    name: str
    formula: str
    doc: str
    parameters: str
    source: str
    settings: dict[str, object]
    changes: tuple[str, ...]
    reads: tuple[str, ...]
    module: type[nn.Module]

    @property
    def needs(self) -> tuple[str, ...]:
        """All tensors of a block that it changes or reads."""
        return (*self.changes, *self.reads)

    def setting_help(self, setting: str) -> str:
        """The line about a setting in the docstring's Args."""
        found = re.search(rf"^ +{setting}: (.*(?:\n {{8,}}.*)*)", self.doc, flags=re.MULTILINE)
        return " ".join(found[1].split()).rstrip(".")

    def check_settings(self, settings: dict[str, object]):
        """Raise ValueError for a setting that the remedy does not have."""
        for setting in settings:
            if setting not in self.settings:
                has = f"its settings are {', '.join(self.settings)}" if self.settings else "it has no settings"
                near = did_you_mean(setting, self.settings, f"; {has}")
                raise ValueError(f"unknown setting {setting!r} of the remedy {self.name}{near}")


REMEDIES: dict[str, Remedy] = {}
"""Every remedy under its name, in the order in which several change a tensor."""


def remedy(name: str, changes: tuple[str, ...], reads: tuple[str, ...] = ()) -> Callable:
    """Enter the decorated class into `REMEDIES`.

    Its constructor takes a list with the `sites.BlockShape` of each block, and the settings. Its forward pass takes the
    index of a block, a tensor of that block and the tensors that the remedy reads. It returns what replaces the tensor.

    Args:
        name: the remedy's name.
        changes: the tensors it replaces, names of `sites.CHANGED`. A module that replaces fewer, depending on its
            settings, has them as its attribute `changes`.
        reads: the tensors it also reads, names of `sites.READ`.
    """

    def enter(module: type[nn.Module]) -> type[nn.Module]:
        doc = inspect.getdoc(module)
        parameters = inspect.signature(module).parameters.values()
        settings = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
        taken = {setting for other in REMEDIES.values() for setting in other.settings}
        assert name not in REMEDIES, f"{name} is entered twice"
        assert not taken & settings.keys(), f"a setting of {name} has the name of another remedy's"
        formula = " ".join(doc.split("\n\n")[0].split())
        lines = _section(doc, "Parameters"), _section(doc, "Source")
        REMEDIES[name] = Remedy(name, formula, doc, *lines, settings, changes, reads, module)
        return module

    return enter


def _section(doc: str, title: str) -> str:
    """The text of a section of a docstring that begins with `title: ` on one line, without the full stop."""
    found = re.search(rf"^{title}: (.*(?:\n(?!\w+:|$).*)*)", doc, flags=re.MULTILINE)
    return " ".join(found[1].split()).rstrip(".")


def find_remedy(name: str) -> Remedy:
    """The remedy of a name.

    Raises:
        ValueError: there is none.
    """
    if name not in REMEDIES:
        near = did_you_mean(name, REMEDIES, f"; there are {', '.join(REMEDIES)}")
        raise ValueError(f"unknown remedy {name!r}{near}")
    return REMEDIES[name]


def check_number(setting: str, value: object, at_least: float = -math.inf, above: float = -math.inf) -> float:
    """The value of a setting, or ValueError where it is not a finite number, or too small."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or value < at_least or value <= above:
        bounds = {" of at least": at_least, " above": above}
        bound = "".join(f"{words} {number:g}" for words, number in bounds.items() if number > -math.inf)
        raise ValueError(f"{setting} must be a finite number{bound}; got {value!r}")
    return value


def check_integer(setting: str, value: object, at_least: int) -> int:
    """The value of a setting, or ValueError where it is not an integer, or too small."""
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ValueError(f"{setting} must be an integer of at least {at_least}; got {value!r}")
    return value


def check_switch(setting: str, value: object) -> bool:
    """The value of a setting, or ValueError where it is not True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{setting} must be True or False; got {value!r}")
    return value


def remedies_table() -> str:
    """The table of remedies in the docs, one row per entry of `REMEDIES`."""
    rows = ["| remedy | formula | parameters | settings (default) | source |", "|---|---|---|---|---|"]
    for entry in REMEDIES.values():
        settings = ", ".join(f"`{name}={value}`" for name, value in entry.settings.items()) or "none"
        formula = entry.formula.replace("|", "\\|")
        rows.append(f"| `{entry.name}` | {formula} | {entry.parameters} | {settings} | {entry.source} |")
    return "\n".join(rows)
