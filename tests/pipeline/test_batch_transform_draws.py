"""Draws of batch transforms: a function of seed, epoch, image and repeat alone, and distributed as on the host."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from batch_transforms import PLAIN, apply, batch_transform, in_a_batch, photos
from device_watch import watched_fake_cuda
from helpers import data_options
from PIL import Image
from scipy import stats
from torch.utils._pytree import tree_map_only

from benchmarks.fake_cuda import CUDA
from pipeline import batch_transform as program
from pipeline.images import Sample
from pipeline.transforms import build_transform
from utils import reseed

EVERYTHING = "--aa", "rand-m9-mstd0.5-inc1", "--reprob", 0.5, "--train-interpolation", "random"
UNLIKELY = 1e-3


@pytest.fixture(scope="module")
def images():
    return in_a_batch(photos(64, 32))


@pytest.mark.parametrize("words", [EVERYTHING, ("--aa", "none"), ("--aa", "trivialaugment", "--recount", 2),
                                   ("--aa", "autoaugment-cifar10", "--remode", "rand"),
                                   (*EVERYTHING, "--input-size", 48)])  # fmt: skip
def test_pixels_of_a_sample_do_not_depend_on_its_batch(images, words, monkeypatch):
    """In any order, batch and subset, after any other batch, from another object, and sampled in parts."""
    samples = [Sample(index, 3, index % 3) for index in range(64)]
    sizes = np.stack((40 + np.arange(64), 90 - np.arange(64)), axis=1)
    transform = batch_transform(*words, cache_size=32)
    together = apply(transform, images, samples, sizes)
    monkeypatch.setattr(program, "SAMPLED_AT_ONCE", 3 * images[0].numel())
    other = batch_transform(*words, cache_size=32)
    apply(other, images, [Sample(index, 2, 0) for index in range(64)], sizes)
    for places in (np.random.RandomState(0).permutation(64), np.arange(5, 12), np.array([7, 7, 3]), np.array([40])):
        part = [samples[place] for place in places]
        assert torch.equal(apply(other, images[places], part, sizes[places]), together[places])


@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 4}, {"repeat": 1}])
def test_draws_depend_on_seed_epoch_and_repeat(images, change):
    numbers = {"seed": 0, "epoch": 3, "repeat": 0}

    def samples(seed, epoch, repeat):
        return apply(batch_transform(*EVERYTHING, seed=seed), images, [Sample(i, epoch, repeat) for i in range(64)])

    once, again, changed = samples(**numbers), samples(**numbers), samples(**numbers | change)
    assert torch.equal(once, again)
    assert (once != changed).flatten(1).any(1).float().mean() > 0.95


def test_no_global_generator_is_used(images):
    transform = batch_transform(*EVERYTHING)

    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    apply(transform, images)
    assert states() == before


def test_draws_move_to_a_device(images):
    transform = batch_transform(*EVERYTHING)
    draws = transform.draw([Sample(index, 0, 0) for index in range(64)], np.full((64, 2), 32))
    moved = draws.to(torch.device("meta"))
    assert type(moved) is type(draws)
    assert moved.shifts.is_meta and moved.samplings[0].maps.is_meta and moved.layers[0].rows.is_meta
    assert moved.erasing.boxes.is_meta and moved.layers[0].groups == draws.layers[0].groups
    assert torch.equal(transform(images, draws.to(torch.device("cpu"))), transform(images, draws))


@pytest.mark.parametrize("size", [32, 48])
def test_the_host_does_not_wait_for_a_gpu(size):
    """All draws travel by one copy from page-locked memory, and nothing on the device is read."""
    transform = batch_transform(*EVERYTHING, "--input-size", size, cache_size=32)
    draws = transform.draw([Sample(index, 0, 0) for index in range(64)], np.full((64, 2), 32))
    with watched_fake_cuda() as watch:
        fakes = tree_map_only(torch.Tensor, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype), draws)
        images = torch.empty(64, 3, 32, 32, dtype=torch.uint8, device=CUDA)
        draws = fakes.to(CUDA)
        assert [finding.what for finding in watch.findings] == ["copy from page-locked memory"]
        samples = transform(images, draws)
    assert samples.shape == (64, 3, size, size) and samples.device == CUDA
    assert {finding.kind for finding in watch.findings} == {"upload"}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("size", [32, 64])
def test_a_gpu_makes_the_samples_of_the_cpu(images, size):
    """Up to the rounding of positions between pixels, which may end on the other side of a threshold."""
    transform = batch_transform(*EVERYTHING, "--input-size", size, cache_size=32)
    draws = transform.draw([Sample(index, 0, 0) for index in range(64)], np.full((64, 2), 32))
    on_cpu = transform(images, draws)
    device = torch.device("cuda")
    on_gpu = transform(images.to(device), draws.to(device)).cpu()
    assert ((on_cpu - on_gpu).abs() > 0.05).float().mean() < 0.002


def place(sample):
    """(top, left, is_flipped) of a crop of `gradients`, from bytes [3, 32, 32]."""
    row, column, beside = sample[0, 16, 16], sample[1, 16, 16], sample[1, 16, 17]
    is_flipped = bool(beside < column)
    left = int(column) - (15 if is_flipped else 16)
    return int(row) - 16, left, is_flipped


def test_crops_and_flips_are_distributed_as_on_the_host():
    rows, columns = np.mgrid[:32, :32] + 4
    gradients = np.stack((rows, columns, rows), axis=-1).astype(np.uint8)
    transform = batch_transform(*PLAIN, "--hflip", 0.3, num_images=3000)
    images = torch.from_numpy(gradients).permute(2, 0, 1).expand(3000, 3, 32, 32)
    draws = transform.draw([Sample(index, 0, 0) for index in range(3000)], np.full((3000, 2), 32))
    ours = [place(sample) for sample in transform._cropped(images, draws)]
    reseed("augmentation", 0)
    host = build_transform(data_options(*PLAIN, "--hflip", 0.3), is_training=True, as_bytes=True)
    theirs = [place(host(Image.fromarray(gradients)).permute(2, 0, 1)) for _ in range(3000)]
    assert len({*ours}) == len({*theirs}) == 2 * 81
    for part in (slice(0, 2), slice(2, 3)):
        counts = [Counter(each[part] for each in places) for places in (ours, theirs)]
        assert stats.chi2_contingency([[count[key] for key in counts[0]] for count in counts]).pvalue > UNLIKELY


def statistics(samples):
    """Of each sample [B, 3, 32, 32]: mean, standard deviation, contrast of neighbours, difference of colours."""
    pixels = samples.flatten(1)
    detail = (samples[..., 1:] - samples[..., :-1]).abs().flatten(1).mean(1)
    colour = (samples[:, 0] - samples[:, 2]).abs().flatten(1).mean(1)
    return pixels.mean(1), pixels.std(1), detail, colour


@pytest.mark.parametrize(
    "words",
    [
        ("--aa", "rand-m9-mstd0.5-inc1"),
        ("--aa", "none", "--color-jitter", 0.4),
        ("--aa", "trivialaugment"),
        ("--aa", "autoaugment-cifar10"),
        ("--aa", "none", "--reprob", 0.5, "--input-size", 48),
    ],
)
def test_pixels_are_distributed_as_on_the_host(words):
    """One image many times, so that its draws make all of the differences."""
    [image], count = photos(1, 32), 700
    words = (*words, "--train-interpolation", "bilinear")
    ours = apply(batch_transform(*words, cache_size=32, num_images=count), in_a_batch([image] * count))
    host, theirs = build_transform(data_options(*words), is_training=True), []
    for index in range(count):
        reseed("augmentation", 0, 0, index, 0)
        theirs.append(host(image))
    for our, their in zip(statistics(ours), statistics(torch.stack(theirs)), strict=True):
        assert stats.ks_2samp(our, their).pvalue > UNLIKELY
