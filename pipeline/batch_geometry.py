"""Crop, flip, shear, translation and rotation of a batch of images as one affine map and one sampling of each image.

A map is a tensor [B, 2, 3] float32 of rows (a, b, c) and (d, e, f), as Pillow's Image.transform expects them: the pixel
whose centre is (x, y) in the output shows the input at (a x + b y + c, d x + e y + f). Centres of pixels are at 0.5,
1.5, ..., so that an image of width W reaches from 0 to W. Levels, degrees and boxes are tensors [B]. The functions make
maps with each entry as a row of memory: a CPU computes several times faster on 6 rows of B than on B rows of 6.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional as F


def identity(batch: int, device: torch.device | None = None) -> torch.Tensor:
    """The map [B, 2, 3] that changes nothing."""
    return torch.eye(2, 3, device=device)[..., None].repeat(1, 1, batch).permute(2, 0, 1)


def move(
    shear_x: torch.Tensor,
    shear_y: torch.Tensor,
    translate_x: torch.Tensor,
    translate_y: torch.Tensor,
    rotate: torch.Tensor,
    size: int,
) -> torch.Tensor:
    """Square images are sheared, moved or turned; of the numbers for an image, at most one is not 0.

    Args:
        shear_x, shear_y: rows are shifted in proportion to y, columns in proportion to x, as by timm's shear_x and
            shear_y, and torchvision's ShearX and ShearY.
        translate_x, translate_y: pixels that the image moves left and up, as by timm's translate_x_abs and
            translate_y_abs; torchvision's have the opposite sign.
        rotate: degrees that the image is turned around its centre, counterclockwise, as by PIL.Image.rotate.
        size: width and height in pixels.
    """
    angle, centre = torch.deg2rad(rotate), size / 2
    cos, sin = angle.cos(), angle.sin()
    x = cos, shear_x - sin, centre - centre * cos + centre * sin + translate_x
    y = sin + shear_y, cos, centre - centre * sin - centre * cos + translate_y
    return torch.stack((*x, *y)).unflatten(0, (2, 3)).movedim((0, 1), (-2, -1)).float()


def flip(is_flipped: torch.Tensor, width: int) -> torch.Tensor:
    """Left and right are exchanged where `is_flipped` [B]; the width is in pixels."""
    maps = identity(len(is_flipped), is_flipped.device)
    maps[:, 0, 0] = 1 - 2 * is_flipped.float()
    maps[:, 0, 2] = width * is_flipped.float()
    return maps


def crop(top: torch.Tensor, left: torch.Tensor, height: torch.Tensor, width: torch.Tensor, size: int) -> torch.Tensor:
    """A box [B] of the input, in its pixels, is resized to a square of `size` pixels."""
    maps = torch.zeros(2, 3, len(top), device=top.device).permute(2, 0, 1)
    maps[:, 0, 0], maps[:, 1, 1] = width / size, height / size
    maps[:, 0, 2], maps[:, 1, 2] = left, top
    return maps


def compose(first: torch.Tensor, then: torch.Tensor) -> torch.Tensor:
    """The map that does what `first` does to an image, then what `then` does to the result. Both are [B, 2, 3]."""
    # Not `@`, which is less exact under autocast and TF32.
    maps = first[..., :1] * then[..., :1, :] + first[..., 1:2] * then[..., 1:, :]
    maps[..., 2] += first[..., 2]
    return maps


def sample(
    images: torch.Tensor,
    maps: torch.Tensor,
    size: int,
    interpolation: str = "bilinear",
    frames: torch.Tensor | None = None,
    fill: Sequence[int] = (0, 0, 0),
    padding_mode: str = "zeros",
) -> torch.Tensor:
    """Each output image shows the input image under its map; one call of F.grid_sample, on any device.

    Values are rounded; Pillow cuts them, so that its values are smaller by up to 1.
    Bicubic weights are torch's (a = -0.75); those of Image.transform have a = -1.

    Args:
        images: uint8 [B, 3, C, C].
        maps: [B, 2, 3], from output pixels to input pixels.
        size: width and height of the output in pixels.
        interpolation: "nearest", exact and fastest for flips and shifts by whole pixels; "bilinear"; "bicubic".
        frames: [B, L, 2, 3], maps from output pixels to those of L intermediate images of `size` pixels: an output
            pixel outside any of them has the fill colour. None = there are none.
        fill: a colour of three bytes.
        padding_mode: what is outside the input: "zeros", black, which is not blended with the image, as F.grid_sample
            does; "border", the nearest pixel.

    Returns:
        uint8 [B, 3, size, size].
    """
    grid = torch.empty(len(images), size, size, 2, device=images.device)
    _positions(maps, size, images.shape[-1], out=grid.permute(0, 3, 1, 2))
    sampled = F.grid_sample(images.float(), grid, mode=interpolation, padding_mode="border", align_corners=False)
    sampled.add_(0.5).clamp_(0, 255)
    if padding_mode == "zeros":
        sampled.masked_fill_((grid.abs_().amax(dim=3) > 1)[:, None], 0)
    if frames is not None:
        is_outside = _positions(frames, size, size).abs_().amax(dim=(1, 2)) > 1
        for plane, value in zip(sampled.unbind(1), fill, strict=True):
            plane.masked_fill_(is_outside, value)
    return sampled.to(torch.uint8)


def _positions(maps: torch.Tensor, size: int, length: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """x and y in the input of size x size output pixels, [..., 2, size, size], from -1 to 1 as F.grid_sample has them.

    Args:
        maps: [..., 2, 3].
        size: of the output in pixels.
        length: of the square input in pixels.
        out: where the result is written; None = a new tensor.
    """
    centres = torch.arange(0.5, size, device=maps.device)
    of_column, of_row, shift = (maps * (2 / length))[..., None].unbind(-2)
    down = of_row * centres + (shift - 1)
    return torch.add(of_column[..., None] * centres, down[..., None], out=out)
