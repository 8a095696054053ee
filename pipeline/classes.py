"""The classes of a data set: their number, their names, and the outputs of a model that have these names."""

from torch.utils.data import Dataset

from pipeline.holdout import complete
from pipeline.sources import SourceOptions, find_source


def find_classes(
    options: SourceOptions, train: Dataset | None, val: Dataset, needs_labels: bool = True
) -> tuple[int, list[str]]:
    """The number of classes and their names in the order of the labels, empty where the data does not know them.

    Data without labels has 0 classes, if `needs_labels` is false and --num-classes is not given.

    Raises:
        SystemExit: train and val have different classes, more than --num-classes, or do not know them; or there are no
            labels.
    """
    source = find_source(options.data_set)
    if needs_labels and not source.has_labels:
        line = f"--data-set {options.data_set} has no labels to train with or to evaluate with; it is for analyze.py"
        raise SystemExit(f"error: {line}")
    names = source.class_names(complete(val))
    if train is not None and (of_train := source.class_names(complete(train))) != names:
        raise SystemExit(
            f"error: the classes of {options.data_path} differ: only in train: "
            f"{first_names(set(of_train) - set(names))}; only in val: {first_names(set(names) - set(of_train))}"
        )
    if not names and options.num_classes is None and source.has_labels:
        raise SystemExit(f"error: --data-set {options.data_set} does not say its classes; give --num-classes")
    if options.num_classes is not None and options.num_classes < len(names):
        raise SystemExit(f"error: --num-classes {options.num_classes}, but the data has {len(names)} classes")
    return options.num_classes or len(names), names


def labels_by_name(names: list[str], outputs: list[str], is_training: bool) -> list[int]:
    """For each class of the data the output of a model that has its name.

    Args:
        names: of the data's classes, in the order of its labels.
        outputs: names of the model's classes, in the order of its outputs.
        is_training: whether the data must have all of them; an evaluation may use some.

    Raises:
        SystemExit: the data has a class that the model does not have, or lacks one in training.
    """
    unknown, missing = {*names} - {*outputs}, {*outputs} - {*names} if is_training else set()
    if unknown or missing:
        raise SystemExit(
            f"error: the checkpoint was trained on other classes: only in the data: {first_names(unknown)}; "
            f"only in the checkpoint: {first_names({*outputs} - {*names})}"
        )
    return [outputs.index(name) for name in names]


def first_names(names: set[str]) -> str:
    """The first three names, for a message."""
    return ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "") or "none"
