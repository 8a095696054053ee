"""What is done to an image before the model sees it: DeiT's transforms through timm."""

import random
from argparse import Namespace
from collections.abc import Callable

import numpy as np
import timm.data
import torch
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch.nn import functional as F
from torchvision import transforms


def build_transform(args: Namespace, is_training: bool, as_bytes: bool = False) -> Callable:
    """PIL image -> normalised tensor [3, S, S].

    Up to 32 px an image is resized whole, and in training padded by 4 px and cropped, as DeiT does for CIFAR.

    Args:
        as_bytes: uint8 [S, S, 3], neither normalised nor erased, which a `Prefetcher` does.
    """
    transform = _training_transform(args, as_bytes) if is_training else _validation_transform(args, as_bytes)
    if as_bytes:
        transform.transforms[-1] = pixels
    return transform


def pixels(image: Image.Image) -> torch.Tensor:
    """An RGB image's bytes as they lie in memory, [H, W, 3]: batches of them are stacked without rearranging."""
    return torch.from_numpy(np.array(image))


class FastCrop(RandomResizedCropAndInterpolation):
    """timm's random resized crop, enlarged or reduced by torch's kernel for bytes, several times as fast as Pillow's.

    Both filter alike, antialiased, and round differently: about 1 % of the values differ, by 2 of 255 at most. An image
    is remembered, as repeated augmentation crops it several times in a row.
    """

    image: Image.Image | None = None

    def __call__(self, image: Image.Image) -> Image.Image:
        if image is not self.image:
            self.image, self.planes = image, pixels(image).permute(2, 0, 1)
        top, left, height, width = self.get_params(image, self.scale, self.ratio)
        height, width = max(1, height), max(1, width)  # of an image a few pixels long it takes none
        top, left = min(top, image.height - height), min(left, image.width - width)
        kind = random.choice(self.interpolation) if isinstance(self.interpolation, tuple) else self.interpolation
        crop = self.planes[None, :, top : top + height, left : left + width]
        crop = crop.contiguous(memory_format=torch.channels_last)  # as Pillow has it, and twice as fast
        [crop] = F.interpolate(crop, size=self.size, mode=kind.value, antialias=True)
        return Image.fromarray(crop.permute(1, 2, 0).numpy())


def _training_transform(args: Namespace, as_bytes: bool) -> transforms.Compose:
    try:
        transform = timm.data.create_transform(
            input_size=args.input_size,
            is_training=True,
            scale=args.scale,
            ratio=args.ratio,
            hflip=args.hflip,
            color_jitter=args.color_jitter or None,
            auto_augment=args.aa,
            interpolation=args.train_interpolation,
            re_prob=args.reprob,
            re_mode=args.remode,
            re_count=args.recount,
            use_prefetcher=as_bytes,
        )
    except (AssertionError, ValueError, KeyError, IndexError, NotImplementedError):
        raise SystemExit(
            f"error: --aa {args.aa} is no auto-augment policy of timm, such as rand-m9-mstd0.5-inc1"
        ) from None
    if args.input_size <= 32:
        size = (args.input_size, args.input_size)
        whole = transforms.Resize(size, interpolation=transforms.InterpolationMode.BICUBIC)
        transform.transforms[:1] = [whole, transforms.RandomCrop(size, padding=4)]
    elif args.fast_crop:
        transform.transforms[0] = FastCrop(args.input_size, args.scale, args.ratio, args.train_interpolation)
    return transform


def _validation_transform(args: Namespace, as_bytes: bool) -> transforms.Compose:
    small = args.input_size <= 32
    return timm.data.create_transform(
        input_size=args.input_size,
        interpolation="bicubic",
        crop_pct=1.0 if small else args.eval_crop_ratio,
        crop_mode="squash" if small else "center",
        use_prefetcher=as_bytes,
    )
