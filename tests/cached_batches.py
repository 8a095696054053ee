"""As a program, also of several ranks: python cached_batches.py OUT FLAGS of main.py ... writes what its batches have.

Every rank writes OUT/<rank>.json: a digest of each training sample of the last two steps of epoch 1, by its index and
repeat; and of each validation image, in the order of the rank.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

from helpers import data_options

from datasets import DataOptions, build_data
from utils import joined_world


def digests(tensor) -> list[str]:
    return [hashlib.sha256(row.contiguous().numpy().tobytes()).hexdigest() for row in tensor]


def content(options: DataOptions, world) -> dict:
    """{"train": {"index repeat": (digest, label)}, "val": [(digest, label)], "bad": names}."""
    data = build_data(options, world)
    first = data.num_steps - 2
    samples = data.train.batch_sampler
    samples.start(1)
    batches = [*samples.batches(first * data.accum_steps, data.num_steps * data.accum_steps)]
    train = {}
    for (images, labels), of_batch in zip(data.batches(1, first), batches, strict=True):
        for digest, label, sample in zip(digests(images), labels.tolist(), of_batch, strict=True):
            train[f"{sample.index} {sample.repeat}"] = digest, label
    val = [pair for images, labels in data.val for pair in zip(digests(images), labels.tolist(), strict=True)]
    return {"train": train, "val": val, "bad": data.bad_images(world)}


if __name__ == "__main__":
    out, *flags = sys.argv[1:]
    with joined_world("cpu", "env://") as world:
        Path(out, f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(content(data_options(*flags), world)))
