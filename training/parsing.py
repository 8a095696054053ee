"""argparse as this project uses it: flags from a file or the command line, checked values, errors of one line."""

import argparse
import ast
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from diversity.backbones import parse_layers, parse_weight_groups
from diversity.spelling import did_you_mean
from models.flag_types import OneLineParser, number, with_hyphens
from training.flag_files import read_flags

ARGS = "args.yaml"
"""The flags of a run, in its folder."""


class Parser(OneLineParser):
    """An argument parser that reads `--config FILE` and `--preset NAME` first, as defaults of the other flags.

    Hyphens and underscores in the names of flags are the same.

    Args:
        presets: {value of `--preset`: {flag: its default}}; None for a program without presets.
        removed: {flag that earlier versions had: what to do instead}.
        refused: {flag of another program: why this one does not have it}.
    """

    def __init__(
        self,
        presets: Mapping[str, dict] | None = None,
        removed: Mapping[str, str] | None = None,
        refused: Mapping[str, str] | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.presets, self.removed, self.refused = presets or {}, removed or {}, refused or {}
        self.first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        self.first.add_argument("--config")
        self.first.add_argument("--preset")
        self.first.add_argument("--resume")

    @property
    def flags(self) -> list[str]:
        """Each way to write a flag, such as --seed."""
        return [*self._option_string_actions]

    def parse(self, argv: list[str], config: dict | None = None) -> argparse.Namespace:
        """Flags from `argv`, over those of `--config`, of `config`, of `--preset`, and the defaults.

        Raises:
            SystemExit: a flag that is unknown or out of range, or a file that cannot be read.
        """
        if garbled := next((word for word in argv if not _is_text(word)), None):
            self.error(f"{garbled!a} is not UTF-8, and the files of a run could not name it; use another name")
        argv = [with_hyphens(word) for word in argv]
        try:
            first, _ = self.first.parse_known_args(argv)
        except argparse.ArgumentError as error:
            self.error(str(error))
        self.plain = {name: self.get_default(name) for preset in self.presets.values() for name in preset}
        config = (config or {}) | (self._read(first.config) if first.config else {})
        if first.resume == "auto" and Path(first.config or "").name == ARGS:  # of a run, which may have been moved
            config["output_dir"] = str(Path(first.config).parent)
        self._use_preset(config.get("preset"))
        words = self._words_of(config)
        if first.preset is not None:  # replaces the preset of the file, whose other flags stay
            self._use_preset(first.preset)
        args, unknown = self.parse_known_args(words + argv)
        if not unknown:
            return args
        flag = unknown[0].split("=")[0]
        if hint := self.removed.get(flag.replace("--no-", "--", 1)):
            self.error(f"{flag} was removed: {hint}")
        if hint := self.refused.get(flag.replace("--no-", "--", 1)):
            self.error(f"{flag} is not implemented: {hint}")
        hint = self._used_up(words + argv, unknown[0]) or did_you_mean(flag, self.flags)
        where = f"--config {first.config}: " if first.config and unknown[0] in words else ""
        self.error(f"{where}unknown argument {unknown[0]}{hint}")

    def _used_up(self, words: list[str], value: str) -> str:
        """The flag before a value that is one too many, and what it takes; empty if there is none."""
        before = [word for word in words[: words.index(value)] if word.startswith("--")]
        action = self._option_string_actions.get(before[-1].split("=")[0]) if before else None
        if action is None or value.startswith("--"):
            return ""
        if action.nargs == 0:
            return f"; {action.option_strings[0]} takes no value, and --no-{action.option_strings[0][2:]} turns it off"
        number = f"{action.nargs} values" if action.nargs else "one value"
        return f"; {action.option_strings[0]} takes {number}: {action.help.split(';')[0]}"

    def _use_preset(self, name: str | None):
        self.set_defaults(**self.plain | self.presets.get(str(name), {}))

    def _read(self, path: str) -> dict:
        try:
            flags = read_flags(path)
        except ValueError as error:
            self.error(f"--config {error}")
        if isinstance(flags.get("rows"), dict):
            self.error(f"--config {path} is a study, which has rows of flags; train it by `python study.py {path} OUT`")
        return flags

    def _words_of(self, config: dict) -> list[str]:
        """Flags from a file as words of a command line, so that both are checked in the same way."""
        words = []
        for name, value in config.items():
            flag = flag_of(name)
            if flag in self.removed:
                sys.stderr.write(f"note: {flag} of an earlier version is ignored: {self.removed[flag]}\n")
            elif value != self.get_default(name):
                words += words_of(name, value)
        return words


def words_of(name: str, value: object) -> list[str]:
    """A flag with its value as words of a command line: --no-tensorboard, --epochs=3, --scale 0.5 1."""
    flag = flag_of(name)
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    if isinstance(value, dict):
        return [flag, *(f"{key}={item}" for key, item in value.items())]
    if isinstance(value, list):
        return [flag, *map(str, value)]
    return [f"{flag}={'none' if value is None else value}"]


def as_typed(value: object) -> str:
    """The value of a flag as on the command line, for messages: `a b` for a list, `k=v` for a dict, `none` if empty."""
    if isinstance(value, dict):
        value = [f"{key}={of_key}" for key, of_key in value.items()]
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "none"
    return str(value)


def _is_text(word: str) -> bool:
    """Whether a word of the command line was in the encoding of the system."""
    return not any("\udc80" <= character <= "\udcff" for character in word)


def flag_of(name: str) -> str:
    """The flag of an argument: drop_path -> --drop-path."""
    return "--" + name.replace("_", "-")


nonneg_int = number(int, lambda value: value >= 0, "an integer >= 0")
seed_int = number(int, lambda value: 0 <= value < 2**31, "an integer from 0 to below 2^31")
nonneg_float = number(float, lambda value: value >= 0, "a finite number >= 0")
fraction = number(float, lambda value: 0 <= value <= 1, "a number from 0 to 1")
positive_fraction = number(float, lambda value: 0 < value <= 1, "a number above 0, up to 1")
fraction_below_one = number(float, lambda value: 0 <= value < 1, "a number from 0 to below 1")


def text_for(parse: Callable[[str], object]) -> Callable[[str], str]:
    """A type for `add_argument`: text that `parse` accepts, unchanged."""

    def check(text: str) -> str:
        try:
            parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return text

    return check


layer_list = text_for(parse_layers)
group_list = text_for(parse_weight_groups)


def device_name(text: str) -> str:
    if text not in ("auto", "cpu") and not text.startswith("cuda"):
        raise argparse.ArgumentTypeError(f"is auto, cuda or cpu; got {text}")
    return text


def literal(text: str) -> object:
    """A Python literal such as 0.5 or (1, 2), None for "none", and any other text unchanged."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return none_or_text(text)


def with_lists(value: object) -> object:
    """A value as a YAML file returns it: lists in place of tuples."""
    if isinstance(value, dict):
        return {key: with_lists(item) for key, item in value.items()}
    return [*map(with_lists, value)] if isinstance(value, list | tuple) else value


def none_or_text(text: str) -> str | None:
    return None if text.lower() in ("", "none") else text
