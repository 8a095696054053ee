"""Records of finished runs: one JSON line a run without its weights, many of which fit into a file of a repository.

A record has the keys set (name of the data), row, seed, commit, args (args.yaml), last (the last epoch of log.txt),
curves ({name: a value for each epoch}); where they are known step0 (the values of the first step), start (the last
entry of environment.json), changes, and redundancy (redundancy.json without what is large); and, in a file of an
earlier study, probe: measures that are defined by the program of that study.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path

import yaml

from reports.runs import REPORT, Run
from training.parsing import ARGS
from training.records import CHANGES, ENVIRONMENT, LOG, SUMMARY
from utils import atomic_write, write_json

RECORDS = ".jsonl"
CURVES = (
    *("train_loss", "train_cls_ce", "test_loss", "test_loss_ema", "test_acc1", "test_acc1_ema", "train_images_per_s"),
)
"""Columns of log.txt of which a record has each epoch."""
LARGE = ("run", "weight", "circuit", "spectra", "circuit_spectra", "variance", "cka")
"""Keys of redundancy.json that a record leaves out, the first one as it is a path."""
OF_A_MACHINE = ("command", "host")
"""Keys of environment.json that a record leaves out."""
DIGITS = 6


def record_of(run: Run) -> dict:
    """The record of a finished run; numbers of its results have `DIGITS` significant digits, paths their last name."""
    last, start = run.records[-1], {**run.starts[-1]} if run.starts else {}
    flags = {name: without_folder(value) for name, value in run.flags.items()}
    curves = {name: [epoch.get(name) for epoch in run.records] for name in CURVES if name in last}
    record = {
        "set": run.study.name if run.study else run.data_name,
        "row": run.configuration,
        "seed": run.flags["seed"],
        "commit": run.commit,
        "last": _rounded(last),
        "curves": _rounded(curves),
        "args": flags,
    }
    if step0 := run.records[0].get("step0"):
        record["step0"] = _rounded(step0)
    if start:
        data = {name: value for name, value in start["data"].items() if name != "path"}
        record["start"] = {name: value for name, value in start.items() if name not in OF_A_MACHINE} | {"data": data}
    if run.changes:
        record["changes"] = run.changes
    if run.report:
        record["redundancy"] = _rounded({name: value for name, value in run.report.items() if name not in LARGE})
    if run.own_measures:
        record["probe"] = {name.removeprefix(_prefix(run.study.parent)): v for name, v in run.own_measures.items()}
    return record


def write_records(runs: Iterable[Run], target: Path) -> int:
    """Write the records of the finished ones among `runs` into a file; returns its number of records.

    A record that the file has already of the same set, row and seed is replaced in its place, others stay.

    Raises:
        SystemExit: the file cannot be read or written, or has a line that is no record.
    """
    lines = {}
    if target.exists():
        lines = {_key(record): line for line, record in _read_lines(target)}
    for record in (record_of(run) for run in runs if not run.problem):
        lines[_key(record)] = json.dumps(record, ensure_ascii=False)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(target) as file:
            file.write("".join(f"{line}\n" for line in lines.values()).encode())
    except OSError as error:
        raise SystemExit(f"error: {target} cannot be written: {error.strerror}") from None
    return len(lines)


def read_records_file(file: Path) -> list[Run]:
    """The runs of a file of records, in the order of its lines.

    Raises:
        SystemExit: it cannot be read, has no line, one that is no record, or two of the same set, row and seed.
    """
    records = [record for _, record in _read_lines(file)]
    if not records:
        raise SystemExit(f"error: {file} has no record of a run")
    rows = [*dict.fromkeys(record["row"] for record in records)]
    rows.sort(key=lambda row: row != "plain")  # as the places of run folders
    return [_run(record, file, rows.index(record["row"])) for record in records]


def restore_run(run: Run, folder: Path):
    """Write what a record has of a finished run as a run folder without weights, from which the same record follows.

    Raises:
        SystemExit: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_text(yaml.safe_dump(run.flags), folder / ARGS)
        _write_text("".join(f"{json.dumps(epoch)}\n" for epoch in run.records), folder / LOG)
        if run.changes:
            _write_text("".join(f"{json.dumps(change)}\n" for change in run.changes), folder / CHANGES)
        for value, name in ((run.starts, ENVIRONMENT), (run.report, REPORT)):
            if value:
                write_json(value, folder / name)
        write_json(
            {"epochs": len(run.records), "record": run.study.parent.name}, folder / SUMMARY
        )  # last: it is complete
    except OSError as error:
        raise SystemExit(f"error: {error.filename or folder} cannot be written: {error.strerror}") from None


def _write_text(text: str, path: Path):
    with atomic_write(path) as file:
        file.write(text.encode())


def _read_lines(file: Path) -> list[tuple[str, dict]]:
    """Each line of a file with its record."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"error: {file} cannot be read: {getattr(error, 'strerror', error)}") from None
    records, seen = [], {}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            _run(record, file, 0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise SystemExit(f"error: line {number} of {file} is not the record of a run: {reason}") from None
        other = seen.setdefault(_key(record), number)
        if other != number:
            what = "/".join(map(str, _key(record)))
            raise SystemExit(f"error: lines {other} and {number} of {file} are both of {what}; remove one")
        records.append((line, record))
    return records


def _key(record: dict) -> tuple:
    return record["set"], record["row"], record["seed"]


def _run(record: dict, file: Path, place: int) -> Run:
    """The run of a record."""
    study, num_epochs = file / record["set"], record["last"]["epoch"] + 1
    if any(len(curve) != num_epochs for curve in record["curves"].values()):
        raise ValueError(f"a curve has not the {num_epochs} epochs of the run")
    epochs = [{name: curve[epoch] for name, curve in record["curves"].items()} for epoch in range(num_epochs)]
    run = Run(
        configuration=record["row"],
        folder=study / record["row"] / f"seed{record['seed']}",
        flags={"epochs": num_epochs} | record["args"] | {"seed": record["seed"]},
        records=[{"epoch": epoch} | values for epoch, values in enumerate(epochs)],
        report=record.get("redundancy", {}),
        own_measures={f"{_prefix(file)}{name}": value for name, value in record.get("probe", {}).items()},
        starts=[record["start"]] if "start" in record else [],
        changes=record.get("changes", []),
        commit=record.get("commit"),
        study=study,
        place=place,
    )
    run.records[-1] |= record["last"]
    run.records[0] |= {"step0": record["step0"]} if "step0" in record else {}
    run.add_results({"epochs": num_epochs})
    return run


def _prefix(file: Path) -> str:
    """What the names of a study's own measures begin with: the name of its file."""
    return f"{file.stem}_"


def without_folder(value):
    """The last name of an absolute path, another value unchanged."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _rounded(value):
    """Nested dicts and lists with their floats rounded, and None for one that is not finite."""
    if isinstance(value, dict):
        return {name: _rounded(of_name) for name, of_name in value.items()}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value
