"""Run folders and files of records read back: the configuration that a run belongs to, and its contents."""

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

import yaml

from reports.run_records import RECORDS, read_records_file
from reports.runs import REPORT, Run, by_study, check_configuration
from training.provenance import read_starts
from training.records import CHANGES, LOG, SUMMARY, read_records


def find_runs(outs: Iterable[str | Path]) -> list[Run]:
    """Read all runs below some folders, each once, sorted by their path within each of `outs`.

    A .jsonl file among `outs` is one of records, whose runs have the order of its lines.

    Raises:
        SystemExit: a folder has no run; a file has a line that is no record; the runs of a configuration differ in more
            than their seed, or have the same.
    """
    runs, of_records = {}, []
    for out in dict.fromkeys(map(Path, outs)):
        if out.suffix == RECORDS and not out.is_dir():
            of_records += read_records_file(out)
            continue
        folders = sorted((path.parent for path in out.rglob("args.yaml")), key=_natural)
        if not folders:
            raise SystemExit(f"error: no run folder found under {out}: no folder there contains args.yaml")
        for folder in folders:
            if folder.resolve() not in runs:
                runs[folder.resolve()] = read_run(folder, configuration_name(folder, out))
    found = [*runs.values(), *of_records]
    for of_study in by_study(found).values():
        for name in {run.configuration for run in of_study}:
            check_configuration([run for run in of_study if run.configuration == name and run.flags])
    return found


def configuration_name(folder: Path, out: Path) -> str:
    """The path of a run below `out` without its seed; the last name in the absolute path where nothing else is left."""
    path = without_seed(folder)
    if path != out and path.is_relative_to(out):
        return str(path.relative_to(out))
    return without_seed(folder.resolve()).name


def without_seed(path: Path) -> Path:
    """The path that runs have in common if they differ only in their seed: out/plain for out/plain/seed0.

    out/plain-seed0 and out/plain_seed0 become out/plain, too.
    """
    if re.fullmatch(r"seed\d+", path.name):
        return path.parent
    return path.with_name(re.sub(r"[-_]seed\d+$", "", path.name)) if path.name else path


def place_of(run: Run) -> int:
    """The place of a run's configuration in its study."""
    return place_in_study(run.folder) if run.place is None else run.place


def place_in_study(folder: Path) -> int:
    """The place of a run folder's configuration among those beside it, plain first, then by their names."""
    own = without_seed(folder.resolve())
    found = [*own.parent.glob("*/args.yaml"), *own.parent.glob("*/seed*/args.yaml")]
    rows = {own, *(without_seed(path.parent) for path in found)}
    return sorted(rows, key=lambda path: (path.name != "plain", _natural(path))).index(own)


def read_log(path: Path, notices: TextIO | None = None) -> list[dict]:
    """The epochs of a log.txt, in order.

    An epoch that a resumed run repeated counts once, as it was logged last. Lines that are not complete JSON are
    skipped, with a notice, by default on stdout.
    """
    records = []
    for number, record in enumerate(read_records(path), 1):
        if record is None:
            print(f"{path}:{number}: not a complete JSON line, skipped", file=notices)
        else:
            records = [earlier for earlier in records if earlier["epoch"] < record["epoch"]] + [record]
    return records


def read_run(folder: Path, configuration: str) -> Run:
    """Read a run folder; a file that cannot be read makes it a failed run."""
    run = Run(configuration, folder)
    try:
        flags = yaml.safe_load((folder / "args.yaml").read_text())
        if not isinstance(flags, dict) or not {"seed", "epochs"} <= flags.keys():
            raise ValueError("args.yaml does not contain the flags of a run")
        run.flags = flags
        run.records = read_log(folder / LOG, sys.stderr) if (folder / LOG).exists() else []
        run.starts = read_starts(folder)
        run.commit = run.starts[-1].get("commit") if run.starts else None
        changes = read_records(folder / CHANGES) if (folder / CHANGES).exists() else []
        if not all(isinstance(change, dict) and "epoch" in change for change in changes):
            raise ValueError(f"{CHANGES} is damaged")
        run.changes = changes
        run.report = _read_json(folder / REPORT)
        run.add_results(_read_json(folder / SUMMARY))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        run.problem = f"failed: its files cannot be read ({' '.join(str(error).split())})"
    return run


def _read_json(path: Path) -> dict:
    """A JSON object; empty where there is no such file."""
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except json.JSONDecodeError:
        raise ValueError(f"{path.name} is not complete JSON") from None


def _natural(path: Path) -> list:
    """A sort key by which run2 comes before run10."""
    return [int(word) if i % 2 else word for i, word in enumerate(re.split(r"(\d+)", str(path)))]
