"""Opens the data set that a run names: the images to train on and those to evaluate on."""

from pathlib import Path

from torch.utils.data import Dataset

from models.weights import refusal
from pipeline.holdout import divide
from pipeline.labelled import known_labels
from pipeline.sources import SourceOptions, find_source
from utils import is_bug


def build_sources(options: SourceOptions, is_training: bool) -> tuple[Dataset | None, Dataset]:
    """The images to train on, None unless `is_training`, and those to evaluate on; see `build_source`."""
    if _is_divided(options):
        train, val = _parts(options)
        return train if is_training else None, val
    return _open(options, is_training=True) if is_training else None, _open(options, is_training=False)


def build_source(options: SourceOptions, is_training: bool) -> Dataset:
    """The data set that --data-set names, without transforms: its items are (PIL image, label).

    With --val-fraction, training and validation set are two parts of the training images.

    Raises:
        SystemExit: an unknown name, files that are missing or cannot be read, or images that cannot be divided.
    """
    if _is_divided(options):
        train, val = _parts(options)
        return train if is_training else val
    return _open(options, is_training)


def _is_divided(options: SourceOptions) -> bool:
    """Whether the training images are divided; images without labels are not, as nothing is trained on them."""
    return options.val_fraction > 0 and find_source(options.data_set).has_labels


def _parts(options: SourceOptions) -> tuple[Dataset, Dataset]:
    images = _open(options, is_training=True)
    labels = known_labels(images)
    if labels is None:
        raise SystemExit(
            f"error: --val-fraction needs to know the label of each image before it is read, and --data-set "
            f"{options.data_set} does not; give --val-fraction 0"
        )
    return divide(images, labels, options.val_fraction, find_source(options.data_set).class_names(images))


def _open(options: SourceOptions, is_training: bool) -> Dataset:
    source, name, path = find_source(options.data_set), options.data_set, options.data_path
    if "data_path" in source.flags and not source.path_is_optional:
        if not path:
            raise SystemExit(f"error: --data-set {name} needs --data-path, the folder that holds it")
        if not Path(path).is_dir():
            raise SystemExit(f"error: --data-path {path} is not a folder")
    try:
        return source.open(options, is_training)
    except Exception as error:  # the libraries raise anything from AssertionError to HTTP errors
        if is_bug(error):
            raise
        refused = refusal(error)
        reason = f"a file {refused}" if refused else " ".join(str(error).split()) or type(error).__name__
        place = f" from {path}" if path else ""
        raise SystemExit(f"error: --data-set {name} cannot be read{place}: {reason}") from None
