"""Counter-based randomness: every draw is a function of what it is for, not of what was drawn before.

So a run may be cut anywhere, and use any number of loader workers, and a checkpoint needs no random state. Who draws
seeds the generators first, with `reseed` and its own counters:

    "augmentation"  seed, epoch, sample index, repeat     images.ReadableImages
    "mixing"        seed, epoch, batch                    batch_augmentation.BatchAugmentation, the same on all ranks
    "erasing"       seed, rank, epoch, batch              batch_augmentation.BatchAugmentation: boxes
    "step"          seed, rank, epoch, batch              engine.train_one_epoch: dropout, probes, erased pixels
    "order"         seed, epoch                           datasets.Data.batches, of a data set that streams
"""

import hashlib
import os
import random
import struct

import numpy as np
import torch


def seed_of(purpose: str, *counters: int) -> int:
    """A seed of 63 bits: blake2b of the purpose and the counters, each below 2^63."""
    digest = hashlib.blake2b(struct.pack(f"<{len(counters)}q", *counters), digest_size=8, person=purpose.encode())
    return int.from_bytes(digest.digest(), "little") >> 1


def reseed(purpose: str, *counters: int, device: torch.device | None = None):
    """Seed Python, numpy and torch's CPU generator, and a GPU's where `device` is one, with `seed_of` the counters.

    Ten times cheaper than torch.manual_seed, which looks for every kind of device.
    """
    seed = seed_of(purpose, *counters)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)


def seed_everything(seed: int):
    """Seed Python, numpy and torch; the model's initial weights are drawn from this."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def make_deterministic():
    """Have torch take the same path every time, so that a GPU repeats a run bit for bit, more slowly.

    Before CUDA is used. An operation without a deterministic form raises.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
