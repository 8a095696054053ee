"""Affine maps and sampling of a batch, against Pillow, timm and torchvision on every image by itself."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.data import auto_augment
from torchvision.transforms import functional as tv

from pipeline import batch_geometry as geometry
from pipeline.batch_policies import GEOMETRY

SIZE, BATCH = 32, 16
LEVELS = torch.linspace(-0.3, 0.3, BATCH)
FILL = (124, 116, 104)
RESAMPLE = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def move(**numbers):
    """The maps of geometry.move; numbers that are not given are 0."""
    nothing = torch.zeros_like(next(iter(numbers.values())))
    return geometry.move(**dict.fromkeys(GEOMETRY, nothing) | numbers, size=SIZE)


OPERATIONS = {  # the map, and timm's function for the same level
    "shear_x": (move(shear_x=LEVELS), lambda image, level, **to: auto_augment.shear_x(image, level, **to)),
    "shear_y": (move(shear_y=LEVELS), lambda image, level, **to: auto_augment.shear_y(image, level, **to)),
    "translate_x": (
        move(translate_x=40 * LEVELS),
        lambda image, level, **to: auto_augment.translate_x_abs(image, 40 * level, **to),
    ),
    "translate_y": (
        move(translate_y=40 * LEVELS),
        lambda image, level, **to: auto_augment.translate_y_abs(image, 40 * level, **to),
    ),
    "rotate": (
        move(rotate=600 * LEVELS),
        lambda image, level, **to: auto_augment.rotate(image, 600 * level, **to),
    ),
}


def noise(count=BATCH, size=SIZE, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 3, size, size), dtype=np.uint8))


def smooth_pictures(count=BATCH, size=SIZE, seed=0):
    """Bytes [count, 3, S, S] that change slowly from pixel to pixel."""
    coarse = noise(count, 5, seed).permute(0, 2, 3, 1).numpy()
    images = [np.array(Image.fromarray(image).resize((size, size), RESAMPLE["bicubic"])) for image in coarse]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def one_by_one(function, images, *arguments):
    """Pillow's function on each image by itself and its arguments, [B, 3, H, W]."""
    changed = [
        np.array(function(Image.fromarray(image.permute(1, 2, 0).numpy()), *given))
        for image, *given in zip(images, *(argument.tolist() for argument in arguments), strict=True)
    ]
    return torch.from_numpy(np.stack(changed)).permute(0, 3, 1, 2)


def differences(ours, theirs):
    return (ours.int() - theirs.int()).float()


@pytest.mark.parametrize("name", OPERATIONS)
def test_bilinear_equals_pillows_but_for_cut_fractions(name):
    maps, function = OPERATIONS[name]
    images = noise()
    ours = geometry.sample(images, maps, SIZE, "bilinear", frames=maps[:, None], fill=FILL, padding_mode="border")
    to = {"resample": RESAMPLE["bilinear"], "fillcolor": FILL}
    theirs = one_by_one(lambda image, level: function(image, level, **to), images, LEVELS)
    difference = differences(ours, theirs)
    assert difference.min() >= 0 and difference.max() <= 1


@pytest.mark.parametrize("name", OPERATIONS)
def test_bicubic_is_near_pillows_which_has_other_weights(name):
    maps, function = OPERATIONS[name]
    images = smooth_pictures()
    ours = geometry.sample(images, maps, SIZE, "bicubic", frames=maps[:, None], fill=FILL, padding_mode="border")
    to = {"resample": RESAMPLE["bicubic"], "fillcolor": FILL}
    theirs = one_by_one(lambda image, level: function(image, level, **to), images, LEVELS)
    difference = differences(ours, theirs).abs()
    assert difference.max() <= 5 and difference.mean() <= 0.7


def keys_cubic(distance, a):
    """The cubic kernel of Keys 1981 at a distance in pixels."""
    d = abs(distance)
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0


