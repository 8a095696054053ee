"""The classes of a data set: their number, their names, and the outputs of a model that have these names."""

from collections.abc import Sequence

from torch.utils.data import Dataset

from pipeline.evaluation_set_images import listed
from pipeline.evaluation_sets import imagenet_classes
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


def match_outputs(
    names: list[str], outputs: Sequence[str], is_training: bool, num_outputs: int | None = None
) -> tuple[list[int], list[str], list[str]]:
    """Match the classes of the data by name with the outputs of a model.

    Args:
        names: of the data's classes, in the order of its labels; empty = it does not know them.
        outputs: names of the model's classes, in the order of its outputs; empty = its file does not have them.
        is_training: whether the data must have all of them; an evaluation may use some.
        num_outputs: of a model without names, if the images must not be labelled by the order of some other classes.

    Returns:
        For each label of the data its output, empty if they are the same; names of the outputs; lines about them.

    Raises:
        SystemExit: the data has a class that the model does not have, or lacks one in training; or nothing says which
            outputs are the data's classes.
    """
    notes = []
    if not outputs and names and num_outputs not in (None, len(names)):
        outputs, notes = imagenet_classes(), ["the weights do not name their classes: the synsets of ImageNet-1k"]
        if num_outputs != len(outputs) or not {*names} <= {*outputs}:
            raise SystemExit(
                f"error: --num-classes {num_outputs}, but the data has {len(names)} classes, and the weights do not "
                "name theirs: nothing says which outputs are the data's classes; evaluate a checkpoint of this "
                "program, which names them"
            )
    if not outputs and not is_training and {*names} == {*map(str, range(len(imagenet_classes())))}:
        order = "the folders 0 to 999 are classes in the order of their names as text: 0, 1, 10, 100, ..."
        notes.append(f"warning: {order}; ImageNet-V2 is evaluated by --eval-sets imagenet-v2=PATH")
    if not outputs or not names:
        return [], [*outputs] or names, notes
    labels = [] if [*outputs] == names else labels_by_name(names, [*outputs], is_training)
    if missing := {*outputs} - {*names}:
        what = f"images of {len(names)} of the model's {len(outputs)} classes, matched by name"
        notes.append(f"{what}: {first_names({*names})}; none of {first_names(missing)}")
    return labels, [*outputs], notes


def first_names(names: set[str]) -> str:
    """The first names in their order as text, for a message."""
    return listed(sorted(names)) or "none"
