"""Batches of cached images are cropped, flipped, changed by a policy, normalised and erased as Pillow does it."""

import numpy as np
import pytest
import torch
from batch_transforms import (
    PLAIN,
    WHOLE,
    apply,
    batch_transform,
    fix_numbers,
    fix_operations,
    in_a_batch,
    photos,
    to_bytes,
)
from PIL import Image
from timm.data import auto_augment

from pipeline.batch_augmentation import Normalize
from pipeline.batch_boxes import BOX_DRAWS, resized_crops
from pipeline.batch_transform import PADDING

FILL = (30, 200, 120)
GEOMETRY = {"shear_x": 0.3, "shear_y": -0.21, "translate_x": 5.3, "translate_y": -7.2, "rotate": 25}
PIXELS = {
    **{"autocontrast": None, "equalize": None, "invert": None, "posterize": 3, "solarize": 100, "solarize_add": 60},
    **{"color": 0.4, "contrast": 1.7, "brightness": 1.3, "sharpness": 1.8},
}


def pillows(images, *operations):
    """Bytes [B, 3, H, W] after operations (name, strength) of timm, one after the other."""
    functions = {"autocontrast": "auto_contrast", "translate_x": "translate_x_abs", "translate_y": "translate_y_abs"}
    for name, strength in operations:
        function = getattr(auto_augment, functions.get(name, name))
        args = () if strength is None else (strength,)
        images = [function(image, *args, fillcolor=FILL, resample=Image.Resampling.BILINEAR) for image in images]
    return in_a_batch(images)


def ours(images, *operations, size=32):
    """What `pillows` returns, from a batch transform without crop and flip."""
    transform = batch_transform(*PLAIN, *WHOLE, "--input-size", size)
    transform.fill = FILL
    fix_numbers(transform)
    fix_operations(transform, *((name, strength or 0) for name, strength in operations))
    return to_bytes(transform, apply(transform, in_a_batch(images)))


@pytest.mark.parametrize("size", [32, 48])
@pytest.mark.parametrize("name", PIXELS)
def test_operations_on_pixels_are_pillows(name, size):
    images, operation = photos(3, size), (name, PIXELS[name])
    expected = pillows(images, operation)
    assert not torch.equal(expected, in_a_batch(images))
    assert torch.equal(ours(images, operation, size=size), expected.float())


@pytest.mark.parametrize("size", [32, 48])
@pytest.mark.parametrize("name", GEOMETRY)
def test_geometry_is_pillows_up_to_rounding(name, size):
    """Pillow cuts off what is behind the point, so that its values are smaller by up to 1."""
    images, operation = photos(3, size), (name, GEOMETRY[name])
    difference = ours(images, operation, size=size) - pillows(images, operation)
    assert difference.min() >= 0 and difference.max() <= 1


@pytest.mark.parametrize("operations", [("solarize", "brightness", "color"), ("color", "brightness", "solarize")])
def test_operations_on_pixels_keep_their_order(operations):
    operations = [(name, PIXELS[name]) for name in operations]
    images = photos(3, 32)
    expected = pillows(images, *operations).float()
    assert torch.equal(ours(images, *operations), expected)
    assert not torch.equal(ours(images, *reversed(operations)), expected)


@pytest.mark.parametrize("names", [("shear_x", "rotate"), ("rotate", "translate_x"), ("translate_y", "shear_x")])
def test_geometry_is_composed_in_its_order(names):
    """Pillow samples twice and so blurs a little; the fill colour of the first operation is moved by the second."""
    operations, images = [(name, GEOMETRY[name]) for name in names], photos(3, 32)
    expected = pillows(images, *operations)
    error, other_error = (
        (ours(images, *order) - expected).abs().mean() for order in (operations, reversed(operations))
    )
    assert error < 6 and other_error > 15


def test_what_the_first_operation_moves_out_does_not_come_back():
    there_and_back = ("translate_x", 10.0), ("translate_x", -10.0)
    images = photos(2, 32)
    assert torch.equal(ours(images, *there_and_back), pillows(images, *there_and_back).float())


def test_geometry_comes_before_operations_on_pixels():
    images = photos(2, 32)
    solarize, rotate = ("solarize", 100), ("rotate", 25)
    assert torch.equal(ours(images, solarize, rotate), ours(images, rotate, solarize))
    difference = (ours(images, solarize, rotate) - pillows(images, rotate, solarize)).abs()
    assert (difference > 1).float().mean() < 0.01  # rounded to the other side of the threshold


