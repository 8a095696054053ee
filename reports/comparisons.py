"""Which runs can be compared, and what else differs between them, one line each.

Runs are compared if data, model, finished epochs, images per optimizer step and effective learning rate are equal, as
far as they are known: a run of a version that wrote no environment.json does not know its data and batches.
"""

import itertools
from collections.abc import Iterable

from diversity import ALIASES, REGULARIZERS
from diversity.classification import MIXING
from reports.runs import MAY_DIFFER, Run
from training import arguments
from training.changes import MODEL
from training.parsing import as_typed, flag_of
from training.provenance import DIGESTS
from training.records import CHANGES, ENVIRONMENT

DATA = {"classes": "classes", "train_images": "training images", "val_images": "validation images"} | DIGESTS
"""{key of the data in environment.json: its words}"""

VAL_FRACTION = "validation fraction"

TERMS = {"preset", *(f"{name}_coef" for name in (MIXING, *REGULARIZERS, *ALIASES))}
"""Flags by which the rows of an ablation differ."""

STOCK_REMEDIES = ("attn_layer", "reg_tokens", "init_values")
"""Keys of --model-kwargs by which they differ too: timm's own answers to redundancy, see docs/remedies.md."""

NOTED = ("processes", "device", "card", "precision", "python", "torch", "torchvision", "timm", "commit")
"""Keys of environment.json that do not prevent a comparison."""


def setting(run: Run) -> dict[str, object]:
    """{words: value} of what must be equal; None for a value that is not known."""
    start, flags = run.starts[-1] if run.starts else {}, run.flags
    kwargs = {"patch_size": flags.get("patch_size")} | model_kwargs(run)
    details = [f"{key}={value}" for key, value in kwargs.items() if value is not None and key not in STOCK_REMEDIES]
    return {
        "data": run.data_name,
        **{words: start.get("data", {}).get(key) for key, words in DATA.items()},
        VAL_FRACTION: flags.get("val_fraction", 0.0) if flags else None,
        "model": " ".join([flags["model"], *details]) if "model" in flags else None,
        "epochs": run.records[-1]["epoch"] + 1 if run.records and not run.problem else None,
        "images per optimizer step": start.get("global_batch"),
        "learning rate": start.get("learning_rate"),
    }


def model_kwargs(run: Run) -> dict[str, object]:
    """The further arguments of a run's timm model."""
    return run.flags.get("model_kwargs") or {}


def conflicts(run: Run, other: Run) -> list[str]:
    """What prevents a comparison of two runs, one text for each value that differs."""
    ours, theirs = setting(run), setting(other)
    known = [words for words in ours if ours[words] is not None and theirs[words] is not None]
    differ = [words for words in known if ours[words] != theirs[words]]
    if {*DATA.values()} <= {*known} and not {*DATA.values()} & {*differ}:
        differ = [words for words in differ if words != "data"]  # the same files in another folder
    return [f"{words} {ours[words]} and {theirs[words]}" for words in differ]


def conflict(run: Run, other: Run) -> str | None:
    """Why two runs are not compared, in a line that names their folders; None if they are."""
    found = conflicts(run, other)
    return f"{run.folder} and {other.folder} differ in {', '.join(found)}" if found else None


def comparable_groups(runs: list[Run]) -> list[list[Run]]:
    """The runs of rows that can be compared, in their order; the first group has the first run."""
    groups = []
    for of_row in by_configuration(runs).values():
        first = of_row[0]
        for group in groups:
            if not any(conflicts(first, other) for other in group):
                group += of_row
                break
        else:
            groups.append([*of_row])
    return groups


def check_rows(runs: list[Run]):
    """Refuse to average runs of one configuration that cannot be compared.

    Raises:
        SystemExit: with the first two of them.
    """
    for configuration, (first, *others) in by_configuration(runs).items():
        for other in others:
            if reason := conflict(first, other):
                raise SystemExit(f"error: the runs of {configuration} are not averaged: {reason}")


