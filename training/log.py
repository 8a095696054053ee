"""What a run writes while it trains: log.txt, TensorBoard events, and the lines on the console."""

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

from models.weights import Origin
from pipeline.run_data import Data
from training.records import LOG, GrowingFile, parse_records
from utils import World, atomic_write

COUNTS = ("epoch", "n_parameters", "test_images", "test_images_ema", "redundancy_images")
"""Numbers of a record that TensorBoard does not show."""


class RunLog:
    """What a run reports: console lines, `log.txt` (one JSON object per epoch, DeiT's keys) and TensorBoard events.

    Only the main process writes. What a disk does not take is reported, kept, and written later.

    Args:
        output_dir: the run folder, or None to write to the console alone.
        world: this process.
        tensorboard: also write events.
        epoch, step: where the run starts; what an earlier process logged after that is removed.
        unwritten: of the log of the earlier process.
    """

    def __init__(
        self,
        output_dir: Path | None,
        world: World,
        tensorboard: bool,
        epoch: int = 0,
        step: int = 0,
        unwritten: str = "",
    ):
        self.is_main = world.is_main
        self.lines = self.events = None
        self.last = {}  # step of the last point of each name
        if output_dir is None or not self.is_main:
            return
        self.lines = GrowingFile(output_dir / LOG)
        with final_records(output_dir):
            _restore(self.lines.path, epoch, unwritten)
        if tensorboard:
            from training.events import Events  # here, as the import takes a second

            self.events = Events(output_dir, step)

    @property
    def unwritten(self) -> str:
        """The lines of log.txt that could not be written yet."""
        return self.lines.unwritten.decode() if self.lines else ""

    def print(self, text: str, on_all_ranks: bool = False):
        if self.is_main or on_all_ranks:
            tqdm.write(text)
            sys.stdout.flush()

    def scalars(self, values: dict[str, float], step: int):
        """TensorBoard points at an optimizer step."""
        if self.events:
            for name, value in values.items():
                self.events.add_scalar(name, value, step)
            self.last |= dict.fromkeys(values, step)

    def figure(self, name: str, draw: Callable, step: int):
        """The matplotlib figure that `draw()` returns, in TensorBoard; it is closed. Without events it is not drawn."""
        if self.events:
            self.events.add_figure(name, draw(), step)

    def texts(self, texts: dict[str, str], step: int):
        """Preformatted texts in TensorBoard."""
        if self.events:
            self.events.add_texts(texts, step)

    def hyperparameters(self, flags: dict, accuracies: dict[str, float], step: int):
        """The flags of a finished run with its last accuracies, a row of TensorBoard's table of runs."""
        if self.events:
            metrics = by_group({f"test_{name}": value for name, value in accuracies.items()}, "")
            self.events.add_hyperparameters(flags, metrics, step)

    def epoch(self, record: dict, step: int):
        """One epoch's record: a line of log.txt, and its numbers in TensorBoard at its last step.

        A term's mean over the epoch is left out where that step has a point of the term.
        """
        points = {name: value for name, value in by_group(record, "epoch").items() if self.last.get(name) != step}
        self.scalars(points, step)
        if self.lines:
            self.lines.add(f"{json.dumps(record)}\n".encode())
        self.flush()

    def flush(self):
        """Write what is not written yet; an error is reported, and the next call tries again."""
        for file in filter(None, (self.lines, self.events)):
            file.flush()

    def close(self):
        """Write what is not written yet.

        Raises:
            OSError: it cannot be written.
        """
        for file in filter(None, (self.lines, self.events)):
            file.close()


def by_group(values: dict[str, object], group: str) -> dict[str, float]:
    """Names for TensorBoard, GROUP/TITLE, of the numbers in a record of an epoch or in the means of some steps.

    Terms are those that have a fraction of the loss, `<term>_share`.

    Args:
        group: of the loss, its classification part, learning rate, gradient norm and the factor of the coefficients.
    """
    points = {}
    for name, value in values.items():
        title = name.removeprefix("train_")
        if not isinstance(value, int | float) or name in COUNTS:
            continue
        if title in ("loss", "classification", "lr", "lr_min", "grad_norm", "diversity_factor"):
            points[f"{group}/{title}"] = value
        elif title.endswith("_share"):
            points[f"fractions/{title.removesuffix('_share')}"] = value
        elif f"{name}_share" in values:
            points[f"terms/{title}"] = value
        elif name.startswith(("test_", "redundancy_", "gradnorm_")):
            points[name.replace("_", "/", 1)] = value
        else:
            points[f"system/{title}"] = value
    return points