@pytest.mark.parametrize("is_flipped", [False, True])
@pytest.mark.parametrize("corner", [(0, 0), (8, 3), (5, 4)])
def test_small_images_are_padded_cropped_and_flipped(corner, is_flipped):
    transform = batch_transform(*PLAIN, "--hflip", float(is_flipped))
    rows = np.full((2, transform.table.num_draws), 0.5, np.float32)
    rows[:, :2] = (np.array(corner) + 0.5) / 9
    transform.table.rows = lambda *args: rows
    images = in_a_batch(photos(2, 32))
    top, left = corner
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (PADDING, PADDING), (PADDING, PADDING)))
    expected = padded[:, :, top : top + 32, left : left + 32][..., :: -1 if is_flipped else 1]
    expected = Normalize(transform.options.mean, transform.options.std)(torch.from_numpy(expected.copy()))
    assert torch.equal(apply(transform, images), expected)
    larger = batch_transform(*PLAIN, "--hflip", float(is_flipped), cache_size=64)
    larger.table.rows = transform.table.rows
    enlarged = images.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)  # reading between four equal pixels
    torch.testing.assert_close(apply(larger, enlarged), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("cache_size", [24, 40, 64])
def test_the_padding_of_small_images_does_not_mix_with_them(cache_size, interpolation):
    """Bicubic weights are negative: an edge beside black would be brighter than the image."""
    transform = batch_transform(*PLAIN, "--train-interpolation", interpolation, cache_size=cache_size)
    grey = torch.full((64, 3, cache_size, cache_size), 200, dtype=torch.uint8)
    images = to_bytes(transform, apply(transform, grey))
    corners = (transform.table.rows(0, np.arange(64), np.zeros(64, int))[:, :2] * 9).astype(int)
    for image, (top, left) in zip(images, corners, strict=True):
        expected = np.pad(np.full((32, 32), 200), PADDING)[top : top + 32, left : left + 32]
        assert (image.numpy() == expected).all()


def smooth(size, seed):
    """A picture without detail, (width, height)."""
    values = np.random.RandomState(seed).randint(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [(90, 60), (50, 120)])
@pytest.mark.parametrize("is_flipped", [False, True])
def test_crops_of_squashed_images_are_those_of_the_files(size, is_flipped):
    words = "--input-size", 64, "--hflip", float(is_flipped), "--scale", 0.2, 0.4  # enlarged, as reducing also blurs
    transform = batch_transform(*PLAIN, *words, cache_size=80)
    images = [smooth(size, seed) for seed in range(8)]
    squashed = in_a_batch([image.resize((80, 80), Image.Resampling.BICUBIC) for image in images])
    sizes = np.tile(size[::-1], (8, 1))
    cropped = to_bytes(transform, apply(transform, squashed, sizes=sizes))
    uniforms = transform.table.rows(0, np.arange(8), np.zeros(8, int))[:, :BOX_DRAWS]
    boxes = resized_crops(uniforms, sizes, transform.options.scale, transform.options.ratio).tolist()
    assert len({tuple(box) for box in boxes}) == 8
    expected = [
        image.resize((64, 64), Image.Resampling.BILINEAR, (left, top, left + width, top + height))
        for image, (top, left, height, width) in zip(images, boxes, strict=True)
    ]
    expected = in_a_batch(expected)
    expected = expected.flip(3) if is_flipped else expected
    assert (cropped - expected).abs().mean() < 1
    assert (cropped - expected.flip(3)).abs().mean() > 10


def test_both_kernels_are_used_under_random_interpolation():
    words = (*PLAIN, "--input-size", 48, "--scale", 0.2, 0.4)
    images, kernels = in_a_batch(photos(32, 48)), ("bilinear", "bicubic", "random")
    bilinear, bicubic, mixed = (
        apply(batch_transform(*words, "--train-interpolation", kernel), images) for kernel in kernels
    )
    is_bilinear = (mixed == bilinear).flatten(1).all(1)
    assert torch.equal(~is_bilinear, (mixed == bicubic).flatten(1).all(1))
    assert 8 <= is_bilinear.sum() <= 24


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_boxes_are_erased_after_normalising(mode, count):
    erasing = "--reprob", 0.5, "--remode", mode, "--recount", count
    transform, plain = batch_transform(*PLAIN, *erasing), batch_transform(*PLAIN)
    images = in_a_batch(photos(64, 32))
    for each in (transform, plain):
        uniforms = each.table.rows(0, np.arange(64), np.zeros(64, int))
        uniforms[:, :2] = 0.5
        each.table.rows = lambda *args, uniforms=uniforms: uniforms
    erased, whole = apply(transform, images), apply(plain, images)
    boxes = transform.erasing.boxes(uniforms_of_erasing(transform), (32, 32))
    fills = []
    for image, before, image_boxes in zip(erased, whole, boxes, strict=True):
        inside = torch.zeros(32, 32, dtype=torch.bool)
        for yl, yh, xl, xh in image_boxes:
            inside[yl:yh, xl:xh] = True
        assert torch.equal(image[:, ~inside], before[:, ~inside])
        fills += [image[:, inside]] if inside.any() else []
    assert 16 < len(fills) < 48
    if mode == "const":
        assert all((fill == 0).all() for fill in fills)
    if mode == "rand" and count == 1:
        assert all((fill == fill[:, :1]).all() and len(fill.unique()) == 3 for fill in fills)
        assert len({fill[0, 0].item() for fill in fills}) == len(fills)
    if mode == "pixel":
        values = torch.cat([fill.flatten() for fill in fills])
        assert values.mean() == pytest.approx(0, abs=0.03) and values.std() == pytest.approx(1, abs=0.03)
        assert len(values.unique()) > 0.9 * len(values)


def uniforms_of_erasing(transform):
    """The columns of the table from which boxes are drawn."""
    uniforms = transform.table.rows(0, np.arange(64), np.zeros(64, int))
    return uniforms[:, -transform.erasing.num_draws :]
