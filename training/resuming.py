"""What a run starts from: the checkpoint that `--resume` finds, or the weights of `--finetune`."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from models.weights import Origin, classifier_names, is_weights, load_weights, local_file, origin, read
from training import checkpoint_files
from training.checkpoint import LAST, TrainState, load_model_and_ema
from training.records import LOG, SUMMARY, read_records
from training.run_folder import needs_last_files
from utils import World, errors_of


class Checkpoint(NamedTuple):
    """A file that a run continues from, or nothing: an empty path and content."""

    path: str = ""
    content: Mapping = {}

    @property
    def classes(self) -> list[str]:
        """Names of the classes in the order of the model's outputs; empty where the file does not know them."""
        return self.content.get("data", {}).get("classes", [])


def find_checkpoint(path: str, folder: str, world: World, rename: bool = True) -> Checkpoint:
    """Find and load what training continues from, the same for all processes.

    Args:
        path: a checkpoint.pth, an https URL, "auto" for the newest undamaged checkpoint of `folder` if there is one, or
            empty.
        folder: the run folder.
        rename: whether damaged files may be renamed.

    Raises:
        SystemExit: the file is missing, damaged, no checkpoint or one of weights alone; or `folder` has a run, and no
            checkpoint of it is left.
    """
    if path == "auto":
        newest = line = None
        if world.is_main:
            newest = find_newest(Path(folder), rename)
            line = None if newest else _lost_run(Path(folder))
        path, line = world.from_main(str(newest or "")), world.from_main(line)
        if line:
            raise SystemExit(line)
    if not path:
        return Checkpoint()
    checkpoint = load(path)
    missing = {"optimizer", "lr_scheduler", "scaler", "epoch"} - checkpoint.keys()
    if missing:
        raise SystemExit(
            f"error: --resume {path} has no {', '.join(sorted(missing))}; "
            f"training continues from {LAST}, other weights start a new run with --finetune"
        )
    _add_accuracies(checkpoint, Path(path).with_name(LOG))
    return Checkpoint(path, checkpoint)


def _add_accuracies(checkpoint: dict, log: Path):
    """Add what an earlier version's checkpoints lack for the schedule, if the run's log.txt has it for each epoch."""
    if "accuracies" in checkpoint["lr_scheduler"] or not log.is_file():
        return
    known = {record.get("epoch"): record.get("test_acc1") for record in read_records(log) if record}
    accuracies = [known.get(epoch) for epoch in range(checkpoint["epoch"] + 1)]
    if None not in accuracies:
        checkpoint["lr_scheduler"] = {"accuracies": accuracies}


def _lost_run(folder: Path) -> str | None:
    """An error if a folder without an undamaged checkpoint has a run that would be lost by a new start.

    The first epoch of a run that was killed before its first checkpoint was complete is no such run.
    """
    epochs = [record["epoch"] for record in read_records(folder / LOG) if record] if (folder / LOG).exists() else []
    damaged = [path.name for path in folder.glob(f"*{checkpoint_files.DAMAGED}")]
    if damaged or max(epochs, default=0) > 0 or (folder / SUMMARY).exists():
        found = f"; damaged: {', '.join(sorted(damaged))}" if damaged else ""
        return (
            f"error: --resume auto: {folder} has a run of {len(epochs)} epochs but no undamaged checkpoint{found}; "
            "put one back, or choose another --output-dir to start anew"
        )
    return None


class Start(NamedTuple):
    """What a run starts from.

    Attributes:
        notes: one line for each weight that was not loaded unchanged.
        bad_images: names of the unreadable training images that the run has met.
        unwritten_log: lines of log.txt that could not be written.
    """

    notes: Sequence[str] = ()
    bad_images: Sequence[str] = ()
    unwritten_log: str = ""