def _restore(path: Path, epoch: int, unwritten: str):
    """Remove the lines of this and later epochs, and incomplete ones, from log.txt; add those that were `unwritten`."""
    text = path.read_text() if path.exists() else ""
    records = [record for record in parse_records(text + unwritten) if record is not None and record["epoch"] < epoch]
    wanted = "".join(f"{json.dumps(record)}\n" for record in {record["epoch"]: record for record in records}.values())
    if wanted != text:
        with atomic_write(path) as file:
            file.write(wanted.encode())


@contextlib.contextmanager
def final_records(folder: Path) -> Iterator[None]:
    """Turn an error of the disk into the line that a command ends with; the next one with --resume auto continues."""
    try:
        yield
    except OSError as error:
        line = f"{error.filename or folder} cannot be written: {error.strerror}"
        raise SystemExit(f"error: {line}; the run is saved, start again with --resume auto") from None


def epoch_line(record: dict[str, float], num_epochs: int) -> str:
    """An epoch on one line of at most 100 columns; its terms are in log.txt and in `terms_table`."""
    loss = f"loss {record['train_loss']:.4g}" if "train_loss" in record else "no step taken"
    accuracies = _accuracies({name.removeprefix("test_"): value for name, value in record.items()})
    speed = f"{record['train_images_per_s']:.0f} images/s, data wait {100 * record['train_data_wait']:.0f} %"
    return f"epoch {record['epoch']} of {num_epochs}: {loss}, accuracy {accuracies}, {speed}"


def evaluation_lines(file: str, origin: Origin, data: Data, stats: dict[str, float]) -> str:
    """What was evaluated; loss in nats and accuracies in percent, one line for each kind of weights.

    Args:
        file: of the weights; `origin` is what it contains about their training.
        stats: of `evaluate_both`.
    """
    epoch = "" if origin.epoch is None else f", trained until epoch {origin.epoch}"
    names = "" if origin.classes or data.are_some_classes else ", whose order is taken from the data"
    names += f": {', '.join(data.classes[:3])}, ..." if names and data.classes else ""
    some = f"{data.num_val_classes} of " if data.are_some_classes else ""
    what = f"{file}{epoch}: {stats['images']} images, {some}{data.num_classes} classes{names}"
    first = "EMA" if origin.is_average else "raw"
    kinds = {"raw": "", "EMA": "_ema"} if "acc1_ema" in stats else {first: ""}
    rows = [
        f"{kind:<10}{stats[f'loss{end}']:>10.4g}{stats[f'acc1{end}']:>10.2f} %{stats[f'acc5{end}']:>10.2f} %"
        for kind, end in kinds.items()
    ]
    return "\n".join(
        [what, f"{'weights':<10}{'loss':>10}{'top-1':>12}{'top-5':>12}", *rows, accuracy_line(stats, first)]
    )


def accuracy_line(stats: dict[str, float], first: str = "raw") -> str:
    """The accuracies of `evaluate_both` on one line; `first` is what the weights of the model are."""
    return f"test accuracy: {_accuracies(stats, first)}"


def _accuracies(stats: dict[str, float], first: str = "raw") -> str:
    ema = f", EMA {stats['acc1_ema']:.2f} %" if "acc1_ema" in stats else ""
    return f"{first} {stats['acc1']:.2f} %{ema}"


def terms_table(record: dict[str, float]) -> str:
    """The terms of an epoch's record, one line each: raw value and weighted fraction of the loss; empty without one.

    Where gradient norms were measured, also a term's norm, and its ratio to that of the classification loss.
    """
    names = [name.removesuffix("_share") for name in record if name.endswith("_share")]
    heading = f"{'term':<28}{'value':>12}{'of the loss':>14}"
    rows = [
        f"{name.removeprefix('train_'):<28}{record[name]:>12.4g}{100 * record[f'{name}_share']:>12.2f} %"
        for name in names
    ]
    whole = record.get("gradnorm_classification")
    if rows and whole:
        heading += f"{'gradient norm':>16}{'of classification':>20}"
        norms = [record.get(f"gradnorm_{name.removeprefix('train_')}", math.nan) for name in names]
        ratios = [f"{100 * norm / whole:#.3g}".removesuffix(".") for norm in norms]
        rows = [f"{row}{norm:>16.3g}{ratio:>18} %" for row, norm, ratio in zip(rows, norms, ratios, strict=True)]
    return "\n".join([heading, *rows]) if rows else ""
