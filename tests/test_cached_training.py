"""Training and evaluation on cached images: what they equal, whatever ranks, workers, memory and stops there are."""

import json
import threading

import numpy as np
import pytest
import torch
from cached_batches import content as batches_of
from cutting import EVERYTHING, content, cut_run, records
from data_files import build
from helpers import TINY, data_options, few_digits, log_of, make_image_folder, photo, run_main, world
from PIL import Image
from ranks import run_ranks

import datasets
from pipeline import image_cache

CACHED = ("--cache-images", "memory", "--num-workers", 0)
PLAIN = ("--aa", "none", "--color-jitter", 0, "--reprob", 0, "--hflip", 0, "--scale", 1, 1, "--ratio", 1, 1)


@pytest.fixture
def folder(tmp_path):
    """23 training images a class, two of which cannot be read, and 7 validation images a class."""
    root = make_image_folder(tmp_path / "images", n=23)
    for number in range(7, 23):
        (root / "val" / "dog" / f"{number}.png").unlink()
        (root / "val" / "cat" / f"{number}.png").unlink()
    photo(99, 60).crop((0, 0, 60, 33)).save(root / "val" / "dog" / "2.png")
    for name in ("cat/20.png", "dog/5.png"):
        (root / "train" / name).write_bytes(b"no image")
    return "--data-set", "IMNET", "--data-path", root


def equal(batches, others):
    for (images, labels), (other_images, other_labels) in zip(batches, others, strict=True):
        assert images.dtype == torch.float32 and images.stride() == other_images.stride()
        assert torch.equal(images, other_images) and torch.equal(labels, other_labels)


# Batches


@pytest.mark.parametrize("prefetcher", ["--prefetcher", "--no-prefetcher"])
@pytest.mark.parametrize("size", [32, 48])
def test_evaluation_is_bit_for_bit_that_of_uncached_images(size, prefetcher, folder):
    words = (*folder, "--input-size", size, "--num-workers", 0, "--mean", 0.4, 0.5, 0.6, "--std", 0.1, 0.2, 0.3)
    ours, theirs = build(*words, prefetcher, *CACHED), build(*words)
    for _ in range(2):
        equal(ours.val, theirs.val)
    equal([ours.first_val_batch(5), ours.first_val_batch(99)], [theirs.first_val_batch(n) for n in (5, 99)])
    assert ours.common_val_batches(world()) == theirs.common_val_batches(world()) == 5
    assert (ours.num_val, ours.val_is_shared, ours.classes) == (14, False, ["cat", "dog"])


def test_two_ranks_have_the_samples_of_one_process(folder, tmp_path):
    words = (*folder, *CACHED, "--input-size", 48, "--aug-repeats", 2, "--accum-steps", 2)
    for count, batch_size in ((1, 8), (2, 4)):
        (tmp_path / f"{count}").mkdir()
        out = tmp_path / f"{count}"
        result = run_ranks(count, "tests/cached_batches.py", out, *words, "--batch-size", batch_size)
        assert result.returncode == 0, result.stderr
    one, *two = (json.loads((tmp_path / name).read_text()) for name in ("1/0.json", "2/0.json", "2/1.json"))
    assert two[0]["train"] | two[1]["train"] == one["train"] and len(one["train"]) == 32
    assert one["val"] == [pair for pairs in zip(*(part["val"] for part in two), strict=True) for pair in pairs]
    assert one["bad"] == two[0]["bad"] == two[1]["bad"] == ["cat/20.png", "dog/5.png"]


@pytest.mark.parametrize("words", [("--num-workers", 2), ("--cache-images", "device"), ("--repeats-together",)])
def test_what_changes_nothing(words, folder):
    words = (*folder, *CACHED, *words)
    expected = batches_of(data_options(*folder, *CACHED), world())
    assert batches_of(data_options(*words), world()) == expected
    other = batches_of(data_options(*words, "--seed", 1), world())
    assert other["val"] == expected["val"] and not {*other["train"].values()} & {*expected["train"].values()}


@pytest.mark.parametrize(("size", "words", "side"), [(32, (), 32), (40, (), 46), (32, ("--cache-size", 48), 48)])
def test_images_are_cached_in_the_size_that_the_flags_say(size, words, side, folder):
    data = build(*folder, *CACHED, *PLAIN, "--input-size", size, *words, "--batch-size", 10)
    assert data.train.dataset.images.shape[1:] == (3, side, side)
    samples, _ = next(iter(data.batches(0, 0)))
    assert samples.shape[1:] == (3, size, size)
    assert f"training images of {side} px" in " ".join(data.notes)


