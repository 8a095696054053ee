"""The run folder: made and locked before anything else, and the files that describe the run and its end."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from training.parsing import ARGS
from training.records import CHANGES, LOG, PREDICTIONS, SUMMARY
from utils import TEMPORARY, World, atomic_write, lock_folder, write_json


@contextlib.contextmanager
def lock_run_folder(folder: str, world: World, resume: str = "") -> Iterator[Path | None]:
    """Make the run folder, lock it against other runs, and remove the `*.tmp` files that a killed run left there.

    The lock ends with the process, also when it is killed; the processes that it forks do not have the lock.

    Args:
        folder: empty for a run that keeps no files.
        world: this process; the main one makes and locks the folder.
        resume: "auto" or a checkpoint in this folder continue the run in it.

    Yields:
        The folder on the main process; None on the others, and without a folder.

    Raises:
        SystemExit: on all processes, if the folder cannot be written, is in use, or holds a run that is not resumed.
    """
    with contextlib.ExitStack() as stack:
        path = Path(folder) if folder and world.is_main else None
        with same_error_everywhere(folder, world):
            if path is not None:
                if resume != "auto" and not is_inside(resume, folder) and (path / LOG).exists():
                    raise SystemExit(
                        f"error: --output-dir {folder} already holds a run; continue it with --resume auto, "
                        "or choose another folder"
                    )
                path.mkdir(parents=True, exist_ok=True)
                stack.enter_context(lock_folder(path, "--output-dir"))
                remove_temporary_files(path)
        yield path


def write_description(folder: Path | None, flags: dict, objective: str, world: World, changes: Sequence[dict] = ()):
    """Write the flags to args.yaml and the table of terms to objective.txt, and remove summary.json of an earlier end.

    Every process calls it, with the `folder` that `lock_run_folder` gave it.

    Args:
        changes: what differs from the run so far, one line each of changes.jsonl; the table of terms is then added to
            those before it.

    Raises:
        SystemExit: on all processes, if the folder cannot be written.
    """
    with same_error_everywhere(str(folder), world):
        if folder is not None:
            _add_changes(folder / CHANGES, changes)
            path = folder / "objective.txt"
            if changes and path.exists() and not path.read_text().endswith(f"{objective}\n"):
                place = f"from epoch {changes[0]['epoch']} step {changes[0]['step']} on:"
                objective = f"{path.read_text()}\n{place}\n{objective}"
            if changes or not path.exists():
                with atomic_write(path) as file:
                    file.write(f"{objective}\n".encode())
            with atomic_write(folder / ARGS) as file:
                file.write(yaml.safe_dump(flags, sort_keys=False).encode())
            (folder / SUMMARY).unlink(missing_ok=True)


def _add_changes(path: Path, changes: Sequence[dict]):
    """Add lines to changes.jsonl, without those that a process which was stopped before its first save has written."""
    lines = path.read_text().splitlines() if path.exists() else []
    new = [line for line in map(json.dumps, changes) if line not in lines]
    if new:
        with atomic_write(path) as file:
            file.write("".join(f"{line}\n" for line in [*lines, *new]).encode())


def write_summary(folder: Path, epochs: int, seconds: int, test_stats: dict[str, float]):
    """Write summary.json, the last file of a run: a run that has it is finished."""
    accuracies = {f"test_{name}": value for name, value in test_stats.items()}
    write_json({"epochs": epochs, "training_seconds": seconds, **accuracies}, folder / SUMMARY)


def needs_last_files(folder: str, resume: str, save_predictions: bool) -> bool:
    """Whether the run that continues in `folder` from the checkpoint `resume` lacks a file that its end writes.

    These are summary.json and, with `save_predictions`, predictions.npz.
    """
    names = [SUMMARY, PREDICTIONS] if save_predictions else [SUMMARY]
    return is_inside(resume, folder) and not all((Path(folder) / name).exists() for name in names)


def is_inside(checkpoint: str, folder: str) -> bool:
    """Whether a checkpoint is a file of the run folder."""
    return bool(checkpoint and folder) and Path(checkpoint).resolve().parent == Path(folder).resolve()


def remove_temporary_files(folder: Path) -> list[Path]:
    """Remove the unfinished files, `*.tmp`, of a run that was killed, and return them."""
    stale = sorted(path for path in folder.glob(f"*{TEMPORARY}") if path.is_file())
    for path in stale:
        path.unlink()
    return stale


@contextlib.contextmanager
def same_error_everywhere(folder: str, world: World) -> Iterator[None]:
    """Raise an error of the main process on all processes, as one line."""
    line = None
    try:
        yield
    except SystemExit as refusal:
        line = refusal.code
    except OSError as error:
        line = f"error: --output-dir {folder} cannot be written: {error.strerror}"
    if line := world.from_main(line):
        raise SystemExit(line)
