"""The names of a run's records, and reading log.txt: one JSON object per epoch, with DeiT's keys."""

import json
from pathlib import Path

LOG = "log.txt"
SUMMARY = "summary.json"


def read_records(path: Path) -> list[dict | None]:
    """The records of a log.txt, one per line; None for a line that is not complete JSON, as after a full disk."""
    return [_record(line) for line in path.read_text().splitlines()]


def _record(line: str) -> dict | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
