"""The runs of a study: each row with each seed, its words for main.py checked by main.py's own parser."""

import contextlib
import io
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from studies.study_file import NOT_OF_A_STUDY, Study, flag_name
from training import arguments
from training.flags import build_parser
from training.parsing import flag_of, words_of


class PlannedRun(NamedTuple):
    """A row with a seed.

    Attributes:
        folder: its run folder, OUT/ROW/seedK.
        words: for main.py.
        args: the flags that main.py gets from them.
    """

    row: str
    seed: int
    folder: Path
    words: list[str]
    args: Namespace

    @property
    def name(self) -> str:
        return f"{self.row}/seed{self.seed}"


def plan_runs(study: Study, out: Path, user_flags: Sequence[str] = ()) -> list[PlannedRun]:
    """The runs of a study, seeds outermost, so that an unfinished study is a finished one of fewer seeds.

    Args:
        out: the folder of all run folders.
        user_flags: words for main.py, after those of the study.

    Raises:
        SystemExit: main.py would refuse the flags of a run, or `user_flags` has a flag by which runs differ.
    """
    _check_user_flags(study, user_flags)
    runs = []
    for seed in study.seeds:
        for row in study.rows:
            folder = out / row / f"seed{seed}"
            words = ["--config", str(study.recipe)] if study.recipe else []
            words += [*flags_as_words(study.flags_of(row)), "--seed", str(seed), "--resume", "auto"]
            words += ["--output_dir", str(folder), *user_flags]
            with errors_in(f"{study.path}, row {row}"):
                runs.append(PlannedRun(row, seed, folder, words, arguments.parse_args(words)))
    return runs


def flags_as_words(flags: dict[str, object]) -> list[str]:
    """Flags as words of a command line."""
    return [word for name, value in flags.items() for word in words_of(name, value)]


def _check_user_flags(study: Study, words: Sequence[str]):
    """Refuse flags of the command line that the rows or the runs of a study set, by themselves or by a preset."""
    presets = build_parser().presets
    flags = {flag_name(word): _value(words, i) for i, word in enumerate(words) if word.startswith("--")}
    given = {name.removeprefix("no_"): value for name, value in flags.items()}
    for name in _with_preset(given, presets):
        if name in NOT_OF_A_STUDY:
            raise SystemExit(
                f"error: {flag_of(name)} is not for a study, which sets it itself or does not need it; leave it "
                "out, or see OUT and --seeds"
            )
        for row, flags in study.rows.items():
            if name in _with_preset(flags, presets):
                raise SystemExit(
                    f"error: {flag_of(name)} differs between the rows of {study.path}: {row} sets it; leave it out, or "
                    "choose other --rows"
                )


def _with_preset(flags: dict[str, object], presets: dict[str, dict]) -> dict[str, object]:
    """The flags, and those that their preset sets."""
    return presets.get(str(flags.get("preset")), {}) | flags


def _value(words: Sequence[str], index: int) -> str:
    """The value of the flag at an index of a command line; the first one if it has several."""
    _, equals, value = words[index].partition("=")
    return value if equals else next(iter(words[index + 1 :]), "")


@contextlib.contextmanager
def errors_in(where: str) -> Iterator[None]:
    """Turn the error of a parser into a line that says where its words come from."""
    text = io.StringIO()
    try:
        with contextlib.redirect_stderr(text):
            yield
    except SystemExit as error:
        reason = error.code if isinstance(error.code, str) else text.getvalue().strip().splitlines()[-1]
        reason = reason.removeprefix("error: ").removesuffix(" (--help lists every flag)")
        raise SystemExit(f"error: {where}: {reason}") from None
