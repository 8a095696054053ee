"""The records of a run: their names, reading log.txt, and files that grow and survive a disk that fails.

log.txt has one JSON object per epoch, with DeiT's keys.
"""

import json
import os
import sys
from pathlib import Path

LOG = "log.txt"
SUMMARY = "summary.json"
CHANGES = "changes.jsonl"
ENVIRONMENT = "environment.json"
PREDICTIONS = "predictions.npz"
EVALUATION = "evaluation.json"
EVALUATION_PAGE = "evaluation.md"


def read_records(path: Path) -> list[dict | None]:
    """The records of a log.txt, one per line; None for a line that is not complete JSON, as after a full disk."""
    return parse_records(path.read_text())


def parse_records(text: str) -> list[dict | None]:
    """The same from the text of a log.txt."""
    return [_record(line) for line in text.splitlines()]


def _record(line: str) -> dict | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


class GrowingFile:
    """A file that data is added to. Data that cannot be written is kept, and written with what follows.

    Attributes:
        unwritten: what the file does not contain yet.
    """

    def __init__(self, path: Path):
        self.path, self.unwritten, self.is_failing = path, b"", False

    def add(self, data: bytes):
        self.unwritten += data

    def flush(self):
        """Write what is unwritten. An error is reported, once until a write succeeds again, and the run continues."""
        try:
            self.close()
        except OSError as error:
            if not self.is_failing:
                line = f"error: {self.path} cannot be written: {error.strerror}; training continues, it follows later"
                print(line, file=sys.stderr, flush=True)
            self.is_failing = True
        else:
            self.is_failing = False

    def close(self):
        """Write what is unwritten, to the disk itself.

        Raises:
            OSError: it cannot be written. The file is as it was.
        """
        if not self.unwritten:
            return
        with open(self.path, "ab", buffering=0) as file:
            size, left = os.fstat(file.fileno()).st_size, memoryview(self.unwritten)
            try:
                while left:
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
            except OSError as error:
                file.truncate(size)
                error.filename = str(self.path)
                raise
        self.unwritten = b""
