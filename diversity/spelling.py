"""Suggestions for a name that was misspelled."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """The end of an error about an unknown name: "; did you mean this or that?", or `otherwise` if none is close."""
    near = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(near)}?" if near else otherwise
