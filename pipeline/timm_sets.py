"""What has to be checked and imported before timm opens a data set by its name."""

import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path

TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("val", "valid", "validation", "eval", "evaluation", "test")


def require_torch_split(name: str, root: str, split: str, is_training: bool):
    """Refuse a split that timm would misread: it takes an unknown one for the test set, and a folder for any split.

    Args:
        name: with its prefix, e.g. "torch/cifar10".
    """
    name = name.partition("/")[2].lower()
    synonyms = next((names for names in (TRAIN_NAMES, VAL_NAMES) if split in names), (split,))
    if name in ("image_folder", "folder"):
        if not any((Path(root) / folder).is_dir() for folder in synonyms):
            raise FileNotFoundError(f"it has no folder {' or '.join(synonyms)}")
    elif name in ("cifar10", "cifar100", "mnist", "qmnist", "kmnist", "fashion_mnist"):
        allowed = TRAIN_NAMES if is_training else VAL_NAMES
        if split not in allowed:
            flag = "--train-split" if is_training else "--val-split"
            raise ValueError(f"{flag} {split} is not one of {', '.join(allowed)}")


def import_hugging_face():
    """Let `import datasets`, inside timm, find Hugging Face's package and not this project's module of that name.

    A module that imported datasets.py before keeps it.
    """
    project = Path(__file__).parents[1].resolve()
    elsewhere = [entry for entry in sys.path if Path(entry).resolve() != project]
    spec = PathFinder.find_spec("datasets", elsewhere)
    if spec is None:
        raise ModuleNotFoundError("Hugging Face's package is not installed; pip install datasets")
    if getattr(sys.modules.get("datasets"), "__file__", None) == spec.origin:
        return
    package = importlib.util.module_from_spec(spec)
    sys.modules["datasets"] = package
    spec.loader.exec_module(package)
