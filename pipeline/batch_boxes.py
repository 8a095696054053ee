"""Boxes in images as timm draws them, for many images at once: random resized crops, and what random erasing erases."""

import math
from collections.abc import Sequence

import numpy as np

TRIES = 10  # as often do timm's random crop and timm's erasing draw a box until one fits
BOX_DRAWS = 2 + 2 * TRIES  # uniform numbers that a box needs


def draw_boxes(
    uniforms: np.ndarray, area: np.ndarray, log_aspects: Sequence[float], limits: np.ndarray, sides: np.ndarray
) -> np.ndarray:
    """The first of ten boxes that fits each image, as timm's random crop and timm's random erasing draw it.

    A try has an area and a logarithm of height over width, both uniform; its sides are rounded to pixels. The place of
    the box is uniform too.

    Args:
        uniforms: [N, BOX_DRAWS] in [0, 1).
        area: smallest and largest area of a box in pixels, [N, 2].
        log_aspects: smallest and largest logarithm of height over width.
        limits: largest height and width of a box that fits, [N, 2].
        sides: height and width of the images, [N, 2].

    Returns:
        (top, left, height, width) [N, 4], int64; height and width are 0 where none of the tries fits.
    """
    drawn = np.zeros((len(uniforms), 2), np.int64)
    pending = np.arange(len(uniforms))
    for attempt in range(2, BOX_DRAWS, 2):
        of_area, of_aspect = uniforms[pending, attempt : attempt + 2].T.astype(np.float64)
        low, high = area[pending].T
        pixels = low + (high - low) * of_area
        aspect = np.exp(log_aspects[0] + (log_aspects[1] - log_aspects[0]) * of_aspect)
        tried = np.rint(np.sqrt(np.stack((pixels * aspect, pixels / aspect), axis=1))).astype(np.int64)
        fits = (tried <= limits[pending]).all(axis=1)
        drawn[pending[fits]] = tried[fits]
        pending = pending[~fits]
        if not len(pending):
            break
    place = (uniforms[:, :2].astype(np.float64) * (sides - drawn + 1)).astype(np.int64)
    return np.concatenate((place, drawn), axis=1)


def resized_crops(
    uniforms: np.ndarray, sizes: np.ndarray, scale: Sequence[float], ratio: Sequence[float]
) -> np.ndarray:
    """Boxes of timm's random resized crop, in pixels of images of any size.

    Args:
        uniforms: [B, BOX_DRAWS] in [0, 1).
        sizes: height and width of the images, [B, 2].
        scale: smallest and largest area, as fractions of the image's.
        ratio: smallest and largest width over height.

    Returns:
        (top, left, height, width) [B, 4], int64. Where none of ten tries fits, the largest crop in the middle of the
        image whose aspect ratio is in `ratio`.
    """
    log_aspects = (-math.log(ratio[1]), -math.log(ratio[0]))
    boxes = draw_boxes(uniforms, sizes.prod(axis=1)[:, None] * np.array(scale), log_aspects, sizes, sizes)
    none_fits = np.flatnonzero((boxes[:, 2:] == 0).all(axis=1))
    if len(none_fits):
        height, width = sizes[none_fits].T
        sides = np.stack(
            (
                np.where(width < height * min(ratio), np.rint(width / min(ratio)), height),
                np.where(width > height * max(ratio), np.rint(height * max(ratio)), width),
            ),
            axis=1,
        ).astype(np.int64)
        boxes[none_fits] = np.concatenate(((sizes[none_fits] - sides) // 2, sides), axis=1)
    boxes[:, 2:] = np.maximum(boxes[:, 2:], 1)  # a side may be rounded to 0 in an image of a few pixels
    boxes[:, :2] = np.minimum(boxes[:, :2], sizes - boxes[:, 2:])
    return boxes
