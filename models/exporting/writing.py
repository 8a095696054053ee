"""Writing a trained model in one of the formats: into a folder that appears when it is complete and checked."""

import os
import shutil
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path

from models.exporting.card import model_card
from models.exporting.registry import FORMATS
from models.exporting.trained import Trained, find_trained
from utils import TEMPORARY, errors_of


def export(run: str, to: str, folder: Path, given: Mapping[str, object] = {}, **chosen) -> list[str]:
    """Write a trained model in one of `FORMATS` into a folder that is new or empty; it appears when it is complete.

    Args:
        run: run folder or file of weights.
        to: name of the format.
        given, chosen: flags of the model, and which weights, as `find_trained` takes them.

    Returns:
        Lines about what was written.

    Raises:
        SystemExit: the weights cannot be loaded, the format cannot hold them, or the folder cannot be written.
    """
    format, folder = FORMATS[to], Path(os.path.abspath(folder))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SystemExit(f"error: {folder} exists and is not an empty folder; choose another one")
    with errors_of(f"--to {to}"):
        format.check_packages()
    with errors_of("RUN"):
        trained = find_trained(run, given, **chosen)
    try:
        with _complete_folder(folder) as unfinished, errors_of(f"--to {to}"):
            written = format.write(trained, unfinished)
            (unfinished / "README.md").write_text(model_card(trained, written, folder.resolve()), encoding="utf-8")
            names = sorted(path.name for path in unfinished.iterdir())
    except OSError as error:
        raise SystemExit(f"error: {folder} cannot be written: {error.strerror or error}") from None
    limits = [f"warning: {line}" for line in written.limits]
    return [_subject_line(trained), *trained.notes, written.check, *limits, f"written to {folder}: {', '.join(names)}"]


@contextmanager
def _complete_folder(folder: Path):
    """A new folder beside `folder`, which gets its name when the block has ended without an error."""
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}{TEMPORARY}")
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        for path in unfinished.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _subject_line(trained: Trained) -> str:
    size = trained.preprocessing.input_size
    epoch = "" if trained.epoch is None else f", epoch {trained.epoch}"
    outputs = f"{trained.model.num_classes} classes" if trained.model.num_classes else "no classifier"
    kind = f"{trained.kind} weights" if trained.flags else "weights"
    return f"{kind} of {trained.file}{epoch}: {trained.name}, {size} px, {outputs}"
