"""How argparse takes values that are several words: names and NAME=PATH."""

import argparse
from collections.abc import Collection, Mapping

from diversity.spelling import did_you_mean

HAVE_FLAGS = {
    "img_size": "--input-size",
    "input_size": "--input-size",
    "patch_size": "--patch-size",
    "num_classes": "--num-classes",
    "drop": "--drop",
    "drop_rate": "--drop",
    "drop_path": "--drop-path",
    "drop_path_rate": "--drop-path",
    "pretrained": "--finetune",
    "checkpoint_path": "--finetune",
    "name": "--model",
    "remedies": "--remedy",
    "remedy_kwargs": "--remedy-kwargs",
}
"""Keys that --model-kwargs may not contain, as they have flags."""


def names_of(known: Collection[str]) -> type[argparse.Action]:
    """An action for `add_argument`: NAME ... as a list of some of the known names, in their order, each once."""

    class Names(argparse.Action):
        def __call__(self, parser, namespace, values, option_string=None):
            for value in values:
                if value not in known:
                    hint = did_you_mean(value, known, f"; there are {', '.join(known)}")
                    parser.error(f"{option_string} {value} is unknown{hint}")
            setattr(namespace, self.dest, [name for name in known if name in values])

    return Names


def named_paths(known: Mapping[str, bool]) -> type[argparse.Action]:
    """An action for `add_argument`: NAME=PATH ... as a list of these words.

    Args:
        known: {NAME: whether it needs a PATH}; one that needs none is a word without "=".
    """

    class NamedPaths(argparse.Action):
        def __call__(self, parser, namespace, values, option_string=None):
            for value in values:
                name, _, path = value.partition("=")
                if name not in known:
                    hint = did_you_mean(name, known, f"; there are {', '.join(known)}")
                    parser.error(f"{option_string} {value}: {name} is unknown{hint}")
                if known[name] and not path:
                    parser.error(f"{option_string} {value}: needs NAME=PATH, with the folder of the set")
                if not known[name] and value != name:
                    parser.error(f"{option_string} {value}: {name} has no PATH; its data are those of --data-set")
            if repeated := [value for value in values if values.count(value) > 1]:
                parser.error(f"{option_string} {repeated[0]} is given twice")
            setattr(namespace, self.dest, values)

    return NamedPaths
