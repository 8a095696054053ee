"""What an auto-augment policy does to each image of a batch: operations and strengths, from uniform numbers.

Strengths have the unit of Pillow's function: a factor of an enhancement, bits kept, a threshold, degrees, the factor of
a shear. A translation is in pixels that are added to the place that is read.
"""

from collections.abc import Callable
from itertools import permutations
from typing import NamedTuple

import numpy as np
import torch
from timm.data.auto_augment import rand_augment_transform
from torchvision.transforms import AutoAugment, AutoAugmentPolicy

GEOMETRY = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
COLORS = ("color", "contrast", "brightness", "sharpness")  # Pillow's enhancements
OPERATIONS = (
    *("identity", *GEOMETRY, "autocontrast", "equalize", "invert", "posterize", "solarize", "solarize_add"),
    *COLORS,
)
FRACTION_OF_FULL = 10.0  # timm's level of full strength

Level = Callable[[np.ndarray, np.ndarray], np.ndarray]  # fraction of the full strength, sign -> strength


class Choice(NamedTuple):
    """What happens to the images of a batch, layer after layer.

    Attributes:
        operations: places in `OPERATIONS`, [B, L] int64; 0 = nothing.
        strengths: [B, L] float32; of no meaning for an operation without strength.
    """

    operations: np.ndarray
    strengths: np.ndarray


def _no_strength(fraction: np.ndarray, sign: np.ndarray) -> np.ndarray:
    return np.zeros_like(fraction)


def _signed(full: float, offset: float = 0.0, least: float = -np.inf) -> Level:
    return lambda fraction, sign: np.maximum(least, offset + full * fraction * sign)


def _timm_levels(image_size: int) -> dict[str, tuple[str, Level]]:
    """Operations of timm's RandAugment: its name -> the name in `OPERATIONS`, and the strength."""
    levels = {
        "AutoContrast": ("autocontrast", _no_strength),
        "Equalize": ("equalize", _no_strength),
        "Invert": ("invert", _no_strength),
        "Rotate": ("rotate", _signed(30)),
        "Posterize": ("posterize", lambda fraction, sign: np.trunc(4 * fraction)),
        "PosterizeIncreasing": ("posterize", lambda fraction, sign: 4 - np.trunc(4 * fraction)),
        "Solarize": ("solarize", lambda fraction, sign: np.minimum(256, np.trunc(256 * fraction))),
        "SolarizeIncreasing": ("solarize", lambda fraction, sign: 256 - np.minimum(256, np.trunc(256 * fraction))),
        "SolarizeAdd": ("solarize_add", lambda fraction, sign: np.minimum(128, np.trunc(110 * fraction))),
        "ShearX": ("shear_x", _signed(0.3)),
        "ShearY": ("shear_y", _signed(0.3)),
        "TranslateXRel": ("translate_x", _signed(0.45 * image_size)),
        "TranslateYRel": ("translate_y", _signed(0.45 * image_size)),
    }
    for name in COLORS:
        levels[name.title()] = (name, lambda fraction, sign: 1.8 * fraction + 0.1)
        levels[f"{name.title()}Increasing"] = (name, _signed(0.9, offset=1, least=0.1))
    return levels


