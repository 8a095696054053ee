"""The models of an atlas: the words of its command line, and files of families.

    DINOv2:
      - vit_small_patch14_dinov2.lvd142m
      - {name: mine, run: runs/mine/seed0}
      - {name: S/14, run: dinov2.safetensors, model: vit_small_patch14_dinov2, input_size: 98}

Each family has a list of models. A model is a RUN of analyze.py, or `run` with a `name` for the page and flags of
main.py without hyphens in front, over which the command line wins. A path in a file is relative to it.
"""

from pathlib import Path
from typing import NamedTuple

import timm

from diversity.spelling import did_you_mean
from training import arguments
from training.flag_files import read_pairs
from training.parsing import words_of
from utils import errors_of

PUBLISHED = Path(__file__).parents[1] / "recipes" / "atlas.yaml"
"""The list of an atlas without RUN."""
NOT_OF_A_MODEL = (
    *("data_set", "data_path", "val_split", "val_fraction", "eval"),
    *("device", "seed", "output_dir"),
)
"""Flags that are the same for all models of an atlas."""
KINDS = (".yaml", ".yml")


class Entry(NamedTuple):
    """A model of a list.

    Attributes:
        name: on the page; no two models have the same.
        family: with which it is drawn; empty where it is known only after the model is: the name of its timm model.
        run: its RUN.
        flags: words of main.py.
    """

    name: str
    family: str
    run: str
    flags: list[str]


def read_entries(runs: list[str]) -> list[Entry]:
    """The models that the RUNs of an atlas name, those of `PUBLISHED` for none; a RUN may be a file of families.

    Raises:
        SystemExit: a file cannot be read, has a model in another form, or two models have one name.
    """
    published = {entry.run: entry.family for entry in _read_list(PUBLISHED)}
    entries = []
    for run in runs or [str(PUBLISHED)]:
        is_list = run.endswith(KINDS) and not timm.is_model(run)
        entries += _read_list(Path(run)) if is_list else [Entry(run, published.get(run, ""), run, [])]
    names = [entry.name for entry in entries]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise SystemExit(f"error: two models of the atlas have the name {twice}; give each its `name` in a list")
    return entries


def _read_list(path: Path) -> list[Entry]:
    with errors_of("--atlas"):
        families = read_pairs(path, "family")
    entries = []
    for family, models in families.items():
        if not isinstance(models, list) or not models:
            raise SystemExit(f"error: {path}: the family {family} needs a list of models; it is {models!r}")
        entries += [_entry(path, str(family), model) for model in models]
    return entries


def _entry(path: Path, family: str, model: object) -> Entry:
    """One model of a list: a RUN, or a dict of `run`, `name` and flags."""
    of_model = model if isinstance(model, dict) else {"run": model}
    flags = {str(name).replace("-", "_"): value for name, value in of_model.items()}
    run, name = flags.pop("run", None), flags.pop("name", None)
    if not isinstance(run, str):
        raise SystemExit(f"error: {path}: a model of {family} needs `run`, a word; it is {model!r}")
    known = arguments.defaults().keys() - {*NOT_OF_A_MODEL, *arguments.NOT_REPEATED} | {"finetune", "config"}
    if unknown := next((flag for flag in flags if flag not in known), None):
        of_all = unknown in NOT_OF_A_MODEL
        hint = (
            "; give it on the command line, for all models"
            if of_all
            else did_you_mean(unknown, ["run", "name", *known])
        )
        raise SystemExit(f"error: {path}: {name or run} of {family} has {unknown}, which is no flag of a model{hint}")
    for flag in ("finetune", "config"):
        flags |= {flag: _beside(path, str(flags[flag]))} if flag in flags else {}
    words = [word for flag, value in flags.items() for word in words_of(flag, value)]
    return Entry(str(name or run), family, _beside(path, run), words)


def _beside(path: Path, run: str) -> str:
    """A RUN whose path is relative to a list as one relative to the working directory; any other unchanged."""
    beside = path.parent / Path(run).expanduser()
    return str(beside) if beside.exists() else run
