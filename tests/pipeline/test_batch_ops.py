"""Operations on pixels of a batch, each against Pillow's or timm's function on every image by itself."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from timm.data import auto_augment

from pipeline.batch_ops import PIXEL_OPS

PILLOWS = {
    "autocontrast": lambda image, _: ImageOps.autocontrast(image),
    "equalize": lambda image, _: ImageOps.equalize(image),
    "invert": lambda image, _: ImageOps.invert(image),
    "posterize": lambda image, bits: auto_augment.posterize(image, int(bits)),
    "solarize": lambda image, threshold: ImageOps.solarize(image, threshold),
    "solarize_add": lambda image, added: auto_augment.solarize_add(image, int(added)),
    "color": lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    "contrast": lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    "brightness": lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    "sharpness": lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor),
}
FACTORS = [0, 0.1, 0.1234, 0.5, 0.99, 1, 1.01, 1.5, 1.9, 3.7]
STRENGTHS = {
    "posterize": [0, 1, 2, 3, 4, 5, 6, 7, 8, 4],
    "solarize": [0, 1, 17, 127, 127.5, 128, 200, 254, 255, 256],
    "solarize_add": [0, 1, 17, 55, 99, 110, 127, 128, 64, 3],
}
SIZES = [(32, 32), (13, 48), (1, 7), (2, 2), (96, 80)]


def pictures(count, height, width, seed=0):
    """Bytes [count, 3, H, W]: noise, narrow ranges, gradients, few values, a single value, as in bad photographs."""
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (count, 3, height, width))
    rows = np.linspace(0, 255, height)[:, None] * random.random((3, 1, 1))
    images[1] = rows + np.linspace(0, 90, width) * 0.5
    images[2] = random.integers(100, 103, (3, height, width))
    images[3] = np.array([7, 0, 255])[:, None, None]
    images[4] = random.normal(90, 25, (3, height, width)).clip(0, 255)
    images[5] = random.integers(0, 2, (3, height, width)) * 255
    images[6] = random.integers(3, 240, (1, height, width))
    images[7] = random.integers(0, 9, (3, height, width)) ** 2.5
    return torch.from_numpy(images.astype(np.uint8))


def strengths_of(name, device="cpu"):
    return torch.tensor(STRENGTHS.get(name, FACTORS), dtype=torch.float32, device=device)


def one_by_one(function, images, strengths):
    """Pillow's function on each image by itself, [B, 3, H, W]."""
    changed = [
        np.array(function(Image.fromarray(image.permute(1, 2, 0).numpy()), strength))
        for image, strength in zip(images, strengths, strict=True)
    ]
    return torch.from_numpy(np.stack(changed)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", PIXEL_OPS)
def test_equals_pillows_operation(name, size):
    images, strengths = pictures(10, *size), strengths_of(name)
    given = images.clone()
    changed = PIXEL_OPS[name].apply(images, strengths)
    assert changed.dtype == torch.uint8 and changed.shape == images.shape
    assert torch.equal(images, given), "the given images are changed"
    assert torch.equal(changed, one_by_one(PILLOWS[name], images, STRENGTHS.get(name, FACTORS)))


@pytest.mark.parametrize("name", PIXEL_OPS)
def test_neither_waits_nor_has_shapes_that_depend_on_values(name):
    """A tensor without memory has no values that could be read."""
    images = torch.empty(10, 3, 9, 11, dtype=torch.uint8, device="meta")
    changed = PIXEL_OPS[name].apply(images, strengths_of(name, "meta"))
    assert changed.shape == images.shape and changed.dtype == torch.uint8


def test_compiles_as_one_graph():
    @torch.compile(backend="eager", fullgraph=True)
    def all_operations(images, strengths):
        return [op.apply(images, strengths[name]) for name, op in PIXEL_OPS.items()]

    images, strengths = pictures(10, 8, 8), {name: strengths_of(name) for name in PIXEL_OPS}
    for name, changed in zip(PIXEL_OPS, all_operations(images, strengths), strict=True):
        assert torch.equal(changed, PIXEL_OPS[name].apply(images, strengths[name]))


@pytest.mark.parametrize("name", PIXEL_OPS)
def test_an_image_does_not_depend_on_the_others(name):
    images, strengths = pictures(10, 32, 32), strengths_of(name)
    changed = PIXEL_OPS[name].apply(images, strengths)
    for one, strength, expected in zip(images.split(1), strengths.split(1), changed.split(1), strict=True):
        assert torch.equal(PIXEL_OPS[name].apply(one, strength), expected)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", PIXEL_OPS)
def test_a_gpu_computes_as_the_cpu(name):
    images, strengths = pictures(10, 96, 80), strengths_of(name)
    there = images.cuda(), strengths.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        changed = PIXEL_OPS[name].apply(*there)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(changed.cpu(), PIXEL_OPS[name].apply(images, strengths))
