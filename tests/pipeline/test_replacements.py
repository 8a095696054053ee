"""What replaces an unreadable image, what the pixels of a sample depend on, and copies that are decoded once."""

import random
import time
import weakref

import numpy as np
import pytest
import torch
import torchvision
from helpers import data_options, make_image_folder, photo
from image_files import UNREADABLE, Photos, folder_with
from torch.utils.data import DataLoader

from pipeline.images import ReadableImages, Sample
from pipeline.transforms import build_transform
from utils import BadImageError


def draws(image):
    """Of each generator a number, and the image's first pixel."""
    return torch.tensor([random.random(), np.random.rand(), torch.rand(()), *np.asarray(image)[0, 0] / 255])


def damaged_folder(root):
    """8 images of two classes with 5 that cannot be read in the first: in the middle, and at the end."""
    make_image_folder(root, n=4, splits=("train",))
    bad = [root / "train" / "cat" / name for name in ("1a.png", "1b.jpg", "x.png", "y.png")]
    for path, name in zip(bad, ("half.png", "zero.jpg", "text.jpg", "checksum.png"), strict=True):
        UNREADABLE[name](path)
    bad.append(root / "train" / "dog" / "z.png")
    bad[-1].write_bytes(b"")
    return torchvision.datasets.ImageFolder(root / "train"), [str(path) for path in bad]


SAMPLES = [Sample(index, epoch, repeat) for epoch in range(2) for index in range(13) for repeat in range(2)]
BAD = [2, 3, 6, 7, 12]
REPLACED_BY = {2: 4, 3: 4, 6: 8, 7: 8, 12: 0}


def read_samples(images, samples, num_workers=0):
    loader = DataLoader(images, sampler=samples, batch_size=2, num_workers=num_workers)
    pixels, labels = zip(*loader, strict=True)
    return torch.cat(pixels), torch.cat(labels).tolist()


def test_a_replacement_is_the_next_image_with_its_label(tmp_path):
    source, _ = damaged_folder(tmp_path)
    images = ReadableImages(source, np.asarray, max_bad=5)
    for index in (*range(13), *range(13)):
        good = REPLACED_BY.get(index, index)
        image, label = images[index]
        assert np.array_equal(image, np.asarray(source[good][0]))
        assert label == source[good][1]
    assert images.is_bad.nonzero().flatten().tolist() == BAD


def test_a_replacement_is_augmented_as_the_sample_that_it_replaces(tmp_path):
    source, _ = damaged_folder(tmp_path)
    bad, _ = ReadableImages(source, draws, max_bad=5, seed=3)[Sample(2, 4, 1)]
    own, _ = ReadableImages(source, draws, max_bad=5, seed=3)[Sample(4, 4, 1)]
    assert torch.equal(bad[3:], own[3:])
    assert not (bad[:3] == own[:3]).any()
    torchvision.datasets.folder.default_loader(source.samples[4][0]).save(source.samples[2][0])  # readable again
    assert torch.equal(ReadableImages(source, draws, max_bad=5, seed=3)[Sample(2, 4, 1)][0], bad)


def test_samples_differ_in_seed_epoch_index_and_repeat():
    source = Photos()
    samples = [Sample(i, e, r) for i in range(3) for e in range(3) for r in range(3)]
    rows = [ReadableImages(source, draws, 0, seed)[sample][0][:3] for seed in (0, 1) for sample in samples]
    for column in torch.stack(rows).T:
        assert len(column.unique()) == len(rows)


def test_a_plain_index_seeds_nothing():
    images = ReadableImages(Photos(), draws, max_bad=0)
    assert not torch.equal(images[0][0], images[0][0])
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = draws(photo(0))[:3]
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    assert torch.equal(images[0][0][:3], expected)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_pixels_depend_on_the_sample_alone(tmp_path, capfd, num_workers):
    """Any number of workers, any place where a run was cut."""
    source, bad = damaged_folder(tmp_path)
    transform = build_transform(data_options("--input-size", 64), is_training=True)

    def fresh():
        return ReadableImages(source, transform, max_bad=5, seed=1)

    expected = [fresh()[sample] for sample in SAMPLES]
    capfd.readouterr()
    images = fresh()
    pixels, labels = read_samples(images, SAMPLES, num_workers)
    assert torch.equal(pixels, torch.stack([image for image, _ in expected]))
    assert labels == [label for _, label in expected]
    assert images.is_bad.nonzero().flatten().tolist() == BAD
    assert len({image.numpy().tobytes() for image in pixels}) == len(SAMPLES)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == len(bad)
    for path in bad:
        [line] = [line for line in lines if path in line]
        assert line.startswith("unreadable image") and line.endswith("; replaced by the next one")

    again = fresh()
    rest, labels = read_samples(again, SAMPLES[20:], num_workers)
    assert torch.equal(rest, pixels[20:])
    assert labels == [label for _, label in expected[20:]]
    assert again.is_bad.nonzero().flatten().tolist() == BAD
    for path in bad:
        photo(99).save(path, "png")  # repaired; the process that has met them replaces them to its end
    same, _ = read_samples(again, SAMPLES[20:], num_workers)
    assert torch.equal(same, rest)
    capfd.readouterr()
    repaired = fresh()
    other, _ = read_samples(repaired, SAMPLES[20:], num_workers)
    changed = [SAMPLES[20 + row].index for row in range(len(rest)) if not torch.equal(other[row], rest[row])]
    assert changed == [sample.index for sample in SAMPLES[20:] if sample.index in BAD]
    assert (repaired.num_bad, capfd.readouterr().err) == (0, "")