def test_without_augmentation_the_images_of_the_folder_are_seen(folder):
    data = build(*folder, *CACHED, *PLAIN, "--input-size", 40, "--cache-size", 40, "--batch-size", 10)
    data.train.batch_sampler.start(0)
    [samples, *_] = data.train.batch_sampler.batches(0, 1)
    images, labels = next(iter(data.batches(0, 0)))
    mean, std = (torch.tensor(values)[:, None, None] for values in (data_options().mean, data_options().std))
    paths = data.train.dataset.source.samples
    for image, label, sample in zip(images, labels.tolist(), samples, strict=True):
        path, expected = paths[sample.index + data.train.dataset.is_bad[sample.index]]
        pixels = np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1) / 255
        torch.testing.assert_close(image, (torch.tensor(pixels).float() - mean) / std, rtol=0, atol=1e-5)
        assert label == expected


class Counting:
    """A transform that counts its batches."""

    made = 0

    def draw(self, samples, sizes):
        return self

    def to(self, device):
        return self

    def __call__(self, images, draws):
        self.made += 1
        return images


def test_a_thread_makes_the_same_batches_one_ahead_and_ends(folder):
    data = build(*folder, *CACHED)
    expected = [*data.batches(0, 0)]
    data.train.is_ahead = True
    equal(data.batches(0, 0), expected)
    equal(data.batches(0, 7), expected[7:])
    data.train.transform = Counting()
    batches = iter(data.batches(0, 0))
    next(batches), next(batches)
    batches.close()  # as when a run stops within an epoch
    assert data.train.transform.made == 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("cached images")]


def test_an_error_in_the_thread_is_raised(folder):
    data = build(*folder, *CACHED)
    data.train.is_ahead, data.train.transform = True, None
    with pytest.raises(AttributeError, match="'draw'"):
        next(iter(data.batches(0, 0)))


# Runs


@pytest.mark.parametrize(
    "then",
    [
        ("--num-workers", "2", "--cache-images", "device"),
        pytest.param(("--input-size", "48"), marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_ends_as_one_that_was_not_stopped(then, tmp_path, monkeypatch):
    """With repeated augmentation and accumulated batches, several operations and erasing."""
    size = then if "--input-size" in then else ()
    flags = (*EVERYTHING, "--epochs", "2", "--cache-images", "memory", "--no-tensorboard", *size)
    with few_digits(400):  # 4 steps an epoch
        expected = cut_run(monkeypatch, tmp_path / "whole", flags=flags)
        stopped = cut_run(monkeypatch, tmp_path / "cut", (1, 2), flags=flags, then=then)
    assert stopped == expected and len({*expected.values()}) == 2 * 4 * 2
    assert content(tmp_path / "cut") == content(tmp_path / "whole")
    assert records(tmp_path / "cut") == records(tmp_path / "whole")


def test_a_run_names_its_memory_and_evaluates_without(folder, tmp_path, capfd):
    run_main(*TINY, *folder, "--batch-size", 4, "--cache-images", "memory", "--output-dir", tmp_path / "run")
    printed, errors = capfd.readouterr()
    assert "reading 46 images once\n" in errors and "reading 14 images once\n" in errors
    num_bytes = 3 * (46 + 14) * 32 * 32
    line = f"46 training images of 32 px and 14 validation images of 32 px are in memory: {num_bytes:,} bytes"
    assert line in printed and "fast path: fused attention, fused optimizer, images in memory\n" in printed
    [record] = log_of(tmp_path / "run")
    assert (record["test_images"], record["bad_images"]) == (14, 2)
    run_main("--eval", "--resume", tmp_path / "run" / "checkpoint.pth", "--data-path", folder[-1])
    printed = capfd.readouterr().out
    assert f"raw {record['test_acc1']:.2f} %" in printed and "in memory" not in printed


def test_a_dry_run_reads_all_images_and_writes_nothing(tmp_path, few_digits, capsys):
    run_main(*TINY, "--cache-images", "device", "--dry-run", "--output-dir", tmp_path / "run")
    printed = capsys.readouterr().out
    assert "102 training images of 32 px and 26 validation images of 32 px are in device memory" in printed
    assert "images in device memory" in printed and not (tmp_path / "run").exists()


def test_what_does_not_fit_is_refused_before_it_is_read(folder, refused, monkeypatch):
    monkeypatch.setattr(image_cache, "free_bytes", lambda device: 100_000)
    monkeypatch.setattr(datasets, "cache_images", None)
    line = refused(*folder, "--batch-size", 2, "--cache-images", "device")
    assert "--cache-images device needs 184,320 bytes for 46 training images of 32 px" in line
    assert "but 100,000 bytes of the memory are free" in line


def test_a_policy_that_is_not_applied_to_batches_is_refused_before_images_are_read(refused, few_digits, monkeypatch):
    monkeypatch.setattr(datasets.ReadableImages, "_read", None)
    line = refused("--aa", "augmix-m5", "--cache-images", "memory")
    assert "--aa augmix-m5" in line and "--cache-images" in line


def test_an_unreadable_validation_image_stops_a_run_before_it_trains(folder, refused):
    path = folder[-1] / "val" / "dog" / "1.png"
    path.write_bytes(b"")
    assert f"unreadable image {path}" in refused(*folder, "--batch-size", 2, "--cache-images", "memory")
