"""Policies for batches draw as timm's and torchvision's do: the same operations, as often, of the same strengths."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from timm.data import auto_augment
from torchvision import transforms
from torchvision.transforms import autoaugment

from pipeline.batch_policies import OPERATIONS, build_policy
from pipeline.transforms import TORCHVISION_POLICIES

SIZE = 32
DRAWN = 4000
UNLIKELY = 1e-3
COLORS = ("Brightness", "Color", "Contrast", "Sharpness")


def chosen(policy, count=DRAWN, seed=0):
    """[(operation, strength), ...] of each image; operations without effect are left out."""
    operations, strengths = policy.choose(np.random.default_rng(seed).random((count, policy.num_draws)))
    assert operations.shape == strengths.shape and len(operations) == count and strengths.dtype == np.float32
    return [
        [(OPERATIONS[place], float(strength)) for place, strength in zip(*layers, strict=True) if place]
        for layers in zip(operations, strengths, strict=True)
    ]


def our_name(name):
    """Of timm's or torchvision's function in `OPERATIONS`."""
    return {"auto_contrast": "autocontrast"}.get(name, name).removesuffix("_rel")


def of_timm(name, count=DRAWN):
    """What timm's RandAugment does to each of `count` images, as `chosen` has it."""
    rand_augment, done = auto_augment.rand_augment_transform(name), []

    def recorder(operation):
        def record(image, *args, **kwargs):
            scale = SIZE if operation.startswith("translate") else 1
            done[-1].append((operation, float(args[0] * scale) if args else 0.0))
            return image

        return record

    for operation in rand_augment.ops:
        operation.aug_fn = recorder(our_name(operation.aug_fn.__name__))
    random.seed(0)
    np.random.seed(0)
    for _ in range(count):
        done.append([])
        rand_augment(None)
    return done


def in_our_units(name, magnitude):
    """An operation of torchvision as `torchvision.transforms.autoaugment._apply_op` applies it."""
    snake = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).strip("_")
    ours = {"auto_contrast": "autocontrast"}.get(snake, snake)
    if name in COLORS:
        return ours, 1 + magnitude
    if name.startswith("Translate"):
        return ours, float(-int(magnitude))
    return ours, float(magnitude)


def of_torchvision(policy, monkeypatch, count=DRAWN):
    """What a policy of torchvision does to each of `count` images, as `chosen` has it."""
    done = []

    def record(image, name, magnitude, **kwargs):
        if name != "Identity":
            done[-1].append(in_our_units(name, magnitude))
        return image

    monkeypatch.setattr(autoaugment, "_apply_op", record)
    torch.manual_seed(0)
    image = Image.new("RGB", (SIZE, SIZE))
    for _ in range(count):
        done.append([])
        policy(image)
    return done


def require_same_frequencies(ours, theirs):
    """A chi-square test of two samples of anything that can be counted."""
    ours, theirs = Counter(ours), Counter(theirs)
    keys = sorted({*ours, *theirs}, key=str)
    rare = [key for key in keys if ours[key] + theirs[key] < 10]
    table = [[counts[key] for key in keys if key not in rare] for counts in (ours, theirs)]
    if rare:
        for row, counts in zip(table, (ours, theirs), strict=True):
            row.append(sum(counts[key] for key in rare) + 1)
    assert stats.chi2_contingency(table).pvalue > UNLIKELY


@pytest.mark.parametrize("increasing", [0, 1])
@pytest.mark.parametrize("magnitude", [0, 1, 4, 9, 10, 13])
@pytest.mark.parametrize("is_negated", [False, True])
def test_strengths_of_randaugment_are_timms(magnitude, increasing, is_negated, monkeypatch):
    name = f"rand-m{magnitude}-mmax13-inc{increasing}-n1-p1"
    rand_augment, policy = auto_augment.rand_augment_transform(name), build_policy(name, 0.4, SIZE)
    monkeypatch.setattr(random, "random", lambda: 0.75 if is_negated else 0.25)
    for place, operation in enumerate(rand_augment.ops):
        args = operation.level_fn(magnitude, {}) if operation.level_fn else (0,)
        scale = SIZE if operation.name.startswith("Translate") else 1
        choice = policy.choose(np.array([[(place + 0.5) / 15, 0.99, 0.5, random.random()]]))
        assert OPERATIONS[choice.operations[0, 0]] == our_name(operation.aug_fn.__name__)
        assert choice.strengths[0, 0] == pytest.approx(args[0] * scale, rel=1e-6), operation.name


@pytest.mark.parametrize("name", ["rand-m9-mstd0.5-inc1", "rand-m8-n3-p0.7-mstd101", "rand-m5-mstd4-mmax7"])
def test_randaugment_draws_as_timm(name):
    ours, theirs = chosen(build_policy(name, 0.4, SIZE)), of_timm(name)
    require_same_frequencies(map(len, ours), map(len, theirs))
    ours, theirs = ([pair for image in images for pair in image] for images in (ours, theirs))
    require_same_frequencies(*([operation for operation, _ in images] for images in (ours, theirs)))
    for operation in OPERATIONS[1:]:
        strengths = [[strength for other, strength in images if other == operation] for images in (ours, theirs)]
        if operation in ("autocontrast", "equalize", "invert"):
            continue
        strengths = [np.round(values, 4) for values in strengths]
        assert stats.ks_2samp(*strengths).pvalue > UNLIKELY, operation