def resume(
    state: TrainState,
    checkpoint: Checkpoint,
    world: World,
    *,
    finetune: str = "",
    checkpoint_key: str = "",
    new_head: bool = False,
    classes: Sequence[str] = (),
    global_batch: int = 0,
) -> Start:
    """Restore a checkpoint; without one, load weights to start from.

    Without an optimizer in `state`, as in an evaluation, only the weights are restored, all of which must come from the
    file, and an average that it lacks is dropped; in training it starts from the weights.

    Args:
        finetune: weights in any layout that is known; empty = keep the initial weights.
        checkpoint_key: which weights of that file, if it has several.
        new_head: whether the model keeps its initial head where those weights have one.
        classes: names of the data's classes; a head for the same ones is loaded by name, one for others is dropped.
        global_batch: images per optimizer step.

    Raises:
        SystemExit: a file is missing, damaged or does not fit.
    """
    is_training = state.optimizer is not None
    if checkpoint.path:
        return _restore(state, checkpoint, world, global_batch)
    head = {name: state.model.state_dict()[name].clone() for name in classifier_names(state.model)}
    with errors_of("--finetune"):
        options = {"new_head": is_training, "classes": classes, "checkpoint_key": checkpoint_key}
        notes = load_weights(state.model, finetune, **options) if finetune else []
        if finetune and new_head:
            state.model.load_state_dict(head, strict=False)
            notes = [note for note in notes if note.split()[0] not in head]
            notes += [f"{name} is drawn anew, not from the file: --head-init" for name in head]
    if not is_training:
        state.model_ema = None
    elif finetune and state.model_ema is not None:
        state.model_ema.set(state.model)
    return Start(notes)


def _restore(state: TrainState, checkpoint: Checkpoint, world: World, global_batch: int) -> Start:
    """Restore a checkpoint; only its weights without an optimizer in `state`."""
    path, content = checkpoint
    if state.optimizer is not None:
        state.restore(content, path, global_batch, world)
    else:
        if "model_ema" not in content:
            state.model_ema = None
        load_model_and_ema(state.model, state.model_ema, content, path)
    bad, notes = content.get("bad_images", []), []
    if any(isinstance(name, int) for name in bad):
        bad, notes = [], ["unreadable images of an earlier version's checkpoint are not counted: it has no names"]
    return Start(notes, bad, content.get("unwritten_log", ""))


def is_finished(checkpoint: Checkpoint, state: TrainState, path: str, folder: str, save_predictions: bool) -> bool:
    """Whether nothing is left to train, and none of the files of its end to write.

    Args:
        checkpoint: from which `state` was restored.
        path: the value of `--resume`.
        folder: the run folder; `save_predictions`, whether it gets predictions.npz.

    Raises:
        SystemExit: nothing is left, and `path` names the file.
    """
    num_epochs = state.scheduler.num_epochs
    if not checkpoint.path or state.epoch < num_epochs:
        return False
    if needs_last_files(folder, checkpoint.path, save_predictions):
        return False
    if path != "auto":
        raise SystemExit(
            f"error: --resume {checkpoint.path} has finished its {num_epochs} epochs; raise --epochs with "
            "--resume-with-changes, or use --eval"
        )
    return True


def find_newest(folder: Path, rename: bool = True) -> Path | None:
    """The newest undamaged checkpoint of a run folder, or None; damaged ones are reported and, if asked, renamed."""
    for path in checkpoint_files.candidates(folder / LAST):
        try:
            checkpoint_files.verify(path)
        except checkpoint_files.DamagedFile as error:
            now = f"; it is now {checkpoint_files.set_aside(path).name}" if rename else ""
            print(f"damaged checkpoint: {error}{now}", file=sys.stderr, flush=True)
        else:
            return path
    return None


def load(path: str) -> dict:
    """A checkpoint of this program or of DeiT for `--resume`, from a file or an https URL.

    Raises:
        SystemExit: the file is missing, damaged, or not one of this program's.
    """
    with errors_of("--resume"):
        path = local_file(path)
        checkpoint = read(path)
        if not isinstance(checkpoint, dict) or not is_weights(checkpoint.get("model")):
            raise ValueError(f"{path} has no weights under 'model'; it is not a checkpoint of this program")
    return checkpoint


def find_evaluated(path: str, folder: str, finetune: str, checkpoint_key: str = "") -> tuple[str, Origin]:
    """The file with the weights that an evaluation reads, and what it contains about their training.

    Args:
        path, folder: as for `find_checkpoint`.
        finetune: the file if `path` is empty, and `checkpoint_key` which of its weights, if it has several.

    Raises:
        SystemExit: there is none, or it is damaged.
    """
    if path == "auto":
        newest = find_newest(Path(folder), rename=False)  # the run may be going on
        if newest is None:
            raise SystemExit(f"error: --eval --resume auto: {folder} has no checkpoint to evaluate")
        path = str(newest)
    with errors_of("--resume" if path else "--finetune"):
        file = local_file(path or finetune)
        return file, origin(file, "" if path else checkpoint_key)