def by_configuration(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """{configuration: its runs, the finished ones first}."""
    rows = {}
    for run in sorted(runs, key=lambda run: run.problem is not None):
        rows.setdefault(run.configuration, []).append(run)
    return {run.configuration: rows[run.configuration] for run in runs}


def row_values(runs: list[Run], source: str | None, names: Iterable[str]) -> dict[str, dict[str, list[float]]]:
    """{name: {configuration: values of its finished runs that have one}}, for `names` of `Run.values`."""
    of_runs = [(run.configuration, run.values(source)) for run in runs if not run.problem]
    rows = [*by_configuration(runs)]
    return {
        name: {row: [v[name] for owner, v in of_runs if owner == row and v.get(name) is not None] for row in rows}
        for name in names
    }


def compared(runs: list[Run], owner: str = "all runs") -> str:
    """What comparable runs have in common."""
    values = {}
    for run in runs:
        values |= {words: value for words, value in setting(run).items() if value is not None}
    hidden = {*DIGESTS.values()} if values.get(VAL_FRACTION) else {*DIGESTS.values(), VAL_FRACTION}
    known = [f"{words} {value}" for words, value in values.items() if words not in hidden]
    return f"{owner}: {', '.join(known)}"


def notes(runs: list[Run]) -> list[str]:
    """One line for each flag beyond the terms, and each condition of training, that differs between comparable runs.

    Remedies are among them.

    Flags are those of a row, at their defaults where its version did not have them; conditions are those of all starts
    of a run. Further lines name changed runs, and those of which little is known.
    """
    first_runs = {name: of_row[0] for name, of_row in by_configuration(runs).items()}
    defaults = arguments.defaults()
    rows = {name: run.flags | defaults | run.flags for name, run in first_runs.items() if run.flags}
    ignored = {*MAY_DIFFER, *TERMS, *MODEL}  # a difference between models prevents a comparison
    names = dict.fromkeys(name for flags in rows.values() for name in flags if name not in ignored)
    lines = []
    for name in names:
        lines += differing(flag_of(name), [(row, flags[name]) for row, flags in rows.items() if name in flags])
    for key in STOCK_REMEDIES:
        values = [(row, model_kwargs(run).get(key, "not set")) for row, run in first_runs.items() if run.flags]
        lines += differing(f"--model-kwargs {key}", values)
    for name in NOTED:
        lines += differing(name, [(run.name, start[name]) for run in runs for start in run.starts if name in start])
    for run in runs:
        digests = {tuple(start["data"].get(key) for key in DIGESTS) for start in run.starts}
        lines += [f"{run.name} continued on other files of its data ({ENVIRONMENT})"] if len(digests) > 1 else []
        for epoch in dict.fromkeys(change["epoch"] for change in run.changes):
            changed = [
                f"{c['name']} {as_typed(c['before'])} -> {as_typed(c['after'])}"
                for c in run.changes
                if c["epoch"] == epoch
            ]
            lines.append(f"{run.name} was changed at epoch {epoch}: {', '.join(changed)} ({CHANGES})")
    unknown = [run.name for run in runs if not run.starts and run.flags]
    if unknown and len(runs) > 1:
        listed = _listed(unknown)
        lines.append(f"files of the data, batches and effective rates are not compared: no {ENVIRONMENT} in {listed}")
    return lines


def averaged_although_different(runs: list[Run]) -> list[str]:
    """One line for each configuration whose runs differ in more flags than those of where and how they ran."""
    defaults, lines = arguments.defaults(), []
    for name, of_row in by_configuration(runs).items():
        flags = [run.flags | defaults | run.flags for run in of_row if run.flags]
        differ = [
            flag_of(flag)
            for flag in dict.fromkeys(itertools.chain(*flags))
            if flag not in MAY_DIFFER and len({as_typed(of_run.get(flag)) for of_run in flags}) > 1
        ]
        lines += [f"the runs of {name} are averaged although they differ in {', '.join(differ)}"] if differ else []
    return lines


def differing(what: str, values: list[tuple[str, object]]) -> list[str]:
    """A line if the values of [(owner, value)] differ."""
    owners = {}
    for owner, value in values:
        owners.setdefault(as_typed(value), {})[owner] = None
    if len(owners) < 2:
        return []
    return [f"{what} differs: {'; '.join(f'{value} in {_listed([*of])}' for value, of in owners.items())}"]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
