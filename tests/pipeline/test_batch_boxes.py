"""Boxes of many images at once are those of timm's random resized crop."""

import random

import numpy as np
import pytest
from PIL import Image
from scipy import stats
from timm.data.transforms import RandomResizedCropAndInterpolation

from pipeline.batch_boxes import BOX_DRAWS, resized_crops

UNLIKELY = 1e-3


def timms_crops(size, scale, ratio, count=3000):
    """(top, left, height, width) [count, 4] from timm's random resized crop of an image of `size` (height, width)."""
    random.seed(0)
    image = Image.new("L", size[::-1])
    return np.array([RandomResizedCropAndInterpolation.get_params(image, scale, ratio) for _ in range(count)])


def crops(size, scale, ratio, count=3000):
    uniforms = np.random.default_rng(0).random((count, BOX_DRAWS))
    return resized_crops(uniforms, np.tile(size, (count, 1)), scale, ratio)


@pytest.mark.parametrize(
    "size, scale, ratio",
    [
        ((300, 400), (0.08, 1.0), (3 / 4, 4 / 3)),
        ((400, 120), (0.5, 1.0), (0.5, 1.0)),  # most tries do not fit
        ((60, 60), (0.1, 0.2), (1.5, 3.0)),
    ],
)
def test_crops_are_distributed_as_timms(size, scale, ratio):
    ours, theirs = (np.array(draw(size, scale, ratio), float) for draw in (crops, timms_crops))
    assert (ours[:, :2] >= 0).all() and (ours[:, :2] + ours[:, 2:] <= size).all() and (ours[:, 2:] >= 1).all()
    for quantity in range(4):
        assert stats.ks_2samp(ours[:, quantity], theirs[:, quantity]).pvalue > UNLIKELY, quantity
    for combine in (np.multiply, np.divide):  # area and aspect ratio
        assert stats.ks_2samp(*(combine(boxes[:, 2], boxes[:, 3]) for boxes in (ours, theirs))).pvalue > UNLIKELY


@pytest.mark.parametrize("size", [(100, 20), (20, 100), (30, 30), (1, 1), (2, 3)])
@pytest.mark.parametrize("ratio", [(3 / 4, 4 / 3), (2.0, 3.0)])
def test_where_no_try_fits_the_crop_is_timms_in_the_middle(size, ratio):
    scale = (2.0, 3.0)
    [expected] = timms_crops(size, scale, ratio, count=1)
    expected = np.maximum(expected, [0, 0, 1, 1])  # timm returns a height of 0 for an image of a pixel
    np.testing.assert_array_equal(crops(size, scale, ratio, count=3), np.tile(expected, (3, 1)))


def test_images_of_several_sizes_have_their_own_crops():
    sizes = np.array([[30, 400], [400, 30], [64, 64]] * 200)
    boxes = resized_crops(np.random.default_rng(0).random((600, BOX_DRAWS)), sizes, (0.08, 1.0), (3 / 4, 4 / 3))
    assert (boxes[:, :2] + boxes[:, 2:] <= sizes).all()
    assert (boxes[0::3, 1].max() > 300) and boxes[1::3, 0].max() > 300


def test_a_crop_of_an_image_of_a_pixel_is_the_pixel():
    boxes = resized_crops(np.random.default_rng(0).random((50, BOX_DRAWS)), np.ones((50, 2), int), (0.08, 1), (1, 1))
    assert (boxes == [0, 0, 1, 1]).all()
