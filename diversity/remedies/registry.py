"""The registry of remedies: what a remedy is, and the decorator that enters one.

A remedy is one decorated `nn.Module` class. The keyword-only parameters of its constructor are its settings, and its
methods are what it changes in a block, see `NEEDS`. Flags, checks, table and tests follow from its entry in `REMEDIES`.
"""

import inspect
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
        super().__init__(f"{type(model).__name__} cannot take the remedy {remedy}: {missing}")
        self.remedy = remedy


@dataclass(frozen=True)
class Remedy:
    """A change of the architecture, applied to a stock model by hooks.

    Attributes:
        name: its name, and the prefix of its parameters in the state_dict, `remedies.<name>.`
        formula: the first paragraph of its docstring on one line.
        doc: its docstring.
        source: the paper.
        settings: {name: default}.
        needs: what it reads or changes in a block, names of `sites.NEEDS`.
        module: the class that computes it and has its parameters.
    """

    name: str
    formula: str
    doc: str
    source: str
    settings: dict[str, object]
    needs: tuple[str, ...]
    module: type[nn.Module]

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
"""Every remedy under its name, in the order in which several change a model."""


def remedy(name: str, *needs: str) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Enter the decorated class into `REMEDIES`.

    Args:
        name: the remedy's name.
        needs: what it reads or changes in a block, names of `sites.NEEDS`.
    """

    def enter(module: type[nn.Module]) -> type[nn.Module]:
        doc = inspect.getdoc(module)
        parameters = inspect.signature(module).parameters.values()
        settings = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
        taken = {setting for other in REMEDIES.values() for setting in other.settings}
        assert name not in REMEDIES, f"{name} is entered twice"
        assert not taken & settings.keys(), f"a setting of {name} has the name of another remedy's"
        formula = " ".join(doc.split("\n\n")[0].split())
        source = " ".join(re.search(r"^Source: (.*(?:\n(?!\w+:).*)*)", doc, flags=re.MULTILINE)[1].split())
        REMEDIES[name] = Remedy(name, formula, doc, source.rstrip("."), settings, needs, module)
        return module

    return enter


def find_remedy(name: str) -> Remedy:
    """The remedy of a name.

    Raises:
        ValueError: there is none.
    """
    if name not in REMEDIES:
        near = did_you_mean(name, REMEDIES, f"; there are {', '.join(REMEDIES)}")
        raise ValueError(f"unknown remedy {name!r}{near}")
    return REMEDIES[name]


def remedies_table() -> str:
    """The table of remedies in the docs, one row per entry of `REMEDIES`."""
    rows = ["| remedy | formula | settings (default) | source |", "|---|---|---|---|"]
    for entry in REMEDIES.values():
        settings = ", ".join(f"`{name}={value}`" for name, value in entry.settings.items()) or "none"
        formula = entry.formula.replace("|", "\\|")
        rows.append(f"| `{entry.name}` | {formula} | {settings} | {entry.source} |")
    return "\n".join(rows)
