"""What has to be checked and imported before timm opens a data set by its name."""

import importlib.metadata
import importlib.util
import sys
from pathlib import Path

TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("val", "valid", "validation", "eval", "evaluation", "test")


def require_torch_split(name: str, root: str, split: str, is_training: bool) -> Path | None:
    """Refuse a split that timm would misread: it takes an unknown one for the test set, and a folder for any split.

    Args:
        name: with its prefix, e.g. "torch/cifar10".

    Returns:
        The folder of the split, for a folder of images.
    """
    name = name.partition("/")[2].lower()
    synonyms = next((names for names in (TRAIN_NAMES, VAL_NAMES) if split in names), (split,))
    if name in ("image_folder", "folder"):
        for folder in (split, *synonyms):
            if (Path(root) / folder).is_dir():
                return Path(root) / folder
        raise FileNotFoundError(f"it has no folder {' or '.join(synonyms)}")
    if name in ("cifar10", "cifar100", "mnist", "qmnist", "kmnist", "fashion_mnist"):
        allowed = TRAIN_NAMES if is_training else VAL_NAMES
        if split not in allowed:
            flag = "--train-split" if is_training else "--val-split"
            raise ValueError(f"{flag} {split} is not one of {', '.join(allowed)}")
    return None


def import_hugging_face():
    """Let `import datasets`, inside timm, find Hugging Face's package and not this project's module of that name.

    A module that imported datasets.py before keeps it.
    """
    try:
        package = importlib.metadata.distribution("datasets").locate_file("datasets/__init__.py")
    except importlib.metadata.PackageNotFoundError:
        raise ModuleNotFoundError("Hugging Face's package is not installed; pip install datasets") from None
    if getattr(sys.modules.get("datasets"), "__file__", None) == str(package):
        return
    spec = importlib.util.spec_from_file_location("datasets", package)
    sys.modules["datasets"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["datasets"])
