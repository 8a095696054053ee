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
    strengths = STRENGTHS.get(name, FACTORS)
    images = pictures(len(strengths), *size)
    given = images.clone()
    changed = PIXEL_OPS[name].apply(images, torch.tensor(strengths, dtype=torch.float32))
    assert changed.dtype == torch.uint8 and changed.shape == images.shape
    assert torch.equal(images, given), "the given images are changed"
    assert torch.equal(changed, one_by_one(PILLOWS[name], images, strengths))
