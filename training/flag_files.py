"""Files of flags: recipes, and the args.yaml of a run."""

from pathlib import Path

import yaml

BASE = "base"
"""The key that is not a flag: another file of flags beside the file, whose flags it changes."""


def read_flags(path: str | Path) -> dict[str, object]:
    """{flag: value} of a YAML file, over those of its `base`; names are those of main.py's namespace.

    Raises:
        ValueError: the file or its base cannot be read, or the base has a base too.
    """
    flags = _read_flags(Path(path))
    if BASE not in flags:
        return flags
    base = Path(path).parent / str(flags.pop(BASE))
    below = _read_flags(base)
    if BASE in below:
        raise ValueError(f"{path} has the base {base}, which has a base too; name {below[BASE]} instead")
    return below | flags


def _read_flags(path: Path) -> dict[str, object]:
    return {str(name).replace("-", "_"): value for name, value in read_pairs(path, "flag").items()}


def read_pairs(path: Path, key: str, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> dict:
    """The pairs of a YAML file.

    Args:
        key: what the first of a pair is called in the message.
        loader: of the text.

    Raises:
        ValueError: the file cannot be read, or has something else than pairs.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must have one `{key}: value` pair per line")
    return content
