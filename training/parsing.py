"""argparse as this project wants it: flags from a file or the command line, values checked, one line for a mistake."""

import argparse
import ast
import math
from pathlib import Path

import yaml
from timm.utils import ParseKwargs

from diversity.backbones import parse_layers, parse_weight_groups
from diversity.spelling import did_you_mean


class Parser(argparse.ArgumentParser):
    """An argument parser that takes hyphens and underscores alike and `--config FILE` as flags before the others.

    Args:
        presets: {value of `--preset`: {flag: its default}}; None for a program without presets.
    """

    def __init__(self, presets: dict[str, dict] | None = None, **kwargs):
        super().__init__(**kwargs)
        self.presets = presets or {}

    def parse(self, argv: list[str], config: dict | None = None) -> argparse.Namespace:
        """Flags from `argv`, over those of `--config` (or `config`), over those of `--preset`, over the defaults.

        Raises:
            SystemExit: a flag that is unknown or out of range, or a file that cannot be read.
        """
        argv = [hyphens(word) for word in argv]
        self.plain = {name: self.get_default(name) for preset in self.presets.values() for name in preset}
        path = _value_of("--config", argv)
        config = self._read(path) if path else config or {}
        preset = _value_of("--preset", argv)
        self._use_preset(config.get("preset"))
        words = self._words_of(config)
        if preset is not None:  # it takes the place of the file's, whose other flags stay
            self._use_preset(preset)
        args, unknown = self.parse_known_args(words + argv)
        if unknown:
            hint = did_you_mean(unknown[0].split("=")[0], self._option_string_actions)
            self.error(f"unknown argument {unknown[0]}{hint}")
        return args

    def _use_preset(self, name: str | None):
        self.set_defaults(**self.plain | self.presets.get(str(name), {}))

    def error(self, message):
        self.exit(2, f"error: {message} (--help lists every flag)\n")

    def _read(self, path: str) -> dict:
        try:
            config = yaml.safe_load(Path(path).read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            self.error(f"--config {path} cannot be read: {' '.join(str(error).split())}")
        if not isinstance(config, dict):
            self.error(f"--config {path} must hold one `flag: value` pair per line")
        return {str(name).replace("-", "_"): value for name, value in config.items()}

    def _words_of(self, config: dict) -> list[str]:
        """Flags from a file as command-line words, so that both are checked alike."""
        words = []
        for name, value in config.items():
            flag = flag_of(name)
            if value == self.get_default(name):
                continue
            if isinstance(value, bool):
                words.append(flag if value else flag.replace("--", "--no-", 1))
            elif isinstance(value, dict):
                words += [flag, *(f"{key}={item}" for key, item in value.items())]
            elif isinstance(value, list):
                words += [flag, *map(str, value)]
            else:
                words.append(f"{flag}={'none' if value is None else value}")
        return words


class KeyValues(ParseKwargs):
    """KEY=VALUE ... as a dict, values read as Python literals where they are some."""

    def __call__(self, parser, namespace, values, option_string=None):
        without_equals = [value for value in values if value and "=" not in value]
        if without_equals:
            parser.error(f"argument {option_string}: needs KEY=VALUE; got {without_equals[0]!r}")
        super().__call__(parser, namespace, values, option_string)


def flag_of(name: str) -> str:
    """The flag of an argument: drop_path -> --drop-path."""
    return "--" + name.replace("_", "-")


def whole(text: str) -> int:
    return _number(text, int, lambda value: value >= 0, "a whole number >= 0")


def count(text: str) -> int:
    return _number(text, int, lambda value: value >= 1, "a whole number >= 1")


def seed(text: str) -> int:
    return _number(text, int, lambda value: 0 <= value < 2**31, "a whole number from 0 to below 2^31")


def coefficient(text: str) -> float:
    return _number(text, float, lambda value: value >= 0, "a finite number >= 0")


def positive(text: str) -> float:
    return _number(text, float, lambda value: value > 0, "a finite number > 0")


def share(text: str) -> float:
    return _number(text, float, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def below_one(text: str) -> float:
    return _number(text, float, lambda value: 0 <= value < 1, "a number from 0 to below 1")


def layers(text: str) -> str:
    return _read_by(parse_layers, text)


def weight_groups(text: str) -> str:
    return _read_by(parse_weight_groups, text)


def device(text: str) -> str:
    if text not in ("auto", "cpu") and not text.startswith("cuda"):
        raise argparse.ArgumentTypeError(f"is auto, cuda or cpu; got {text}")
    return text


def literal(text: str) -> object:
    """A Python literal such as 0.5 or (1, 2), None for "none", and any other text as it is."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return or_none(text)


def or_none(text: str) -> str | None:
    return None if text.lower() in ("", "none") else text


def _read_by(parse, text: str) -> str:
    """`text` as it is, once `parse` has understood it."""
    try:
        parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _number(text, kind, holds, what):
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and holds(value)):
        raise argparse.ArgumentTypeError(f"needs {what}; got {text!r}")
    return value


def _value_of(flag: str, argv: list[str]) -> str | None:
    """The value of one flag, before the others are parsed."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(flag)
    try:
        return getattr(parser.parse_known_args(argv)[0], flag.removeprefix("--"))
    except argparse.ArgumentError:  # no value: the full parser says so
        return None


def hyphens(word: str) -> str:
    """--output_dir=a_b -> --output-dir=a_b; values are left alone."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value
