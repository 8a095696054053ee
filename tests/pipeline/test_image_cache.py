"""Images that are decoded once: their bytes, labels and sizes, who reads them, and what does not fit."""

import gc
import multiprocessing
import re

import numpy as np
import pytest
import torch
from helpers import REPOSITORY, make_image_folder, photo, world
from image_files import UNREADABLE
from PIL import Image

from pipeline import image_cache
from pipeline.image_cache import Squeeze, cache_images, require_memory, side_of
from pipeline.image_folder import ImageFolder
from pipeline.images import ReadableImages
from utils import BadImageError, World

WORKERS = {0: {"num_workers": 0}, 2: {"num_workers": 2}}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """12 training images of two classes, of several sizes; some are not square."""
    monkeypatch.setattr(image_cache, "BATCH", 3)
    root = make_image_folder(tmp_path, n=6, splits=("train",)) / "train"
    for number, size in enumerate(((40, 23), (9, 31), (32, 32))):
        photo(50 + number, max(size)).crop((0, 0, *size)).save(root / "dog" / f"{number}.png")
    return root


def cached(folder, side=24, num_workers=0, max_bad=0, labels=(), interpolation="bicubic", place="memory"):
    images = ReadableImages(ImageFolder(folder), Squeeze(side, interpolation), max_bad, labels=labels)
    return cache_images(images, (3, side, side), world(), place, WORKERS[num_workers], pin=False)


@pytest.mark.parametrize("num_workers", WORKERS)
@pytest.mark.parametrize(("side", "interpolation"), [(24, "bicubic"), (32, "bilinear")])
def test_every_image_is_resized_as_a_whole_by_pillow(folder, side, interpolation, num_workers):
    cache = cached(folder, side, num_workers, interpolation=interpolation)
    kind = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[interpolation]
    assert cache.images.shape == (12, 3, side, side) and cache.images.is_contiguous()
    for index, (path, label) in enumerate(cache.source.samples):
        image = Image.open(path).convert("RGB")
        expected = np.asarray(image.resize((side, side), kind)).transpose(2, 0, 1)
        assert np.array_equal(cache.images[index], expected), path
        assert (cache.labels[index], *cache.sizes[index]) == (label, image.height, image.width)
    assert not multiprocessing.active_children()


def test_a_batch_has_the_rows_that_were_asked_for(folder):
    cache = cached(folder)
    images, labels = cache.__getitems__([7, 0, 7])
    assert torch.equal(images, cache.images[[7, 0, 7]]) and labels.tolist() == [1, 0, 1]
    assert torch.equal(cache[7][0], images[0]) and cache[7][1] == 1
    images.zero_()
    assert cache.images[7].any()  # it was a copy


def test_labels_are_those_of_the_model(folder):
    assert cached(folder, labels=[5, 3]).labels.tolist() == [5] * 6 + [3] * 6


@pytest.mark.parametrize("num_workers", WORKERS)
def test_an_unreadable_image_is_replaced_by_the_next_one_and_counted(folder, num_workers, capfd):
    for name in ("dog/2.png", "cat/5.png"):  # the next one of cat/5.png is dog/0.png
        UNREADABLE["half.png"](folder / name)
    cache = cached(folder, num_workers=num_workers, max_bad=2)
    assert torch.equal(cache.images[5], cache.images[6]) and cache.labels[5] == 1
    assert torch.equal(cache.images[8], cache.images[9]) and [*cache.sizes[8]] == [40, 40]
    assert cache.is_bad.nonzero().flatten().tolist() == [5, 8]
    assert capfd.readouterr().err.count("replaced by the next one") == 2


@pytest.mark.parametrize("num_workers", WORKERS)
def test_too_many_unreadable_images_stop_it_and_its_processes(folder, num_workers):
    for name in ("dog/2.png", "cat/5.png"):
        UNREADABLE["half.png"](folder / name)
    with pytest.raises(BadImageError, match="number 2; 1 may be replaced"):
        cached(folder, num_workers=num_workers, max_bad=1)
    gc.collect()  # the error has the frames in which the loader is
    for process in multiprocessing.active_children():
        process.join(20)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("given", "input_size", "side"), [(None, 32, 32), (None, 28, 28), (None, 224, 256), (200, 224, 200)]
)
def test_the_side_of_a_cached_image(given, input_size, side):
    assert side_of(given, input_size) == side


def test_the_documented_sizes_of_caches(monkeypatch):
    monkeypatch.setattr(image_cache, "free_bytes", lambda device: None)
    page = (REPOSITORY / "docs" / "data.md").read_text()
    rows = re.findall(r"\| ([\d,]+) \| (\d+) \| ([\d,]+) \| (\d+) \| ([\d,]+) \|", page)
    for *numbers, num_bytes in rows:
        num_train, side, num_val, input_size = (int(number.replace(",", "")) for number in numbers)
        assert side_of(None, input_size) == side
        line = require_memory("memory", world(), (num_train, side), (num_val, input_size))
        assert line.endswith(f" are in memory: {num_bytes} bytes")
    assert len(rows) == 5


NEEDED = 3 * (10 * 4**2 + 5 * 2**2)
IMAGES = "10 training images of 4 px and 5 validation images of 2 px"


@pytest.mark.parametrize(
    ("local_size", "place", "device", "free", "message"),
    [
        (1, "memory", "cpu", NEEDED, None),
        (1, "memory", "cpu", 539, "540 bytes for {}, but 539 bytes of the memory are free; .* none, "),
        (3, "memory", "cuda", 3 * NEEDED, None),
        (3, "memory", "cuda", 1619, "540 bytes in each of 3 processes for {}, but 1,619 bytes of the memory"),
        (3, "device", "cuda", NEEDED, None),
        (3, "device", "cuda", 539, "540 bytes for {}, but 539 bytes of the GPU are free; .* memory or none, "),
        (2, "device", "cpu", 1000, "540 bytes in each of 2 processes for {}, but 1,000 bytes of the memory"),
        (1, "memory", "cpu", None, None),
    ],
)
def test_what_does_not_fit_is_refused(local_size, place, device, free, message, monkeypatch):
    asked = []
    monkeypatch.setattr(image_cache, "free_bytes", lambda device: asked.append(device.type) or free)
    needs = place, World(0, local_size, 0, local_size, torch.device(device)), (10, 4), (5, 2)
    if message:
        with pytest.raises(SystemExit, match=f"^error: --cache-images {place} needs {message.format(IMAGES)}"):
            require_memory(*needs)
    else:
        assert require_memory(*needs).startswith(IMAGES)
    assert asked == ["cuda" if (place, device) == ("device", "cuda") else "cpu"]
