"""How images are preprocessed for an exported model, in the words of timm's configuration."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import floor

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from models.weights.descriptions import PREPROCESSING_FLAGS

SMALL = 32
"""Up to this input size in pixels, a run resizes its images and does not crop them."""


@dataclass(frozen=True)
class Preprocessing:
    """What a model expects of its images; the names of the fields are timm's.

    Attributes:
        input_size: side of the square input in pixels.
        mean, std: of each channel, for values from 0 to 1.
        interpolation: of the resize.
        crop_pct: the input size divided by the size to which an image is resized before the crop.
        crop_mode: center, squash (both sides are resized) or border.
    """

    input_size: int
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"

    @classmethod
    def of_flags(cls, flags: Mapping[str, object], input_size: int) -> "Preprocessing":
        """As a run with these flags preprocesses its validation images; a flag without a value has DeiT's."""
        known = {field: flags.get(flag) for field, flag in PREPROCESSING_FLAGS.items()}
        if input_size <= SMALL:
            known |= {"crop_pct": 1.0, "crop_mode": "squash"}
        known = {field: tuple(value) if isinstance(value, list) else value for field, value in known.items()}
        return cls(input_size, **{field: value for field, value in known.items() if value is not None})

    @property
    def resize(self) -> int:
        """Pixels to which the shorter side of an image is resized (with squash: both sides) before the crop."""
        return floor(self.input_size / self.crop_pct)

    def of_timm(self) -> dict[str, object]:
        """timm's data configuration."""
        return asdict(self) | {"input_size": (3, self.input_size, self.input_size)}

    def line(self) -> str:
        """One line for a reader."""
        mean, std = (" ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        side = {"squash": "both sides", "border": "the longer side"}.get(self.crop_mode, "the shorter side")
        crop = {"border": ", padded to a square", "squash": "" if self.resize == self.input_size else ", cropped"}
        crop = crop.get(self.crop_mode, ", cropped")
        return f"{side} resized to {self.resize} px ({self.interpolation}){crop}, mean {mean}, std {std}"
