"""A study file: rows of flags, seeds and a recipe.

    recipe: ../deit_small.yaml    # flags of all runs, relative to this file; optional
    rows_from: paper.yaml         # a study file whose rows come before those below; optional
    seeds: [0, 1]                 # default: [0]
    baseline: plain               # the row that the others are compared with; default: plain
    flags: {epochs: 30}           # of all rows, over those of the recipe; optional
    analyze: --function-level     # words for analyze.py, which then measures each finished run; optional
    rows:
      plain: {}
      mixing: {mixing_coef: 1, model_kwargs: {reg_tokens: 4}}

Flags are those of main.py without hyphens in front. A flag with KEY=VALUE pairs, such as model_kwargs, adds its pairs
to those of `flags` and of the recipe; any other flag replaces theirs.
"""

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from diversity.spelling import did_you_mean
from models.flag_types import with_hyphens
from training.flag_files import read_flags, read_pairs

KEYS = ("recipe", "rows_from", "seeds", "baseline", "flags", "analyze", "rows")
NOT_OF_A_STUDY = (
    *("config", "seed", "output_dir", "resume", "resume_with_changes", "start_epoch"),
    *("eval", "check_data", "dry_run", "help"),
)
"""Flags that a study sets for each run, and those with which main.py trains no run or another one."""


@dataclass(frozen=True)
class Study:
    """A study file that has been read.

    Attributes:
        path: of the file.
        rows: {row: its own flags and their values}, in order.
        seeds: of each row.
        baseline: the row that the others are compared with.
        flags: of all rows, over those of the recipe.
        recipe: a file of flags; None without one.
        recipe_flags: its content.
        analyze: words for analyze.py; None if finished runs are not analysed.
    """

    path: Path
    rows: dict[str, dict[str, object]]
    seeds: list[int] = field(default_factory=lambda: [0])
    baseline: str = "plain"
    flags: dict[str, object] = field(default_factory=dict)
    recipe: Path | None = None
    recipe_flags: dict[str, object] = field(default_factory=dict)
    analyze: list[str] | None = None

    def chosen(self, rows: Sequence[str] | None, seeds: Sequence[int] | None) -> "Study":
        """The study with some of its rows, and with other seeds; None leaves them as they are.

        Raises:
            SystemExit: there is no such row.
        """
        for name in rows or ():
            if name not in self.rows:
                hint = did_you_mean(name, self.rows, f"; there are {', '.join(self.rows)}")
                raise SystemExit(f"error: --rows {name} is not a row of {self.path}{hint}")
        chosen = {name: self.rows[name] for name in rows or self.rows}
        return replace(self, rows=chosen, seeds=[*dict.fromkeys(seeds or self.seeds)])

    def flags_of(self, row: str) -> dict[str, object]:
        """The flags of a row over those of all rows; pairs are added to those of the recipe, too."""
        merged = {}
        for flags in (self.recipe_flags, self.flags, self.rows[row]):
            for name, value in flags.items():
                before = merged.get(name)
                merged[name] = before | value if isinstance(before, dict) and isinstance(value, dict) else value
        return {name: value for name, value in merged.items() if name in self.flags or name in self.rows[row]}


