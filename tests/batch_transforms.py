"""Batch transforms of test images, whose draws a test may fix."""

import numpy as np
import torch
from helpers import data_options, photo

from pipeline.batch_policies import OPERATIONS, Choice
from pipeline.batch_transform import BatchTransform
from pipeline.images import Sample

PLAIN = ("--aa", "none", "--color-jitter", 0, "--hflip", 0, "--reprob", 0, "--train-interpolation", "bilinear")
WHOLE = ("--scale", 1, 1, "--ratio", 1, 1)  # above 32 px a square image is not cropped


def batch_transform(*words, cache_size=None, seed=0, num_images=64):
    options = data_options(*words)
    return BatchTransform(options, seed, num_images, cache_size or options.input_size)


def fix_numbers(transform, number=0.5):
    """Each uniform number is this one; 0.5 crops in the middle."""
    num_draws = transform.table.num_draws
    transform.table.rows = lambda epoch, indices, repeats: np.full((len(indices), num_draws), number, np.float32)


def fix_operations(transform, *operations):
    """The policy does this to each image: (name, strength) layer after layer."""
    places = [OPERATIONS.index(name) for name, _ in operations]
    strengths = np.array([strength for _, strength in operations], np.float32)

    def choose(uniforms):
        return Choice(*(np.tile(values, (len(uniforms), 1)) for values in (places, strengths)))

    transform.policy.choose = choose


def in_a_batch(images):
    """PIL images -> bytes [B, 3, H, W]."""
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])


def photos(count, size):
    return [photo(seed, size) for seed in range(count)]


def apply(transform, images, samples=None, sizes=None):
    """Bytes [B, 3, C, C] -> normalised samples; the samples are by default the first copies of the first images."""
    samples = samples or [Sample(index, 0, 0) for index in range(len(images))]
    sizes = np.tile(images.shape[-2:], (len(images), 1)) if sizes is None else sizes
    return transform(images, transform.draw(samples, sizes))


def to_bytes(transform, samples):
    """Normalised samples as the numbers 0 to 255 that they were, in float32."""
    return (samples * transform.normalize.std + transform.normalize.mean).round()
