"""Evaluate a model on several sets: `--eval --eval-sets`."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from pipeline.evaluation_set_classes import OpenSets
from pipeline.evaluation_set_images import SetImages
from pipeline.run_data import Data
from training.checkpoint import TrainState
from training.evaluation import evaluate_both
from training.predictions import Predictions, write_arrays
from training.records import EVALUATION, EVALUATION_PAGE
from training.run_folder import same_error_everywhere
from training.set_results import NAMES, SetResult, corruption_table, measure, record_of, results_table
from utils import World, atomic_write, write_json


class ChosenOutputs(nn.Module):
    """A classifier that has some of the outputs of another one.

    Args:
        model: images [B, 3, S, S] -> logits [B, C].
        outputs: numbers of K of the C logits, in the order in which they are returned.
    """

    def __init__(self, model: nn.Module, outputs: Sequence[int]):
        super().__init__()
        self.model = model
        device = next(model.parameters()).device
        self.register_buffer("outputs", torch.tensor([*outputs], device=device), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [B, K]."""
        return self.model(images)[:, self.outputs]


@contextlib.contextmanager
def explain_outputs(sets: OpenSets | None) -> Iterator[None]:
    """Add to an error of loading weights how their outputs were named, which decides how many the model has."""
    try:
        yield
    except SystemExit as error:
        raise SystemExit("; ".join([str(error.code), *(sets.notes if sets else ())])) from None


def evaluate_sets(
    sets: OpenSets,
    build: Callable[[SetImages, bool], Data],
    state: TrainState,
    world: World,
    amp_dtype: torch.dtype | None = None,
    is_average: bool = False,
) -> list[SetResult]:
    """Evaluate the raw weights and their average on each set; every process calls it and gets the same results.

    Args:
        build: images of a set, and whether they are not cropped -> their batches.
        state: its model and average are evaluated.
        is_average: whether the weights of the model are averaged ones, and so are called ema.

    Raises:
        SystemExit: an image cannot be read.
    """
    results = []
    for each in sets.sets:
        models = [state.model, state.model_ema.module] if state.model_ema else [state.model]
        if each.outputs is not None:
            models = [ChosenOutputs(model, each.outputs) for model in models]
        average = SimpleNamespace(module=models[1]) if state.model_ema else None
        data = each.data or build(each.images, each.entry.whole_image)
        predictions = Predictions(data, world)
        evaluate_both(models[0], average, data, world, amp_dtype, predictions=predictions)
        arrays = predictions.gather()
        if is_average:
            arrays = {name.replace("raw", "ema", 1): values for name, values in arrays.items()}
        measured = measure(arrays, each.classes, each.right, each.images.parts)
        results.append(SetResult(each, measured, arrays))
        if world.is_main:
            accuracies = ", ".join(f"{NAMES[kind]} {values['acc1']:.2f} %" for kind, values in measured.items())
            print(f"{each.label} is evaluated: top-1 {accuracies}", flush=True)
    return results


def require_folder(folder: str):
    """Refuse, before an evaluation, a folder for its results that cannot be made or written; empty = no results.

    Raises:
        SystemExit: it cannot.
    """
    path = Path(folder).absolute()
    there = next(place for place in (path, *path.parents) if place.exists())
    if folder and not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise SystemExit(
            f"error: --output-dir {folder} cannot be written: {there} is no folder that this user may write to"
        )


def end_evaluation(
    folder: str,
    world: World,
    about: dict,
    results: Sequence[SetResult],
    save_predictions: bool,
    write_page: Callable[[dict], str],
):
    """Print the tables, and write evaluation.json, its page and predictions_SET.npz; every process calls it.

    Args:
        folder: made if it does not exist; empty = nothing is written.
        about: what was evaluated.
        save_predictions: whether the predictions of each set are written.
        write_page: content of evaluation.json -> text of the page.

    Raises:
        SystemExit: on all processes, if the folder cannot be written.
    """
    epoch = "" if about.get("epoch") is None else f", trained until epoch {about['epoch']}"
    if world.is_main:
        print(f"{about['weights']}{epoch}:")
        print("\n".join([results_table(results), *filter(None, map(corruption_table, results))]), flush=True)
    if not folder:
        return
    path = Path(folder)
    with same_error_everywhere(folder, world):
        if world.is_main:
            path.mkdir(parents=True, exist_ok=True)
            for each, _, arrays in results if save_predictions else ():
                names = {"classes": np.array(each.classes), "path": np.array(each.names())}
                write_arrays(arrays | names, path / f"predictions_{each.label}.npz")
            content = about | {"sets": {result.of.label: record_of(result) for result in results}}
            write_json(content, path / EVALUATION)
            with atomic_write(path / EVALUATION_PAGE) as file:
                file.write(write_page(content).encode())
            print(f"{path / EVALUATION} and {EVALUATION_PAGE} have the accuracy of each class and confused classes")
