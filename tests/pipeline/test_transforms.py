"""DeiT's transforms: sizes, crops, augmentation flags, and torch's crops beside Pillow's."""

import random

import numpy as np
import pytest
import torch
from helpers import data_options, one_line, photo
from image_files import Photos
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from pipeline.images import ReadableImages, Sample
from pipeline.transforms import FastCrop, build_transform
from utils import reseed

PLAIN = ("--aa", "none", "--color-jitter", 0, "--hflip", 0, "--reprob", 0, "--no-repeated-aug")


def training_transform(*words):
    return build_transform(data_options(*words), is_training=True)


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("is_training", [True, False])
def test_transform_shape_and_normalisation(size, is_training):
    options = data_options("--input-size", size, *PLAIN)
    grey = Image.new("RGB", (90, 70), (128, 64, 32))
    out = build_transform(options, is_training)(grey)
    assert out.shape == (3, size, size)
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    inside = (out * std + mean)[:, 4:-4, 4:-4] if size <= 32 else out * std + mean
    torch.testing.assert_close(inside, torch.tensor([128, 64, 32])[:, None, None].expand_as(inside) / 255)


def test_small_images_are_resized_padded_and_cropped():
    """A frame survives the resize at evaluation; in training up to 4 px of black come in from a side."""
    framed = Image.new("RGB", (64, 48), (255, 255, 255))
    framed.paste((255, 0, 0), (8, 8, 56, 40))
    out = build_transform(data_options(*PLAIN), is_training=False)(framed)
    assert out[2, 0].min() > 2 and out[2, -1].min() > 2 and out[2, :, 0].min() > 2 and out[2, :, -1].min() > 2
    torch.manual_seed(0)
    transform = training_transform(*PLAIN)
    crops = torch.stack([transform(framed) for _ in range(50)])
    black = (crops[:, 0] < -2).float()  # red is bright everywhere but in the padding
    assert (black[:, 16].sum(1).max(), black[:, :, 16].sum(1).max()) == (4, 4)
    assert len({crop.numpy().tobytes() for crop in crops}) > 20


def test_crops_of_large_images_follow_their_flags():
    words = ("--input-size", 64, "--scale", 0.5, 0.75, "--ratio", 0.9, 1.1, "--train-interpolation", "bilinear")
    crop = training_transform(*words).transforms[0]
    assert isinstance(crop, FastCrop)
    assert tuple(crop.scale) == (0.5, 0.75)
    assert tuple(crop.ratio) == (0.9, 1.1)
    assert str(crop.interpolation).endswith("BILINEAR")


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "random"])
def test_fast_crops_are_pillows_up_to_rounding(interpolation):
    """Enlarged and reduced, of an image seen before and of another one, and the image stays as it is."""
    words = ("--input-size", 64, "--train-interpolation", interpolation)
    flags = ("--fast-crop", "--no-fast-crop")
    fast, pillows = (training_transform(*words, flag).transforms[0] for flag in flags)
    images = [photo(seed, size) for seed, size in enumerate((48, 120, 260))]
    before = [image.tobytes() for image in images]
    differences = []
    for seed in range(30):
        image = images[seed // 2 % 3]
        crops = []
        for crop in (fast, pillows):
            reseed("augmentation", seed)
            crops.append(np.asarray(crop(image)).astype(int))
        assert crops[0].shape == (64, 64, 3)
        differences.append(np.abs(crops[0] - crops[1]))
    assert [image.tobytes() for image in images] == before
    assert np.max(differences) <= 2
    assert np.mean(np.not_equal(differences, 0)) < 0.02


def test_fast_crops_of_images_of_a_few_pixels():
    crop = training_transform("--input-size", 64).transforms[0]
    for seed in range(60):
        for size in ((1, 1), (1, 2), (3, 1), (1, 9)):
            reseed("augmentation", seed)
            assert crop(Image.new("RGB", size, (9, 8, 7))).getcolors() == [(64 * 64, (9, 8, 7))]


def test_centre_crop_of_evaluation():
    options = data_options("--input-size", 64, "--eval-crop-ratio", 0.5)
    resize, crop = build_transform(options, is_training=False).transforms[:2]
    assert resize.size == 128
    assert tuple(crop.size) == (64, 64)


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("size", [32, 64])
def test_preprocessing_flags_reach_the_pixels(size, is_training):
    """The colour of a plain image, less the mean, over the deviation; the fill of RandAugment is the mean."""
    mean, std = (0.25, 0.5, 0.75), (0.1, 0.2, 0.4)
    flags = ("--input-size", size, "--mean", *mean, "--std", *std)
    out = build_transform(data_options(*flags, *PLAIN), is_training)(Image.new("RGB", (90, 70), (51, 102, 255)))
    expected = (torch.tensor((0.2, 0.4, 1.0)) - torch.tensor(mean)) / torch.tensor(std)
    torch.testing.assert_close(out[:, 10, 10], expected)
    policy = steps_of(*flags)["RandAugment"]
    assert policy.ops[0].kwargs["fillcolor"] == (64, 128, 191)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [32, 64])
def test_interpolation_is_that_of_every_resize(size, interpolation):
    options = data_options("--input-size", size, "--interpolation", interpolation)
    train, val = (build_transform(options, is_training).transforms[0] for is_training in (True, False))
    assert train.interpolation.value == val.interpolation.value == interpolation