class Watch:
    """The transform `draws`, which counts the images that are in memory at the same time."""

    def __init__(self):
        self.images, self.most = [], 0

    def __call__(self, image):
        if not any(other() is image for other in self.images):
            self.images.append(weakref.ref(image))
        self.most = max(self.most, sum(other() is not None for other in self.images))
        return draws(image)


@pytest.mark.parametrize("decode_once", [True, False])
def test_copies_of_an_image_are_decoded_once_and_then_freed(decode_once):
    source, watch = Photos(), Watch()
    images = ReadableImages(source, watch, 0, decode_once=decode_once)
    samples = [Sample(7, 0, 1), Sample(7, 0, 2), *(Sample(3, 0, repeat) for repeat in range(3)), Sample(7, 1, 0)]
    items = images.__getitems__(samples)
    assert source.reads == ([7, 3, 7] if decode_once else [7, 7, 3, 3, 3, 7])
    assert watch.most == 1
    assert len({image.numpy().tobytes() for image, _ in items}) == len(samples)
    for (image, label), sample in zip(items, samples, strict=True):
        assert torch.equal(image, images[sample][0]) and label == images[sample][1]


def test_copies_of_an_unreadable_image_are_one_replacement_augmented_as_each(tmp_path, capsys):
    source, _ = damaged_folder(tmp_path)
    samples = [Sample(index, 2, repeat) for index in (2, 4, 12) for repeat in range(3)]
    items = ReadableImages(source, draws, max_bad=5).__getitems__(samples)
    assert capsys.readouterr().err.count("unreadable image") == 3  # 2, 3 which comes next, and 12
    each = ReadableImages(source, draws, max_bad=5)
    for (image, label), sample in zip(items, samples, strict=True):
        assert torch.equal(image, each[sample][0]) and label == each[sample][1]


@pytest.mark.parametrize(
    "policy", ["rand-m9-mstd0.5-inc1", "rand-m9-n3-inc0", "augmix-m5-w4-d2", "original", "v0", "3a", "none"]
)
@pytest.mark.parametrize("size", [32, 40])
def test_no_transform_alters_the_image_that_copies_share(policy, size):
    """At 32 px torchvision's resize returns the image itself where it has that size."""
    transform = build_transform(data_options("--input-size", size, "--aa", policy, "--scale", 1, 1), is_training=True)
    for seed in range(60):
        image = photo(seed, size)
        before = image.tobytes()
        for _ in range(3):
            transform(image)
        assert image.tobytes() == before and (image.size, image.mode) == ((size, size), "RGB")


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("max_bad", [4, 5])
def test_the_budget_counts_over_workers(tmp_path, capfd, num_workers, max_bad):
    source, _ = damaged_folder(tmp_path)
    images = ReadableImages(source, draws, max_bad)
    if max_bad == 5:
        read_samples(images, SAMPLES, num_workers)
    else:
        with pytest.raises(BadImageError, match=r"\(number 5; 4 may be replaced\)"):
            read_samples(images, SAMPLES, num_workers)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == len(set(lines)) == images.num_bad == max_bad


class SlowToCount(ReadableImages):
    @property
    def num_bad(self):
        time.sleep(0.3)
        return super().num_bad


def test_workers_that_meet_an_image_at_the_same_time_report_it_once(tmp_path, capfd):
    source, _ = damaged_folder(tmp_path)
    images = SlowToCount(source, draws, max_bad=1)
    read_samples(images, [Sample(12, 0, repeat) for repeat in range(4)], num_workers=2)
    assert images.num_bad == capfd.readouterr().err.count("unreadable") == 1


def test_a_set_without_a_readable_image(tmp_path):
    source = folder_with(tmp_path, "zero.png", lambda path: None)
    with pytest.raises(BadImageError, match="none of the 1 images can be read"):
        ReadableImages(source, np.asarray, max_bad=1)[0]
