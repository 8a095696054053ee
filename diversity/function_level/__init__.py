"""What a model can still do, on labelled images, without a part of itself; and what can be read from its tokens.

Redundancy in similarities and ranks says that two things look the same. These measures remove one of them, or read
something from it.
"""

from collections.abc import Iterable

import torch
from torch import nn

from ..backbones import Backbone
from .ablation import accuracy, blocks, heads  # in the order of FUNCTION_MEASURES

from .token_drop import tokens  # isort: skip
from .probes import knn, probe  # isort: skip
from .patch_probe import patch_probe  # isort: skip
from .labelled import LabelledImages, eval_mode
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
        num_classes: of the labels; None = the outputs of the model's classifier.
        seed: of random orders and boxes.
        measures: names of `FUNCTION_MEASURES`; None = all.

    Returns:
        Numbers and lists only, ready for JSON: test_images, train_images, seed; for each measure its value, None
        where it does not apply; not_measured: {measure: why}; summary: {name: number}, see `function_summaries`.

    Raises:
        TapError: a model of another family.
        TypeError, ValueError: images or labels that cannot be used, or an unknown measure; see `LabelledImages`.
    """
    backbone = Backbone.require(model, "function")
    names = [*FUNCTION_MEASURES] if measures is None else [*measures]
    for name in names:
        if name not in FUNCTION_MEASURES:
            raise ValueError(f"unknown measure {name!r}; there are {', '.join(FUNCTION_MEASURES)}")
    classifier = model.get_submodule(backbone.head[-1])
    outputs = getattr(classifier, "out_features", None)
    num_classes = num_classes or outputs
    if num_classes is None:
        raise ValueError(f"{type(model).__name__} has no classifier, so num_classes is needed")
    device = next(model.parameters()).device
    inputs = {"model": model, "backbone": backbone, "num_classes": num_classes, "seed": seed}
    inputs["test"] = LabelledImages(test, num_classes, device, "test images")
    inputs["train"] = None if train is None else LabelledImages(train, num_classes, device, "training images")
    values, reasons = {}, {}
    with eval_mode(model):
        for name in names:
            entry = FUNCTION_MEASURES[name]
            try:
                if "train" in entry.reads and train is None:
                    raise NotMeasured(f"{name} is not measured: there are no training images")
                if entry.needs_head and outputs is None:
                    raise NotMeasured(f"{name} is not measured: the model has no classifier")
                values[name] = entry(**inputs)
            except NotMeasured as reason:
                values[name], reasons[name] = None, str(reason)
    counts = {f"{key}_images": inputs[key] and inputs[key].count() for key in ("test", "train")}
    return counts | {"seed": seed} | values | {"not_measured": reasons, "summary": summary_of(values)}
