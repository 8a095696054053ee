"""Values of flags that main.py and `models.export` read in the same way: numbers, KEY=VALUE, hyphens, errors."""

import argparse
import math
from collections.abc import Callable

from timm.utils import ParseKwargs


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str):
        self.exit(2, f"error: {message} (--help lists every flag)\n")


class KeyValues(ParseKwargs):
    """KEY=VALUE ... as a dict; a value that is a Python literal is evaluated."""

    def __call__(self, parser, namespace, values, option_string=None):
        without_equals = [value for value in values if value and "=" not in value]
        if without_equals:
            parser.error(f"argument {option_string}: needs KEY=VALUE; got {without_equals[0]!r}")
        super().__call__(parser, namespace, values, option_string)


def number(kind: type, is_valid: Callable[[float], bool], what: str) -> Callable[[str], float]:
    """A type for `add_argument`: finite numbers that are valid; `what` describes them in the error."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and is_valid(value)):
            raise argparse.ArgumentTypeError(f"needs {what}; got {text!r}")
        return value

    return parse


positive_int = number(int, lambda value: value >= 1, "an integer >= 1")
positive_float = number(float, lambda value: value > 0, "a finite number > 0")


def with_hyphens(word: str) -> str:
    """--output_dir=a_b -> --output-dir=a_b; the value stays."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value
