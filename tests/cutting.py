"""What a run feeds its model and leaves in its folder, and a signal during it.

As a program, also for torchrun: python cutting.py OUT MOMENT RANK TARGET SIGNAL FLAGS of main.py... At the moment,
once, that rank sends the signal; every rank leaves the sample indices of its steps as OUT/<rank>.json.

    MOMENT  step:EPOCH:STEP (after it), validation:EPOCH, save:NUMBER (while it is written), or never
    TARGET  self, group (it and its loader workers), or parent (torchrun)
    SIGNAL  such as TERM
"""

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from helpers import TINY, few_digits, log_of, run_main

import main
from pipeline.batch_augmentation import BatchAugmentation
from training import checkpoint, checkpoint_files, saving
from training.stopping import RESUMABLE

DIGITS = 960  # of the program's data set
EVERYTHING = (
    *(*TINY, "--preset", "released", "--epochs", "3", "--batch-size", "32", "--accum-steps", "2", "--aug-repeats", "3"),
    *("--drop-path", "0.2", "--drop", "0.1", "--reprob", "0.5", "--warmup-epochs", "1", "--lr", "4e-3"),
    *("--unscale-lr", "--model-ema-decay", "0.9"),
    *("--mixing-where", "cutmix", "--diversity-warmup", "2", "--grad-norms-every", "2"),
    *("--log-interval", "3", "--save-every-minutes", "0", "--tensorboard"),
)
"""Flags of a run with every source of random numbers."""
TIMES = ("images_per_s", "data_wait", "training_seconds")  # endings of the names of measured times


def content(folder: Path) -> str:
    """Digest of the last checkpoint and the best ones, without flags, times, and lines that log.txt has since got."""
    last = torch.load(folder / checkpoint.LAST, weights_only=True)
    kept = {key: value for key, value in last.items() if key not in ("args", "seconds", "totals", "unwritten_log")}
    best = [torch.load(folder / name, weights_only=True)["model"] for name in checkpoint.BEST.values()]
    return digest([kept, *best])


def digest(tree) -> str:
    """Of nested dicts and lists of tensors and numbers, with the types and shapes of the tensors."""
    state = hashlib.sha256()

    def add(value):
        if isinstance(value, dict):
            for key in value:
                add(str(key))
                add(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        elif torch.is_tensor(value):
            state.update(f"{value.dtype} {tuple(value.shape)}".encode() + value.contiguous().numpy().tobytes())
        else:
            state.update(repr(value).encode())

    add(tree)
    return state.hexdigest()


def records(folder: Path) -> list[dict]:
    """log.txt without times."""
    return [without_times(record) for record in log_of(folder)]


def without_times(record: dict) -> dict:
    return {name: value for name, value in record.items() if not name.endswith(TIMES)}


def points(folder: Path) -> dict[str, list[tuple]]:
    """TensorBoard's points without times."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # takes a second to import

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if not tag.endswith(TIMES)
    }


def outcome(folder: Path) -> dict:
    """What a finished run has left that must not depend on how often it was stopped."""
    unfinished = sorted(path.name for path in folder.iterdir() if path.suffix in (".damaged", ".tmp"))
    return {
        "checkpoints": content(folder),
        "log.txt": records(folder),
        "TensorBoard's points": points(folder),
        "summary.json": without_times(json.loads((folder / "summary.json").read_text())),
        "damaged and temporary files": unfinished,
    }


class InputRecorder:
    """Records a digest of every batch that the model gets, and calls `at` at every moment of the run.

    Args:
        replace: monkeypatch.setattr, or setattr.
        at: called with ("step", epoch, step), ("validation", epoch) or ("save", number).

    Attributes:
        digests: {(epoch, batch): digest}.
        indices: {"epoch step": sample indices of the step}.
        last: (epoch, step) of the last step.
    """

    def __init__(self, replace: Callable, at: Callable = lambda *moment: None):
        self.digests, self.indices, self.last, self.saves = {}, {}, None, 0
        train, augment = main.train_one_epoch, BatchAugmentation.forward
        after_batch, write = saving.Saver.after_batch, checkpoint_files.write

        def watched_train(loss_fn, loader, state, update, *args, **kwargs):
            self.state, self.batch = state, state.step * update.accum_steps
            after_step, images = kwargs["after_step"], update.guard.images

            def stop():
                self.last = (state.epoch, state.step)
                numbers = images(state.step - 1).removeprefix("images number ").split(", ")
                self.indices[f"{state.epoch} {state.step}"] = sorted(map(int, numbers))
                at("step", *self.last)
                after_step()

            return train(loss_fn, loader, state, update, *args, **kwargs | {"after_step": stop})

        def watched_augment(augmentation, *batch):
            mixed, target = augment(augmentation, *batch)
            tensors = [t.contiguous().numpy().tobytes() for t in (mixed, target.labels, target.lam, target.patch_lam)]
            key, digest = (self.state.epoch, self.batch), hashlib.sha256(b"".join(tensors)).hexdigest()
            if self.digests.get((self.state.epoch, self.batch - 1)) == digest:  # gradient norms were measured on it
                return mixed, target
            assert self.digests.setdefault(key, digest) == digest
            self.batch += 1
            return mixed, target

        def watched_after_batch(saver):
            at("validation", saver.state.epoch)
            after_batch(saver)

        def watched_write(*args, **kwargs):
            self.saves += 1
            at("save", self.saves)
            write(*args, **kwargs)

        replace(main, "train_one_epoch", watched_train)
        replace(BatchAugmentation, "forward", watched_augment)
        replace(saving.Saver, "after_batch", watched_after_batch)
        replace(checkpoint_files, "write", watched_write)


def send(target: str, number: int):
    """Send a signal to this process, its process group, or its parent."""
    if target == "group":
        os.killpg(os.getpgrp(), number)
    else:
        os.kill({"self": os.getpid, "parent": os.getppid}[target](), number)


def cut_run(monkeypatch, folder, *cuts, flags=EVERYTHING, then=()):
    """Run `flags`, stopped by SIGTERM after each (epoch, step) of `cuts` and continued; returns the digests of batches.

    Args:
        then: further flags of the runs that continue.
    """
    digests = {}
    for i, cut in enumerate((*cuts, None)):
        with monkeypatch.context() as patch:
            recorder = InputRecorder(patch.setattr, partial(_stop_at, ("step", *(cut or ()))))
            code = None
            try:
                run_main(*flags, *(then if i else ()), "--output-dir", folder, "--resume", "auto")
            except SystemExit as stopped:
                code = stopped.code
            assert code == (RESUMABLE if cut else None)
            assert not cut or recorder.last == cut
            assert not digests.keys() & recorder.digests.keys()
            digests |= recorder.digests
    return digests


def _stop_at(moment, *now):
    if now == moment:
        send("self", signal.SIGTERM)


if __name__ == "__main__":
    out, when, rank, to, name, *flags = sys.argv[1:]
    own, sent = os.environ.get("RANK", "0"), Path(out, "sent")

    def interrupt(*moment):
        if rank == own and ":".join(map(str, moment)) == when and not sent.exists():
            sent.write_text(str(time.time()))
            send(to, signal.Signals[f"SIG{name}"])
            if moment[0] == "save":
                time.sleep(0.5)  # the signal comes while the file is written

    recorder = InputRecorder(setattr, interrupt)
    try:
        with few_digits(DIGITS):
            run_main(*flags)
    finally:
        Path(out, f"{own}.json").write_text(json.dumps(recorder.indices))
