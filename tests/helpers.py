"""What several test files share: a tiny run, image folders, one process's World."""

import contextlib
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

import main
from datasets import DataOptions
from engine import train_one_epoch
from models import build_model
from training import arguments
from training.build import options_of
from training.guard import FiniteGuard
from training.log import RunLog
from training.progress import Progress
from training.update import GuardedUpdate
from utils import World

torch.set_num_threads(1)  # small tensors, and threads that spin make a busy machine many times slower
torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.2  # torch waits 5 s for each worker of a loader that raised

REPOSITORY = Path(__file__).parents[1]
TINY_MODEL = {"input_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 3}
"""`build_model` arguments of a two-block ViT on 32 px."""

BRIEF = (
    *("--data-set", "DIGITS", "--device", "cpu", "--num-workers", "0", "--no-tensorboard"),
    *("--input-size", "32", "--epochs", "1", "--batch-size", "16"),
)
"""Flags of a short run of some model."""

TINY = (
    *BRIEF,
    *("--model", "deit_tiny_patch16_224_diverse", "--patch-size", "8"),
    *("--model-kwargs", "depth=2", "embed_dim=24", "num_heads=3"),
)
"""Flags of a run of a second or two; a flag that comes later on the line replaces one of these."""

CONVNET = ("--model", "resnet10t", "--model-kwargs", "channels=[8,8,8,8]", "stem_width=8")
"""Flags of a model that has no tokens."""

FOLDER = ("--data-set", "IMNET", "--batch-size", 2, "--no-repeated-aug", "--data-path")
"""Flags of a run on an image folder, whose path follows."""


def run_main(*words, draw_curves=False):
    """`python main.py *words` in this process, by default without curves.png, which takes longer than a tiny run."""
    with contextlib.nullcontext() if draw_curves else mock.patch("reports.figures.curves"):
        main.command_line([str(word) for word in words])


def log_of(folder: Path) -> list[dict]:
    """The records of a run, one for each epoch."""
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


@functools.cache
def _all_digits():
    from sklearn.datasets import load_digits

    return load_digits(return_X_y=True)


@contextlib.contextmanager
def few_digits(count=128):
    """Within, `--data-set DIGITS` is the first `count` of its 1,797 scans, in this process and those it forks.

    The fixture of this name does it for a test; this is for fixtures that serve a module.
    """
    scans, labels = _all_digits()
    few = scans[:count], labels[:count]
    with mock.patch("sklearn.datasets.load_digits", lambda return_X_y: few):
        yield


def run_process(*words, timeout=240, environment=None) -> subprocess.CompletedProcess:
    """A real Python process in the repository with one thread, its output captured as text."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | (environment or {})
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=timeout)


def parse(*words):
    """The flags of `TINY` and `words`, parsed and checked."""
    return arguments.parse_args([*TINY, *map(str, words)])


def data_options(*words) -> DataOptions:
    """The options of `build_data` from the flags of `TINY` and `words`."""
    return options_of(DataOptions, parse(*words))


def train_epoch(
    loss_fn, batches, state, *, world, budget=0, log=None, num_steps=None, images=lambda step: "", **options
):
    """`train_one_epoch` with the guard, the update and the progress that `options` describe."""
    update_options = {name: options.pop(name) for name in ("accum_steps", "clip_grad") if name in options}
    guard = FiniteGuard(budget, world, images=images)
    update = GuardedUpdate(state.model, state.model_ema, state.optimizer, state.loss_scaler, guard, **update_options)
    num_steps = num_steps or state.step + len(batches) // update.accum_steps
    log = log or RunLog(None, world, tensorboard=False)
    first_step = options.pop("first_step", None)
    progress = Progress(state, num_steps, log, world, options.pop("log_interval", 50), first_step)
    return train_one_epoch(loss_fn, batches, state, update, progress, world, **options)


def world(rank=0, size=1) -> World:
    """A CPU process of a run of `size`, without a process group."""
    return World(rank, size, rank, size, torch.device("cpu"))


def photo(seed, size=40) -> Image.Image:
    """Smooth colours under noise; every seed gives another picture."""
    generator = np.random.RandomState(seed)
    coarse = Image.fromarray(generator.randint(0, 256, (4, 4, 3), dtype=np.uint8)).resize((size, size))
    return Image.fromarray((np.asarray(coarse) * 0.8 + generator.randint(0, 50, (size, size, 3))).astype(np.uint8))


def make_image_folder(root: Path, classes=("cat", "dog"), n=4, size=40, splits=("train", "val")) -> Path:
    """root/<split>/<class>/<number>.png, n of each, all different; returns root."""
    seed = 0
    for split in splits:
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for number in range(n):
                photo(seed, size).save(root / split / name / f"{number}.png")
                seed += 1
    return root


def model_of(seed=0, **kwargs):
    """A `TINY_MODEL` of 7 classes, with arguments of `build_model` over its own."""
    torch.manual_seed(seed)
    return build_model(**{"name": "deit_tiny_patch16_224_diverse", "num_classes": 7} | TINY_MODEL | kwargs)


def assert_equal(first, second):
    """Nested dicts and lists of tensors and numbers are the same, bit for bit."""
    assert type(first) is type(second)
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_equal(first[key], second[key])
    elif isinstance(first, list | tuple):
        for one, other in zip(first, second, strict=True):
            assert_equal(one, other)
    elif torch.is_tensor(first):
        assert torch.equal(first, second)
    else:
        assert first == second


def one_line(caught, *named):
    """The message of a SystemExit, after checking its form."""
    line = str(caught.value)
    assert line.startswith("error: ") and "\n" not in line
    for word in named:
        assert str(word) in line
    return line
