"""The predicted class of each validation image in a run's last evaluation: predictions.npz."""

import io
import zipfile
from pathlib import Path

import numpy as np
import torch

from pipeline.run_data import Data
from training.provenance import read_starts
from training.records import PREDICTIONS
from utils import World, atomic_write

KINDS = {"": "raw", "_ema": "ema"}
"""{ending of the names of `engine.evaluate`: name of the predictions in the file}"""


class Predictions:
    """Collects the predictions of an evaluation; every process calls each method.

    Args:
        data: of the run, whose validation images have numbers: it is no stream.
    """

    def __init__(self, data: Data, world: World):
        self.world, self.numbers = world, data.val_numbers
        self.is_shared = data.val_is_shared
        self.batches: list[dict[str, torch.Tensor]] = []

    def clear(self):
        """Forget the predictions of the evaluation before."""
        self.batches = []

    def add(self, labels: torch.Tensor, classes: dict[str, torch.Tensor]):
        """Add the labels [B] of this process's next batch and the predicted classes, {ending: [B]}."""
        self.batches.append({"label": labels} | {KINDS[ending]: predicted for ending, predicted in classes.items()})

    def gather(self) -> dict[str, np.ndarray]:
        """The predictions of all processes in the order of the images, [n] int32 under label, raw and, if there is an
        average, ema; image has their numbers, which for a validation part are those of training images.

        Each image has one prediction: where every process evaluates all images, it is the one of the main process.
        """
        names = self.world.from_main([*self.batches[0]] if self.batches else [])  # another process may have no image
        arrays = {"image": np.asarray(self.numbers, dtype=np.int32)}
        for name in names:
            values = torch.zeros(len(self.numbers), dtype=torch.int64)
            own = [batch[name].cpu() for batch in self.batches]
            if self.is_shared and own:
                values[self.world.rank :: self.world.size] = torch.cat(own)
            elif self.world.is_main:
                values[:] = torch.cat(own)
            arrays[name] = self.world.sum(values.to(self.world.device)).cpu().numpy().astype(np.int32)
        return arrays


def write_predictions(arrays: dict[str, np.ndarray], folder: Path, epoch: int):
    """Write what `Predictions.gather` returns to predictions.npz, with the epoch and the digest of the images.

    The digest is val_digest of the last start in environment.json.
    """
    digest = read_starts(folder)[-1]["data"]["val_digest"]
    content = io.BytesIO()
    np.savez_compressed(content, val_digest=np.array(digest), epoch=np.array(epoch), **arrays)
    with atomic_write(folder / PREDICTIONS) as file:
        file.write(content.getvalue())


def read_predictions(folder: Path) -> dict[str, np.ndarray] | None:
    """The arrays of predictions.npz; None without the file.

    Raises:
        ValueError: the file is damaged, or not one of this program.
    """
    path = folder / PREDICTIONS
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        raise ValueError(f"{path} cannot be read: it is damaged, or not one of this program") from None
    missing = {"image", "label", "raw", "val_digest", "epoch"} - arrays.keys()
    if missing:
        raise ValueError(f"{path} has no {', '.join(sorted(missing))}")
    return arrays
