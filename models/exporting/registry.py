"""The registry of formats: what a format of exported weights is, and the decorator that enters one.

To add a format, write a function that writes its files into a folder and checks them, and decorate it with
`export_format`. The choices of `--to`, its help and the table of docs/export.md follow from the entry.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from models.exporting.trained import Trained


@dataclass(frozen=True)
class Written:
    """What a format has written.

    Attributes:
        usage: lines of Python that load the files from the folder `DIR`, for the model card.
        library: the name of the library that loads them, in the words of the Hugging Face hub.
        check: one line about the comparison of the files with the model.
        limits: one sentence for each thing that the files do not contain.
    """

    usage: str
    library: str
    check: str
    limits: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Format:
    """A format of exported weights.

    Attributes:
        name: the value of `--to`.
        doc: the first paragraph of its docstring: which files there are, and who loads them.
        extra: of pyproject.toml, which installs `packages`; empty if none are needed.
        packages: modules that it imports beyond those of this program.
        write: writes the files of a model into an empty folder, and checks them.
    """

    name: str
    doc: str
    extra: str
    packages: tuple[str, ...]
    write: Callable[[Trained, Path], Written]

    def check_packages(self):
        """Raises:
        ValueError: a package is not installed.
        """
        if lacks := [package for package in self.packages if find_spec(package) is None]:
            raise ValueError(f"needs {', '.join(lacks)}, which pip install '.[{self.extra}]' installs")


FORMATS: dict[str, Format] = {}
"""{value of --to: format}"""


def export_format(name: str, extra: str = "", packages: tuple[str, ...] = ()):
    """Enter the decorated function, which is `write`, into `FORMATS`.

    It raises a ValueError, whose text follows "--to NAME", for a model that the format cannot hold.
    """

    def enter(function: Callable[[Trained, Path], Written]):
        assert name not in FORMATS, f"{name} is entered twice"
        doc = " ".join(function.__doc__.split("\n\n")[0].split())
        FORMATS[name] = Format(name, doc, extra, packages, function)
        return function

    return enter


def formats_table() -> str:
    """The formats as a table of Markdown."""
    extras = {name: f" `[{entry.extra}]`" if entry.extra else "" for name, entry in FORMATS.items()}
    rows = [f"| `{name}` | {entry.doc} |{extras[name]} |" for name, entry in FORMATS.items()]
    return "\n".join(["| `--to` | files | needs |", "|---|---|---|", *rows])