@pytest.mark.parametrize(
    ("mode", "size", "box"), [("center", (96, 64), 64), ("squash", (64, 64), 64), ("border", (64, 43), 43)]
)
def test_crop_modes(mode, size, box):
    """Of an image of 120 x 80 pixels: the resized size, and the rows of the result that come from it."""
    image = Image.new("RGB", (120, 80), (255, 255, 255))
    options = data_options("--input-size", 64, "--crop-pct", 1, "--crop-mode", mode, "--mean", 0, 0, 0)
    transform = build_transform(options, is_training=False)
    assert transform.transforms[0](image).size == size
    assert int((transform(image)[0, :, 32] > 0).sum()) == box


def steps_of(*words):
    """{class name: transform} of the training transform."""
    return {type(step).__name__: step for step in training_transform(*words).transforms}


@pytest.mark.parametrize("size", [32, 64])
def test_augmentation_flags_reach_timm(size):
    steps = steps_of("--input-size", size, "--hflip", 0.3, "--reprob", 0.4, "--remode", "const", "--recount", 2)
    assert steps["RandomHorizontalFlip"].p == 0.3
    erasing = steps["RandomErasing"]
    assert (erasing.probability, erasing.mode, erasing.max_count) == (0.4, "const", 2)
    assert [op.magnitude for op in steps["RandAugment"].ops] == [9] * 15
    assert "ColorJitter" not in steps
    assert "AutoAugment" in steps_of("--input-size", size, "--aa", "original")
    assert steps_of("--input-size", size, "--aa", "none", "--color-jitter", 0.2)["ColorJitter"].brightness == (0.8, 1.2)
    assert not {"RandAugment", "ColorJitter", "RandomHorizontalFlip", "RandomErasing"} & steps_of(*PLAIN).keys()


def test_hflip_of_one_always_flips():
    flip, image = steps_of("--hflip", 1)["RandomHorizontalFlip"], photo(0)
    assert np.array_equal(np.asarray(flip(image)), np.asarray(image)[:, ::-1])


@pytest.mark.parametrize("size", [32, 64])
def test_default_augmentation_runs(size):
    """Pillow 13 breaks timm's rand-m9-mstd0.5-inc1 in one image of 600; hence the pin."""
    torch.manual_seed(0)
    transform = training_transform("--input-size", size)
    for seed in range(300):
        assert transform(photo(seed)).isfinite().all()


# torchvision's policies


POLICIES = ("trivialaugment", "autoaugment-cifar10")


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize(("name", "kind"), [*zip(POLICIES, ("TrivialAugmentWide", "AutoAugment"), strict=True)])
def test_torchvisions_policies_are_where_timm_has_its_own(name, kind, size):
    """After the crop and the flip, before the erasing; without timm's jitter of colours."""
    flags = ("--input-size", size, "--train-interpolation", "bilinear")
    for flip in (0, 0.5):
        of_timm = [*steps_of(*flags, "--hflip", flip)]
        assert [*steps_of(*flags, "--hflip", flip, "--aa", name)] == [
            kind if step == "RandAugment" else step for step in of_timm
        ]
    policy = steps_of(*flags, "--aa", name)[kind]
    assert (policy.interpolation.value, policy.fill) == ("bilinear", None)
    both = steps_of(*flags[:2], "--train-interpolation", "random", "--aa", name)["RandomChoice"]
    assert [policy.interpolation.value for policy in both.transforms] == ["bilinear", "bicubic"]


@pytest.mark.parametrize("name", POLICIES)
def test_torchvisions_policies_draw_as_its_classes(name):
    """The pixels of a transform of which the policy is the only step that draws from torch's generator."""
    kind = {"trivialaugment": transforms.TrivialAugmentWide(interpolation=InterpolationMode.BICUBIC),
            "autoaugment-cifar10": transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10,
                                                          InterpolationMode.BICUBIC)}[name]  # fmt: skip
    flags = ("--input-size", 64, "--scale", 1, 1, "--ratio", 1, 1, *PLAIN, "--aa", name)
    transform = build_transform(data_options(*flags), is_training=True, as_bytes=True)
    image, differ = photo(3, 64), 0
    for seed in range(40):
        reseed("augmentation", seed)
        found = transform(image).numpy()
        reseed("augmentation", seed)
        expected = np.asarray(kind(image))
        assert np.array_equal(found, expected)
        differ += not np.array_equal(expected, np.asarray(image))
    assert differ > 20


@pytest.mark.parametrize("name", POLICIES)
def test_pixels_of_torchvisions_policies_depend_on_the_sample_alone(name):
    """Not on what was read before, nor on the state of a generator."""
    flags = ("--train-interpolation", "random", "--aa", name)
    images = ReadableImages(Photos(), training_transform(*flags), max_bad=0, seed=3)
    samples = [Sample(index, epoch, repeat) for index in range(6) for epoch in (0, 1) for repeat in (0, 1)]
    first = {sample: images[sample][0] for sample in samples}
    torch.manual_seed(9), np.random.seed(9), random.seed(9)
    for sample in reversed(samples):
        assert torch.equal(images[sample][0], first[sample])
    assert len({pixels.numpy().tobytes() for pixels in first.values()}) == len(samples)


@pytest.mark.parametrize("name", ["trivial", "rand-x9", "autoaugment"])
def test_an_unknown_policy_is_refused_with_those_there_are(name):
    with pytest.raises(SystemExit) as caught:
        training_transform("--aa", name)
    one_line(caught, f"--aa {name} is no auto-augment policy", *POLICIES, "rand-m9-mstd0.5-inc1")