def _torchvision_strengths(
    bins: int, shear: float, translate: float, rotate: float, enhance: float, bits: int
) -> dict[str, tuple[str, np.ndarray]]:
    """Operations of torchvision's policies: its name -> the name in `OPERATIONS`, and [bins, 2] strengths.

    The second strength of a bin is the negative one, where there is one.

    Args:
        bins: number of strengths, evenly spread from none to the full one.
        shear, translate, rotate, enhance: the full strengths, in `translate` in pixels.
        bits: that posterizing removes at full strength.
    """

    def signed(full: float) -> np.ndarray:
        return torch.linspace(0, full, bins).numpy()[:, None] * np.float32([1, -1])

    none = np.zeros((bins, 2))
    removed_bits = np.rint(np.arange(bins) / ((bins - 1) / bits))
    strengths = {
        "Identity": ("identity", none),
        "ShearX": ("shear_x", signed(shear)),
        "ShearY": ("shear_y", signed(shear)),
        "TranslateX": ("translate_x", -np.trunc(signed(translate))),
        "TranslateY": ("translate_y", -np.trunc(signed(translate))),
        "Rotate": ("rotate", signed(rotate)),
        "Posterize": ("posterize", 8 - np.stack((removed_bits, removed_bits), axis=1)),
        "Solarize": ("solarize", 255 - np.abs(signed(255))),
        "AutoContrast": ("autocontrast", none),
        "Equalize": ("equalize", none),
        "Invert": ("invert", none),
    }
    return strengths | {name.title(): (name, 1 + signed(enhance)) for name in COLORS}


class NoPolicy:
    """Nothing happens to any image."""

    num_draws = 0
    fills_with_mean = False

    def choose(self, uniforms: np.ndarray) -> Choice:
        """Uniform numbers [B, 0] -> no layers."""
        return Choice(np.zeros((len(uniforms), 0), np.int64), np.zeros((len(uniforms), 0), np.float32))


class RandAugment:
    """timm's RandAugment (Cubuk et al. 2020): layers of one operation each, drawn with replacement.

    Args:
        name: timm's string, such as rand-m9-mstd0.5-inc1.
        image_size: side of the images in pixels.

    Raises:
        ValueError: the operations have weights, or one of them is not among `OPERATIONS`.
    """

    DRAWS = 4  # of a layer: operation, whether it is applied, magnitude, sign
    fills_with_mean = True

    def __init__(self, name: str, image_size: int):
        of_timm = rand_augment_transform(name)
        levels = _timm_levels(image_size)
        names = [operation.name for operation in of_timm.ops]
        if of_timm.choice_weights is not None:
            raise ValueError("its operations have weights")
        if unknown := [name for name in names if name not in levels]:
            raise ValueError(f"it has the operation {unknown[0]}")
        operations, self.levels = zip(*(levels[name] for name in names), strict=True)
        self.operations = np.array([OPERATIONS.index(operation) for operation in operations])
        self.settings = of_timm.ops[0]  # the same for all
        self.num_layers = of_timm.num_layers
        self.num_draws = self.num_layers * self.DRAWS

    def choose(self, uniforms: np.ndarray) -> Choice:
        """Uniform numbers [B, num_draws], float64 -> what happens to B images."""
        which, applied, magnitude, sign = np.moveaxis(uniforms.reshape(len(uniforms), -1, self.DRAWS), 2, 0)
        which = (which * len(self.operations)).astype(np.int64)
        fraction = self._magnitude(magnitude) / FRACTION_OF_FULL
        sign = np.where(sign > 0.5, -1.0, 1.0)
        strengths = np.choose(which, [level(fraction, sign) for level in self.levels])
        operations = np.where(applied <= self.settings.prob, self.operations[which], 0)
        return Choice(operations, strengths.astype(np.float32))

    def _magnitude(self, uniforms: np.ndarray) -> np.ndarray:
        mean, std = self.settings.magnitude, self.settings.magnitude_std
        if std == np.inf:
            magnitude = mean * uniforms
        elif std > 0:
            magnitude = mean + std * torch.special.ndtri(torch.from_numpy(uniforms)).numpy()
        else:
            magnitude = np.full_like(uniforms, mean)
        return np.clip(magnitude, 0, self.settings.magnitude_max or FRACTION_OF_FULL)


