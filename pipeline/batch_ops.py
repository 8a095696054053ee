"""Pillow's operations on pixels for a batch of images, each with its own strength.

Each function takes bytes [B, 3, H, W] and strengths [B] float32, and returns bytes [B, 3, H, W] on the same device. Its
strength has the unit of Pillow's or timm's function of that name. On the CPU, values are equal to Pillow's, which
computes in float32 where it blends two images; a compiler that fuses a product and a sum may change them by 1 of 255.
No function waits for the device, and none draws random numbers.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torchvision.transforms.v2 import functional


class PixelOp(NamedTuple):
    """An operation on pixels.

    Attributes:
        name: its key in PIXEL_OPS.
        apply: images [B, 3, H, W] uint8, strength [B] float32 -> images [B, 3, H, W] uint8.
        has_strength: False = `apply` ignores the strength.
    """

    name: str
    apply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    has_strength: bool


def autocontrast(images: torch.Tensor, strength: torch.Tensor | None = None) -> torch.Tensor:
    """The values of each colour stretched to 0 to 255, as by PIL.ImageOps.autocontrast; a single value stays."""
    low, high = (extreme(dim=(2, 3))[..., None].double() for extreme in (images.amin, images.amax))
    scale = torch.full_like(low, 255) / (high - low)  # not 255 / (high - low), a rounded reciprocal times 255
    values = torch.arange(256, dtype=torch.float64, device=images.device)
    stretched = (values * scale - low * scale).clamp_(0, 255)  # in float64 and in this order, as Pillow rounds it
    table = torch.where(low == high, values, stretched).to(torch.uint8)
    return table.gather(2, images.flatten(2).long()).view_as(images)


def equalize(images: torch.Tensor, strength: torch.Tensor | None = None) -> torch.Tensor:
    """The histogram of each colour made even, as by PIL.ImageOps.equalize; torchvision's function takes a batch."""
    return functional.equalize(images)


def invert(images: torch.Tensor, strength: torch.Tensor | None = None) -> torch.Tensor:
    """255 less each value, as PIL.ImageOps.invert."""
    return functional.invert(images)


def posterize(images: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """The highest bits of each value, as PIL.ImageOps.posterize.

    Args:
        images: [B, 3, H, W] uint8.
        bits: [B], kept bits, 0 to 8; 8 changes nothing.
    """
    return images & _per_image(256 - torch.exp2(8 - bits)).to(torch.uint8)


def solarize(images: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Values from a threshold on are inverted, as by PIL.ImageOps.solarize.

    Args:
        images: [B, 3, H, W] uint8.
        threshold: [B], the lowest inverted value; 256 changes nothing.
    """
    return images ^ ((images >= _per_image(threshold)).view(torch.uint8) * 255)


def solarize_add(images: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    """A number is added to values below 128, as by timm's solarize_add.

    Args:
        images: [B, 3, H, W] uint8.
        added: [B], integers from 0 to 128, so that no sum is above 255.
    """
    return images + (images < 128) * _per_image(added).to(torch.uint8)


def color(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Saturation as PIL.ImageEnhance.Color: 0 is grey, 1 changes nothing."""
    values = images.float()
    return _blend(_luma(values), values, factor)


def contrast(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Contrast as PIL.ImageEnhance.Contrast: 0 is the mean luma everywhere, 1 changes nothing."""
    values = images.float()
    total = _luma(values).sum(dim=(2, 3), keepdim=True, dtype=torch.float64)
    mean = (total / images[0, 0].numel() + 0.5).floor_()
    return _blend(mean.float(), values, factor)


def brightness(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Brightness as PIL.ImageEnhance.Brightness: 0 is black, 1 changes nothing."""
    return (images * _per_image(factor)).clamp_(0, 255).to(torch.uint8)


def sharpness(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Sharpness as PIL.ImageEnhance.Sharpness: 0 is smoothed, 1 changes nothing; the border stays as it is."""
    values = images.float()
    inner = values[..., 1:-1, 1:-1]
    columns = (values[..., :-2, :] + values[..., 1:-1, :]).add_(values[..., 2:, :])
    squares = (columns[..., :-2] + columns[..., 1:-1]).add_(columns[..., 2:])
    smooth = squares.add_(inner, alpha=4).div_(13).add_(0.5).floor_()  # PIL.ImageFilter.SMOOTH: 5 and eight times 1
    sharpened = images.clone()
    sharpened[..., 1:-1, 1:-1] = _blend(smooth, inner, factor)
    return sharpened


PIXEL_OPS = {
    function.__name__: PixelOp(function.__name__, function, function not in (autocontrast, equalize, invert))
    for function in (
        *(autocontrast, equalize, invert, posterize, solarize),
        *(solarize_add, color, contrast, brightness, sharpness),
    )
}


def _per_image(strength: torch.Tensor) -> torch.Tensor:
    """[B] -> [B, 1, 1, 1], of float32."""
    return strength.float()[:, None, None, None]


def _luma(values: torch.Tensor) -> torch.Tensor:
    """Pillow's conversion to grey, [B, 3, H, W] -> [B, 1, H, W]; exact in float32, as 65536 times it is below 2^24."""
    red, green, blue = values.split(1, dim=1)
    luma = (19595 / 65536) * red
    return luma.add_(green, alpha=38470 / 65536).add_(blue, alpha=7471 / 65536).add_(0.5).floor_()


def _blend(degenerate: torch.Tensor, values: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """PIL.Image.blend in float32 from degenerate (factor 0) to values (factor 1) and beyond, cut to bytes."""
    blended = (values - degenerate).mul_(_per_image(factor)).add_(degenerate)
    return blended.clamp_(0, 255).to(torch.uint8)
