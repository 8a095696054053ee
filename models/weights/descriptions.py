"""What an exported model says about its weights beside their tensors: names of classes, preprocessing, remedies."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import safetensors

FILES = ("model.safetensors", "pytorch_model.bin")
"""Names of the weights in a folder of timm, whose config.json describes them."""

KEYS = ("label_names", "preprocessing", "remedies")
"""What models.export writes as JSON into the metadata of a file."""

PREPROCESSING_FLAGS = {
    "mean": "mean",
    "std": "std",
    "interpolation": "interpolation",
    "crop_pct": "eval_crop_ratio",
    "crop_mode": "crop_mode",
}
"""{word of timm's configurations: flag}"""


class Description(NamedTuple):
    """What is known about weights; empty where they are not described.

    Attributes:
        classes: names in the order of the outputs.
        preprocessing: {flag: value} with which images are preprocessed.
        remedies: {name: settings} of the remedies that they were trained with.
        is_average: whether they are averaged ones.
    """

    classes: list[str]
    preprocessing: dict[str, object]
    remedies: dict[str, dict[str, object]]
    is_average: bool

    def training(self) -> dict[str, object]:
        """The flags of the training that are known."""
        settings = {name: value for of_one in self.remedies.values() for name, value in of_one.items()}
        return {"remedy": [*self.remedies], "remedy_kwargs": settings} if self.remedies else {}


def describe(path: str) -> Description:
    """The description in the metadata of a file of `--to safetensors`, or in timm's config.json beside a file.

    A file that cannot be read has none; loading its weights reports the error.
    """
    try:
        known = _metadata(path) or _config(Path(path))
        names, images = known.get("label_names") or [], known.get("preprocessing") or {}
        flags = {flag: images[word] for word, flag in PREPROCESSING_FLAGS.items() if images.get(word) is not None}
        remedies = {name: dict(settings) for name, settings in (known.get("remedies") or {}).items()}
        return Description([*map(str, names)], flags, remedies, known.get("weights") == "EMA")
    except (OSError, ValueError, TypeError, AttributeError):  # also a file of another program with these names
        return Description([], {}, {}, False)


def _metadata(path: str) -> Mapping[str, object]:
    """What models.export writes into a file of safetensors; {} for another file."""
    if not path.endswith(".safetensors"):
        return {}
    try:
        with safetensors.safe_open(path, "pt") as file:
            found = file.metadata() or {}
    except safetensors.SafetensorError:
        return {}
    known = {name: json.loads(found[name]) for name in KEYS if name in found}
    return known | {"weights": found.get("weights")} if known else {}


def _config(path: Path) -> Mapping[str, object]:
    """The same of timm's config.json beside a file, or of transformers' preprocessor_config.json, which has mean and
    standard deviation; {} if there is none, or if it is another program's."""
    file = path.with_name("config.json")
    if path.name not in FILES or not file.is_file():
        return {}
    config = json.loads(file.read_text(encoding="utf-8"))
    if "model_type" in config:  # transformers' names of classes are words where timm's are synsets
        images = json.loads(path.with_name("preprocessor_config.json").read_text(encoding="utf-8"))
        return {"preprocessing": {"mean": images.get("image_mean"), "std": images.get("image_std")}}
    if "architecture" not in config:
        return {}
    return config | {"preprocessing": config.get("pretrained_cfg")}