@pytest.mark.parametrize("function, a", [("ours", -0.75), ("pillows", -1)])
def test_the_weights_of_bicubic(function, a):
    """The docstring states both parameters."""
    images, shift = noise(1), 0.3
    maps = move(translate_x=torch.tensor([shift]))
    if function == "ours":
        changed = geometry.sample(images, maps, SIZE, "bicubic", padding_mode="border").float() - 0.5
    else:
        to = {"resample": RESAMPLE["bicubic"]}
        changed = one_by_one(lambda image: auto_augment.translate_x_abs(image, shift, **to), images).float()
    inner = range(1, SIZE - 3)
    for x in inner:
        weighted = sum(keys_cubic(shift - k, a) * images[..., x + k].double() for k in (-1, 0, 1, 2))
        assert ((changed[..., x] + 0.5 - weighted.clamp(0, 255)).abs() <= 0.5001).all()


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("size", [32, 33])
def test_flips_and_whole_pixels_are_exact(size, interpolation):
    images, is_flipped = noise(size=size), torch.arange(BATCH) % 2 == 0
    random = np.random.default_rng(1)
    top, left = (torch.from_numpy(random.integers(0, 9, BATCH)) for _ in range(2))
    length = torch.full((BATCH,), float(size))
    crops = geometry.crop(top - 4.0, left - 4.0, length, length, size)
    ours = geometry.sample(images, geometry.compose(crops, geometry.flip(is_flipped, size)), size, interpolation)

    def padded_crop(image, is_flipped, top, left):
        image = tv.crop(ImageOps.expand(image, 4), top, left, size, size)
        return ImageOps.mirror(image) if is_flipped else image

    assert torch.equal(ours, one_by_one(padded_crop, images, is_flipped, top, left))
    moved = geometry.sample(images, move(translate_x=top.float(), translate_y=-left.float()), size, interpolation)
    for before, after, x, y in zip(images, moved, top.tolist(), left.tolist(), strict=True):
        expected = torch.zeros_like(before)
        expected[:, y:, : size - x] = before[:, : size - y, x:]
        assert torch.equal(after, expected)


def test_an_enlarged_crop_is_pillows_resize_of_the_box():
    images = noise(size=40)
    random = np.random.default_rng(2)
    height, width = (torch.from_numpy(random.uniform(10, 30, BATCH)) for _ in range(2))
    top, left = (torch.from_numpy(random.uniform(1, 9, BATCH)) for _ in range(2))
    ours = geometry.sample(images, geometry.crop(top, left, height, width, 33), 33, "bilinear", padding_mode="border")

    def resize(image, top, left, height, width):
        return image.resize((33, 33), RESAMPLE["bilinear"], box=(left, top, left + width, top + height))

    assert differences(ours, one_by_one(resize, images, top, left, height, width)).abs().max() <= 1


def test_composition_is_one_map_after_another():
    """The point that the output shows is found by the last map first, and smooth images agree after two samplings."""
    first, then = move(rotate=100 * LEVELS), move(shear_x=LEVELS.flip(0))
    composed = geometry.compose(first, then).double().numpy()
    for one, other, both in zip(first.double().numpy(), then.double().numpy(), composed, strict=True):
        point = np.array([3.5, 20.5])
        inner = other[:, :2] @ point + other[:, 2]
        assert both[:, :2] @ point + both[:, 2] == pytest.approx(one[:, :2] @ inner + one[:, 2], abs=1e-4)
    images, to = smooth_pictures(), {"frames": then[:, None], "padding_mode": "border"}
    once = geometry.sample(images, geometry.compose(first, then), SIZE, **to)
    twice = geometry.sample(geometry.sample(images, first, SIZE, padding_mode="border"), then, SIZE, **to)
    difference = differences(once, twice).abs()
    assert difference.mean() <= 0.5 and difference.max() <= 16


