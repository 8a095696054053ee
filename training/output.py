"""A run continues when its standard output or error cannot be written: a full disk, a closed pipe or terminal."""

import contextlib
import sys
from collections.abc import Iterator
from typing import TextIO

from utils import drop_unwritten


@contextlib.contextmanager
def tolerant_output() -> Iterator[None]:
    """Within, text that standard output or standard error does not take is lost; the first loss is reported."""
    out, err = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Tolerant(out, "standard output", err), _Tolerant(err, "standard error", out)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = out, err
        for stream in (out, err):
            drop_unwritten(stream)


class _Tolerant:
    """A text stream whose errors are reported once, on another stream."""

    def __init__(self, stream: TextIO, name: str, other: TextIO):
        self._stream, self._name, self._other, self._is_reported = stream, name, other, False

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError as error:
            self._report(error)
        return len(text)

    def flush(self):
        try:
            self._stream.flush()
        except OSError as error:
            self._report(error)

    def _report(self, error: OSError):
        if not self._is_reported:
            self._is_reported = True
            line = f"warning: {self._name} cannot be written: {error.strerror}; training continues"
            with contextlib.suppress(OSError):
                print(line, file=self._other, flush=True)
