"""What a model can still do, on labelled images, without a part of itself; and what can be read from its tokens.

Redundancy in similarities and ranks says that two things look the same. These measures remove one of them, or read
something from it.
"""

from collections.abc import Iterable

import torch
from torch import nn

from ..backbones import Backbone, TapError
from ..hooks import eval_mode
from .ablation import accuracy, blocks, heads  # in the order of FUNCTION_MEASURES

from .token_drop import tokens  # isort: skip
from .probes import knn, probe  # isort: skip
from .patch_probe import patch_probe  # isort: skip
from .labelled import LabelledImages
from .registry import FUNCTION_MEASURES, FunctionMeasure, NotMeasured, function_summaries, function_table, summary_of

__all__ = [
    "FUNCTION_MEASURES",
    "FunctionMeasure",
    "accuracy",
    "blocks",
    "function_summaries",
    "function_table",
    "heads",
    "knn",
    "measure_function",
    "patch_probe",
    "probe",
    "tokens",
]


@torch.no_grad()
def measure_function(
    model: nn.Module,
    test: Iterable,
    train: Iterable | None = None,
    *,
    num_classes: int | None = None,
    seed: int = 0,
    measures: Iterable[str] | None = None,
) -> dict:
    """Measure what a model can do on labelled images; see `FUNCTION_MEASURES` for the definitions.

    The model is put into eval mode, and back; every hook is removed. Images are read in chunks, several times. Memory
    does not grow with the number of training images; of the test images, `knn` holds the features.

    Args:
        model: a timm ViT, DeiT, BEiT, EVA or Swin, with remedies or without.
        test: batches of (images [B, 3, S, S], labels [B]) that can be read several times, in a random order of the
            classes; B of any size.
        train: other images in the same form, without augmentation, for `knn` and `probe`; None = without them.
        num_classes: of the labels, needed for a model without a classifier; None = its outputs.
        seed: of random orders and boxes.
        measures: names of `FUNCTION_MEASURES`; None = all.

    Returns:
        Numbers and lists only, ready for JSON: test_images and train_images, how many were read; seed; for each measure
        its value, None where it does not apply; not_measured: {measure: why}; summary: {name: number}, see
        `function_summaries`.

    Raises:
        TapError: a model of another family.
        TypeError, ValueError: images or labels that cannot be used, or an unknown measure; see `LabelledImages`.
    """
    backbone = Backbone.require(model, "tokens")
    if not backbone.is_timm:
        raise TapError("function-level measures", model, "they need a model of timm; load its weights into that")
    entries = [_find(name) for name in (FUNCTION_MEASURES if measures is None else measures)]
    outputs = getattr(model.get_submodule(backbone.head[-1]), "out_features", None)
    num_classes = num_classes or outputs
    if outputs not in (None, num_classes):
        raise ValueError(f"the model classifies into {outputs} classes, but the labels have {num_classes}")
    if num_classes is None:
        raise ValueError(f"{type(model).__name__} has no classifier, so num_classes is needed")
    device = next(model.parameters()).device
    images = {"test": LabelledImages(test, num_classes, device, "test images")}
    if train is not None:
        images["train"] = LabelledImages(train, num_classes, device, "training images")
    inputs = {"model": model, "backbone": backbone, "num_classes": num_classes, "seed": seed} | images
    values, reasons = {}, {}
    with eval_mode(model):
        for entry in entries:
            try:
                if not inputs.keys() >= {*entry.reads}:
                    raise NotMeasured(f"{entry.name} is not measured: there are no training images")
                if entry.needs_head and outputs is None:
                    raise NotMeasured(f"{entry.name} is not measured: the model has no classifier")
                values[entry.name] = entry(**inputs)
            except NotMeasured as reason:
                values[entry.name], reasons[entry.name] = None, str(reason)
    counts = {f"{key}_images": images[key].num_images if key in images else None for key in ("test", "train")}
    return counts | {"seed": seed} | values | {"not_measured": reasons, "summary": summary_of(values)}


def _find(name: str) -> FunctionMeasure:
    if name not in FUNCTION_MEASURES:
        raise ValueError(f"unknown measure {name!r}; there are {', '.join(FUNCTION_MEASURES)}")
    return FUNCTION_MEASURES[name]