def test_padding_is_black_and_outside_the_crop_is_the_fill_colour_as_on_the_host():
    """White images: padded by 4 px and cropped, flipped, then turned and sheared as timm does."""
    images = torch.full((BATCH, 3, SIZE, SIZE), 255, dtype=torch.uint8)
    is_flipped, corner = torch.arange(BATCH) % 2 == 0, torch.arange(BATCH) % 9
    length = torch.full((BATCH,), float(SIZE))
    maps = geometry.crop(corner - 4.0, corner - 4.0, length, length, SIZE)
    maps = geometry.compose(maps, geometry.flip(is_flipped, SIZE))
    turned, sheared = move(rotate=100 * LEVELS), move(shear_y=LEVELS.flip(0))
    both = geometry.compose(turned, sheared)
    ours = geometry.sample(
        *(images, geometry.compose(maps, both), SIZE, "bilinear"),
        frames=torch.stack((sheared, both), dim=1),
        fill=FILL,
    )

    def host(image, corner, is_flipped, turn, shear):
        image = tv.crop(ImageOps.expand(image, 4), corner, corner, SIZE, SIZE)
        image = ImageOps.mirror(image) if is_flipped else image
        to = {"resample": RESAMPLE["bilinear"], "fillcolor": FILL}
        return auto_augment.shear_y(auto_augment.rotate(image, turn, **to), shear, **to)

    theirs = one_by_one(host, images, corner, is_flipped, 100 * LEVELS, LEVELS.flip(0))
    is_near = differences(ours, theirs).abs().amax(dim=1) <= 20
    assert is_near.float().mean() >= 0.95  # the others are where two regions meet, which the host blurs
    for colour in ((0, 0, 0), FILL, (255, 255, 255)):
        fractions = [
            (images == torch.tensor(colour, dtype=torch.uint8)[:, None, None]).all(dim=1).float().mean(dim=(1, 2))
            for images in (ours, theirs)
        ]
        assert (fractions[0] - fractions[1]).abs().max() <= 0.08
        assert fractions[0].max() >= 0.05


def test_signs_of_torchvisions_operations():
    images = noise()
    to = {"interpolation": tv.InterpolationMode.BILINEAR, "fill": [0, 0, 0]}

    def affine(image, translate=(0, 0), shear=(0.0, 0.0)):
        return tv.affine(image, 0.0, list(translate), 1.0, list(shear), center=[0, 0], **to)

    def shear_x(image, level):  # as in torchvision.transforms.autoaugment
        return affine(image, shear=(math.degrees(math.atan(level)), 0.0))

    def shear_y(image, level):
        return affine(image, shear=(0.0, math.degrees(math.atan(level))))

    shifts = (40 * LEVELS).int()
    for maps, function, levels in (
        (move(shear_x=LEVELS), shear_x, LEVELS),
        (move(shear_y=LEVELS), shear_y, LEVELS),
        (move(translate_x=-shifts), lambda image, x: affine(image, translate=(x, 0)), shifts),
        (move(translate_y=-shifts), lambda image, y: affine(image, translate=(0, y)), shifts),
        (move(rotate=100 * LEVELS), lambda image, level: tv.rotate(image, level, **to), 100 * LEVELS),
    ):
        ours = geometry.sample(images, maps, SIZE, frames=maps[:, None], padding_mode="border")
        assert differences(ours, one_by_one(function, images, levels)).abs().max() <= 1


def test_sampling_neither_waits_nor_has_shapes_that_depend_on_values():
    """A tensor without memory has no values that could be read."""
    images = torch.empty(4, 3, 40, 40, dtype=torch.uint8, device="meta")
    level = torch.empty(4, device="meta")
    maps = geometry.compose(move(rotate=level), move(shear_x=level))
    maps = geometry.compose(geometry.crop(level, level, level, level, 32), maps)
    maps = geometry.compose(maps, geometry.flip(level > 0, 32))
    sampled = geometry.sample(images, maps, 32, "bicubic", frames=maps[:, None], fill=FILL)
    assert sampled.shape == (4, 3, 32, 32) and sampled.dtype == torch.uint8


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_samples_as_the_cpu():
    images, maps = noise(), OPERATIONS["rotate"][0]
    to = {"interpolation": "bicubic", "frames": maps[:, None], "fill": FILL}
    on_cpu = geometry.sample(images, maps, SIZE, **to)
    there = images.cuda(), maps.cuda()
    to["frames"] = to["frames"].cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_gpu = geometry.sample(*there, SIZE, **to)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    difference = differences(on_cpu, on_gpu.cpu()).abs()
    assert difference.median() == 0 and (difference > 1).float().mean() < 1e-3
