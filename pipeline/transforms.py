"""What is done to an image before the model gets it: DeiT's transforms through timm."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import timm.data
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_interp_mode
from torch.nn import functional as F
from torchvision import transforms
from torchvision.transforms import InterpolationMode

TORCHVISION_POLICIES = {
    "trivialaugment": transforms.TrivialAugmentWide,
    "autoaugment-cifar10": partial(transforms.AutoAugment, transforms.AutoAugmentPolicy.CIFAR10),
}
"""{value of --aa: makes torchvision's policy from an interpolation and a fill}"""

SMALL = 32  # up to this input size in pixels, images are resized and not cropped, as DeiT does for CIFAR


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What a model expects of its images, by default as DeiT trains. Each field is the flag of its name."""

    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN
    std: Sequence[float] = IMAGENET_DEFAULT_STD
    interpolation: str = "bicubic"
    eval_crop_ratio: float = 0.875
    crop_mode: str = "center"


@dataclass(frozen=True, kw_only=True)
class TransformOptions(Preprocessing):
    """How images are cropped and augmented. Each field is the flag of its name, which `main.py --help` explains."""

    input_size: int
    scale: tuple[float, float]
    ratio: tuple[float, float]
    train_interpolation: str
    fast_crop: bool
    hflip: float
    aa: str | None
    color_jitter: float
    reprob: float
    remode: str
    recount: int


def preprocessing_line(options: TransformOptions) -> str:
    """What a run prints about the preprocessing of its images."""
    crop = f"{options.crop_mode} crop {options.eval_crop_ratio:g}" if options.input_size > SMALL else "no crop"
    mean, std = (" ".join(f"{value:g}" for value in values) for values in (options.mean, options.std))
    return f"images of {options.input_size} px: mean {mean}, std {std}, {options.interpolation}, {crop}"


def build_transform(options: TransformOptions, is_training: bool, as_bytes: bool = False) -> Callable:
    """PIL image -> normalised tensor [3, S, S].

    Up to 32 px an image is resized without a crop, and in training padded by 4 px and cropped, as DeiT does for CIFAR.

    Args:
        as_bytes: return uint8 [S, S, 3], neither normalised nor erased: both is done on the device.
    """
    build = _training_transform if is_training else _validation_transform
    transform = build(options, as_bytes)
    if as_bytes:
        transform.transforms[-1] = pixels
    return transform


def pixels(image: Image.Image) -> torch.Tensor:
    """The bytes of an RGB image in their order in memory, [H, W, 3]: a batch stacks them without rearranging."""
    return torch.from_numpy(np.array(image))


class FastCrop(RandomResizedCropAndInterpolation):
    """timm's random resized crop, resized by torch's kernel for bytes, several times as fast as Pillow's.

    Both use the same antialiased filter and round differently: about 1 % of the values differ, by 2 of 255 at most.
    The last image is remembered, as repeated augmentation crops it several times in a row.
    """

    image: Image.Image | None = None

    def __call__(self, image: Image.Image) -> Image.Image:
        if image is not self.image:
            self.image, self.planes = image, pixels(image).permute(2, 0, 1)
        top, left, height, width = self.get_params(image, self.scale, self.ratio)
        height, width = max(1, height), max(1, width)  # it may return 0 for an image of a few pixels
        top, left = min(top, image.height - height), min(left, image.width - width)
        kind = random.choice(self.interpolation) if isinstance(self.interpolation, tuple) else self.interpolation
        crop = self.planes[None, :, top : top + height, left : left + width]
        crop = crop.contiguous(memory_format=torch.channels_last)  # as Pillow stores it, and twice as fast
        [crop] = F.interpolate(crop, size=self.size, mode=kind.value, antialias=True)
        return Image.fromarray(crop.permute(1, 2, 0).numpy())


def _torchvision_policy(name: str, interpolation: InterpolationMode | tuple[InterpolationMode, ...]) -> Callable:
    """A policy of `TORCHVISION_POLICIES`, black where nothing of the image is left; one of several interpolations is
    drawn for each image.

    It draws from torch's generator, which a sample seeds.
    """
    modes = interpolation if isinstance(interpolation, tuple) else (interpolation,)
    policies = [TORCHVISION_POLICIES[name](interpolation=mode, fill=None) for mode in modes]
    return policies[0] if len(policies) == 1 else transforms.RandomChoice(policies)


def _training_transform(options: TransformOptions, as_bytes: bool) -> transforms.Compose:
    of_torchvision = options.aa in TORCHVISION_POLICIES
    try:
        transform = timm.data.create_transform(
            input_size=options.input_size,
            is_training=True,
            scale=options.scale,
            ratio=options.ratio,
            hflip=options.hflip,
            color_jitter=None if of_torchvision else options.color_jitter or None,
            auto_augment=None if of_torchvision else options.aa,
            interpolation=options.train_interpolation,
            mean=options.mean,
            std=options.std,
            re_prob=options.reprob,
            re_mode=options.remode,
            re_count=options.recount,
            use_prefetcher=as_bytes,
        )
    except (AssertionError, ValueError, KeyError, IndexError, NotImplementedError):
        names = ", ".join(TORCHVISION_POLICIES)
        raise SystemExit(
            f"error: --aa {options.aa} is no auto-augment policy: there are {names}, and timm's, such as "
            "rand-m9-mstd0.5-inc1"
        ) from None
    if of_torchvision:  # where timm has its policies: after the crop and the flip
        policy = _torchvision_policy(options.aa, transform.transforms[0].interpolation)
        transform.transforms.insert(2 if options.hflip else 1, policy)
    size = options.input_size
    if size <= SMALL:
        resize = transforms.Resize((size, size), interpolation=str_to_interp_mode(options.interpolation))
        transform.transforms[:1] = [resize, transforms.RandomCrop((size, size), padding=4)]
    elif options.fast_crop:
        transform.transforms[0] = FastCrop(size, options.scale, options.ratio, options.train_interpolation)
    return transform


def _validation_transform(options: TransformOptions, as_bytes: bool) -> transforms.Compose:
    is_small = options.input_size <= SMALL
    return timm.data.create_transform(
        input_size=options.input_size,
        interpolation=options.interpolation,
        mean=options.mean,
        std=options.std,
        crop_pct=1.0 if is_small else options.eval_crop_ratio,
        crop_mode="squash" if is_small else options.crop_mode,
        use_prefetcher=as_bytes,
    )