def test_both_operations_of_an_image_are_independent():
    pairs = [tuple(image) for image in chosen(build_policy("rand-m9-p1", 0.4, SIZE))]
    names = [[name for name, _ in pair] for pair in pairs]
    table = np.zeros((15, 15))
    for first, second in names:
        table[OPERATIONS.index(first) - 1, OPERATIONS.index(second) - 1] += 1
    assert stats.chi2_contingency(table).pvalue > UNLIKELY


def test_strengths_of_trivialaugment_are_torchvisions():
    policy = build_policy("trivialaugment", 0.4, SIZE)
    space = transforms.TrivialAugmentWide()._augmentation_space(31)
    operations = [OPERATIONS[operation] for operation in policy.operations]
    assert len({*operations}) == len(operations) == len(space)
    for name, (magnitudes, is_signed) in space.items():
        place = operations.index(in_our_units(name, 0.0)[0])
        for level in range(31):
            magnitude = float(magnitudes[level]) if magnitudes.ndim else 0.0
            for sign, half in ((1, 0.25), (-1 if is_signed else 1, 0.75)):
                choice = policy.choose(np.array([[(place + 0.5) / 14, (level + 0.5) / 31, half]]))
                operation, strength = in_our_units(name, sign * magnitude)
                assert OPERATIONS[choice.operations[0, 0]] == operation
                assert choice.strengths[0, 0] == pytest.approx(strength, abs=1e-4), (name, level)


def test_trivialaugment_draws_as_torchvision(monkeypatch):
    ours = chosen(build_policy("trivialaugment", 0.4, SIZE))
    theirs = of_torchvision(transforms.TrivialAugmentWide(), monkeypatch)
    ours, theirs = ([image[0] if image else ("identity", 0) for image in images] for images in (ours, theirs))
    require_same_frequencies(*([(name, strength > 0) for name, strength in images] for images in (ours, theirs)))
    for operation in ("rotate", "translate_y", "solarize", "posterize", "sharpness"):
        strengths = [[strength for name, strength in images if name == operation] for images in (ours, theirs)]
        assert stats.ks_2samp(*(np.round(values, 3) for values in strengths)).pvalue > UNLIKELY, operation


def test_autoaugment_has_the_pairs_of_torchvision():
    policy = build_policy("autoaugment-cifar10", 0.4, SIZE)
    theirs = transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10)
    space = theirs._augmentation_space(10, (SIZE, SIZE))
    for place, pair in enumerate(theirs.policies):
        for half in (0.25, 0.75):
            choice = policy.choose(np.array([[(place + 0.5) / 25, 0, 0, half, half]]))
            for layer, (name, probability, level) in enumerate(pair):
                magnitudes, is_signed = space[name]
                magnitude = float(magnitudes[level]) if level is not None else 0.0
                operation, strength = in_our_units(name, -magnitude if is_signed and half > 0.5 else magnitude)
                assert OPERATIONS[choice.operations[0, layer]] == operation
                assert choice.strengths[0, layer] == pytest.approx(strength, abs=1e-4), pair
                for drawn, is_applied in ((probability - 0.01, True), (probability + 0.01, False)):
                    uniforms = np.array([[(place + 0.5) / 25, drawn, drawn, half, half]])
                    if drawn >= 0:
                        assert (policy.choose(uniforms).operations[0, layer] > 0) == is_applied


def test_autoaugment_draws_as_torchvision(monkeypatch):
    ours = chosen(build_policy("autoaugment-cifar10", 0.4, SIZE))
    theirs = of_torchvision(transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10), monkeypatch)
    ours, theirs = ([str([(name, round(strength, 3)) for name, strength in image]) for image in images]
                    for images in (ours, theirs))  # fmt: skip
    require_same_frequencies(ours, theirs)


@pytest.mark.parametrize("strength", [0.4, 1.5])
def test_color_jitter_draws_as_torchvision(strength):
    ours = chosen(build_policy(None, strength, SIZE))
    torchvisions, theirs = transforms.ColorJitter(strength, strength, strength), []
    names = ("brightness", "contrast", "color")
    torch.manual_seed(0)
    for _ in range(2000):
        ranges = torchvisions.brightness, torchvisions.contrast, torchvisions.saturation
        order, *factors = torchvisions.get_params(*ranges, None)
        theirs.append([(names[place], factors[place]) for place in order.tolist() if place < 3])
    require_same_frequencies(*([tuple(name for name, _ in image) for image in images] for images in (ours, theirs)))
    for name in names:
        factors = [[dict(image)[name] for image in images] for images in (ours, theirs)]
        assert stats.ks_2samp(*factors).pvalue > UNLIKELY, name


@pytest.mark.parametrize("name", TORCHVISION_POLICIES)
def test_policies_of_torchvision_that_a_loader_has_are_there_for_batches(name):
    assert any(map(len, chosen(build_policy(name, 0.4, SIZE), 50)))


def test_without_a_policy_nothing_is_drawn():
    policy = build_policy(None, 0, SIZE)
    assert policy.num_draws == 0 and chosen(policy, 3) == [[], [], []]


@pytest.mark.parametrize(
    "name",
    ["rand-m9-tweights", "rand-m9-t3a", "rand-x3", "original-mstd0.5", "augmix-m3", "v0", "3a", "nonsense"],
)
def test_other_policies_are_refused(name):
    with pytest.raises(SystemExit) as caught:
        build_policy(name, 0.4, SIZE)
    line = str(caught.value)
    assert line.startswith(f"error: --aa {name} does not work with --cache-images: ") and "\n" not in line
    assert "trivialaugment" in line
