"""What is predicted for each validation image in an evaluation, such as a run's last one: predictions.npz."""

import io
import zipfile
from pathlib import Path

import numpy as np
import torch

from pipeline.run_data import Data
from training.classification_metrics import ImageResults
from training.provenance import read_starts
from training.records import PREDICTIONS
from utils import World, atomic_write

KINDS = {"": "raw", "_ema": "ema"}
"""{ending of the names of `engine.evaluate`: name of the predictions in the file}"""

TYPES = {"predicted": np.int32, "confidence": np.float32, "in_top5": np.bool_, "loss": np.float32}
"""{field of `ImageResults`: type of its numbers in the file}"""


def array_name(kind: str, field: str) -> str:
    """The name in the file of a field of `ImageResults`: raw for the predicted classes, and raw_loss, for example."""
    return kind if field == "predicted" else f"{kind}_{field}"


class Predictions:
    """Collects the results of an evaluation; every process calls each method.

    Args:
        data: whose validation images are evaluated.
    """

    def __init__(self, data: Data, world: World):
        self.world = world
        self.numbers = None if data.is_stream else data.val_numbers
        self.is_shared = data.val_is_shared
        self.batches: list[dict[str, torch.Tensor]] = []

    def clear(self):
        """Forget the results of the evaluation before."""
        self.batches = []

    def add(self, labels: torch.Tensor, results: dict[str, ImageResults]):
        """Add the labels [B] of this process's next batch and {ending: its results}; they stay on their device."""
        batch = {"label": labels}
        for ending, of_images in results.items():
            batch |= {array_name(KINDS[ending], field): getattr(of_images, field) for field in TYPES}
        self.batches.append(batch)

    def gather(self) -> dict[str, np.ndarray]:
        """The results of all processes in the order of the images, arrays [n], on every process.

        These are `image`, their numbers, which for a validation part are those of training images, and for a stream
        their places in the order in which they came; `label`; and for each kind of weights, raw and, if there is an
        average, ema, the predicted class under its name, <kind>_confidence, <kind>_in_top5 and <kind>_loss.

        Each image has one result: where every process evaluates all images, it is the one of the main process.
        """
        own = self._own()
        # Another process may have no image.
        types = self.world.from_main({name: values.dtype for name, values in own.items()})
        numbers = self.numbers
        if numbers is None:
            numbers = range(self.world.from_main(len(own["label"]) if own else 0))
        arrays = {"image": np.asarray(numbers, dtype=np.int32)}
        for name, dtype in types.items():
            values = torch.zeros(len(numbers), dtype=dtype)
            if self.is_shared and own:
                values[self.world.rank :: self.world.size] = own[name]
            elif self.world.is_main:
                values[:] = own[name]
            summed = self.world.sum(values.to(self.world.device)).cpu().numpy()
            arrays[name] = summed.astype(TYPES.get(name.partition("_")[2], np.int32))
        return arrays

    def _own(self) -> dict[str, torch.Tensor]:
        """The results of this process on the CPU, in types that can be summed."""
        names = [*self.batches[0]] if self.batches else []
        joined = {name: torch.cat([batch[name] for batch in self.batches]).cpu() for name in names}  # one copy of each
        return {name: values if values.is_floating_point() else values.long() for name, values in joined.items()}


def results_of(arrays: dict[str, np.ndarray]) -> dict[str, ImageResults]:
    """{kind of weights, raw or ema: its results} in the arrays of `Predictions.gather` or of a file."""
    return {
        kind: ImageResults(*(arrays.get(array_name(kind, field)) for field in ImageResults._fields))
        for kind in KINDS.values()
        if kind in arrays
    }


def write_predictions(arrays: dict[str, np.ndarray], folder: Path, epoch: int):
    """Write what `Predictions.gather` returns to predictions.npz, with the epoch and the digest of the images.

    The digest is val_digest of the last start in environment.json.
    """
    digest = read_starts(folder)[-1]["data"]["val_digest"]
    write_arrays({"val_digest": np.array(digest), "epoch": np.array(epoch), **arrays}, folder / PREDICTIONS)


def write_arrays(arrays: dict[str, np.ndarray], path: Path):
    """Write arrays to an .npz file in one step."""
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    with atomic_write(path) as file:
        file.write(content.getvalue())


def read_predictions(folder: Path) -> dict[str, np.ndarray] | None:
    """The arrays of predictions.npz; None without the file. Earlier versions wrote the predicted classes alone.

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