def read_study(path: Path) -> Study:
    """Read a study file, and those that it takes rows from.

    Raises:
        SystemExit: a file cannot be read, or has an unknown key or a value of another kind than above.
    """
    content = _read(path)
    for key in content:
        if key not in KEYS:
            hint = did_you_mean(str(key), KEYS, f"; there are {', '.join(KEYS)}, and `recipe` names a file of flags")
            raise SystemExit(f"error: {path} has an unknown key {key}{hint}")
    other = _read_other(path, str(content["rows_from"])) if "rows_from" in content else None
    rows = _check_rows(path, content.get("rows", {}), other.rows if other else {})
    seeds = content.get("seeds", [0])
    if (
        not isinstance(seeds, list)
        or not seeds
        or len({*map(str, seeds)}) < len(seeds)
        or not all(map(_is_seed, seeds))
    ):
        raise SystemExit(
            f"error: {path}: seeds must be a list of different integers from 0 to below 2^31; it is {seeds}"
        )
    baseline = content.get("baseline", other.baseline if other else "plain")
    if "baseline" in content and baseline not in rows:
        hint = did_you_mean(str(baseline), rows, f"; there are {', '.join(rows)}")
        raise SystemExit(f"error: {path}: baseline {baseline} is not a row{hint}")
    recipe = Path(os.path.normpath(path.parent / str(content["recipe"]))) if "recipe" in content else None
    return Study(
        path,
        rows,
        seeds,
        baseline,
        flags=_check_flags(f"{path}: flags", content.get("flags")),
        recipe=recipe,
        recipe_flags=_read_recipe(recipe) if recipe else {},
        analyze=_check_words(path, content["analyze"]) if "analyze" in content else None,
    )


def _read_other(path: Path, rows_from: str) -> Study:
    """The study file that another one takes rows from, which may not take rows from a third one."""
    other = path.parent / rows_from
    if (third := _read(other).get("rows_from")) is not None:
        raise SystemExit(f"error: {path} has rows_from {other}, which has rows_from {third}; name one that has `rows`")
    return read_study(other)


def _check_words(path: Path, text: object) -> list[str]:
    """The words for analyze.py."""
    try:
        if not isinstance(text, str | None):
            raise ValueError
        return shlex.split(text or "")
    except ValueError:
        raise SystemExit(f"error: {path}: analyze must be words for analyze.py; it is {text}") from None


def _read_recipe(path: Path) -> dict[str, object]:
    try:
        return read_flags(path)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key that is there twice is an error, and does not replace the first."""

    def construct_mapping(self, node, deep=False):
        keys = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        names = [self.construct_object(key, deep=True) for key in keys]
        for key, name in zip(keys, names, strict=True):
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(problem=f"{name} is there twice", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


def _read(path: Path) -> dict:
    try:
        return read_pairs(path, "key", _UniqueKeys)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


def _check_rows(path: Path, rows: object, others: dict) -> dict[str, dict]:
    """The rows of a file behind those of another one."""
    if not isinstance(rows, dict):
        raise SystemExit(f"error: {path}: rows must have a `name: {{flag: value}}` pair for each row; it is {rows}")
    for name in rows:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name) or name == "report":
            raise SystemExit(
                f"error: {path}: row {name} cannot name a folder of runs: take letters, digits, _ . + and -, in quotes "
                "if YAML reads it as something else, and not `report`"
            )
    if twice := {*rows} & {*others}:
        raise SystemExit(f"error: {path}: row {min(twice)} is also one of rows_from; give it another name")
    if not rows and not others:
        raise SystemExit(f"error: {path} has no rows; give `rows` or `rows_from`")
    return others | {name: _check_flags(f"{path}: row {name}", flags) for name, flags in rows.items()}


def _check_flags(where: str, flags: object) -> dict[str, object]:
    """Flags by their names in Python. Whether main.py has them is checked when a run is planned."""
    if not isinstance(flags, dict | None):
        raise SystemExit(f"error: {where} must have `flag: value` pairs; it is {flags}")
    flags = {flag_name(name): value for name, value in (flags or {}).items()}
    for name in NOT_OF_A_STUDY:
        if name in flags:
            raise SystemExit(
                f"error: {where} has {name}, which is not for a study: it sets its runs' flags; leave it out"
            )
    return flags


def flag_name(text: object) -> str:
    """The name in Python of a flag: drop_path for drop_path, drop-path, --drop-path and --drop-path=0.1."""
    flag = with_hyphens(f"--{str(text).removeprefix('--')}").partition("=")[0]
    return flag.removeprefix("--").replace("-", "_")


def _is_seed(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**31