class TrivialAugment:
    """torchvision's TrivialAugmentWide (Müller and Hutter 2021): one operation, of one of 31 strengths."""

    BINS = 31
    num_draws = 3  # operation, strength, sign
    fills_with_mean = False

    def __init__(self):
        strengths = _torchvision_strengths(self.BINS, shear=0.99, translate=32, rotate=135, enhance=0.99, bits=6)
        del strengths["Invert"]
        operations, strengths = zip(*strengths.values(), strict=True)
        self.operations = np.array([OPERATIONS.index(operation) for operation in operations])
        self.strengths = np.array(strengths, np.float32)

    def choose(self, uniforms: np.ndarray) -> Choice:
        """Uniform numbers [B, 3], float64 -> what happens to B images."""
        place = (uniforms * self.strengths.shape).astype(np.int64)
        which, level, sign = place.T
        return Choice(self.operations[which, None], self.strengths[which, level, sign, None])


class CifarAutoAugment:
    """AutoAugment's policy for CIFAR-10 (Cubuk et al. 2019) as torchvision has it: one of 25 pairs of operations.

    Args:
        image_size: side of the images in pixels.
    """

    BINS = 10
    num_draws = 5  # pair; for each of its operations whether it is applied, and the sign
    fills_with_mean = False

    def __init__(self, image_size: int):
        strengths = _torchvision_strengths(
            self.BINS, shear=0.3, translate=150 / 331 * image_size, rotate=30, enhance=0.9, bits=4
        )
        pairs = AutoAugment(AutoAugmentPolicy.CIFAR10).policies
        operations = [[strengths[name][0] for name, *_ in pair] for pair in pairs]
        self.operations = np.array([[OPERATIONS.index(operation) for operation in pair] for pair in operations])
        self.probabilities = np.array([[probability for _, probability, _ in pair] for pair in pairs])
        strengths = [[strengths[name][1][level or 0] for name, _, level in pair] for pair in pairs]
        self.strengths = np.array(strengths, np.float32)

    def choose(self, uniforms: np.ndarray) -> Choice:
        """Uniform numbers [B, 5], float64 -> what happens to B images."""
        pair = (uniforms[:, 0] * len(self.operations)).astype(np.int64)
        operations = np.where(uniforms[:, 1:3] <= self.probabilities[pair], self.operations[pair], 0)
        sign = (uniforms[:, 3:] * 2).astype(np.int64)
        return Choice(operations, np.take_along_axis(self.strengths[pair], sign[..., None], axis=2)[..., 0])


class ColorJitter:
    """torchvision's ColorJitter of brightness, contrast and saturation, in an order that each image draws.

    Args:
        strength: factors are uniform from 1 - strength, at least 0, to 1 + strength.
    """

    num_draws = 4  # order, three factors
    fills_with_mean = False
    ORDERS = np.array([*permutations(OPERATIONS.index(name) for name in ("brightness", "contrast", "color"))])

    def __init__(self, strength: float):
        self.low, self.high = max(0.0, 1 - strength), 1 + strength

    def choose(self, uniforms: np.ndarray) -> Choice:
        """Uniform numbers [B, 4], float64 -> what happens to B images."""
        operations = self.ORDERS[(uniforms[:, 0] * len(self.ORDERS)).astype(np.int64)]
        return Choice(operations, (self.low + (self.high - self.low) * uniforms[:, 1:]).astype(np.float32))


Policy = NoPolicy | RandAugment | TrivialAugment | CifarAutoAugment | ColorJitter


def build_policy(aa: str | None, color_jitter: float, image_size: int) -> Policy:
    """The policy that --aa names, or where it names none, --color-jitter.

    Raises:
        SystemExit: a policy that is not applied to batches.
    """
    if aa == "trivialaugment":
        return TrivialAugment()
    if aa == "autoaugment-cifar10":
        return CifarAutoAugment(image_size)
    if aa is None:
        return ColorJitter(color_jitter) if color_jitter else NoPolicy()
    known = "rand-... (such as rand-m9-mstd0.5-inc1), trivialaugment, autoaugment-cifar10 or none"
    try:
        if aa.startswith("rand"):
            return RandAugment(aa, image_size)
        reason = "it is not available for batches"
    except (AssertionError, ValueError) as error:
        reason = str(error) or "timm does not know it"
    raise SystemExit(f"error: --aa {aa} does not work with --cache-images: {reason}; use {known}")
