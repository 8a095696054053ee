"""What a prefetcher sends to the device becomes the pixels of the float path."""

import gc
import time

import pytest
import torch
from cutting import EVERYTHING, content, cut_run
from data_files import write_webdataset
from failing import Failing, hang, kill
from helpers import data_options, few_digits, make_image_folder, world
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import DataLoader
from torchvision import transforms

import datasets
from datasets import build_data
from pipeline.batch_augmentation import Normalize
from pipeline.prefetch import Prefetcher
from pipeline.workers import loader_errors
from utils import World

CPU = torch.device("cpu")


def build(*words, rank=0, size=1, **kwargs):
    return build_data(data_options("--batch-size", 6, "--prefetcher", *words), world(rank, size), **kwargs)


def folder_words(tmp_path):
    """11 steps of 6 samples, and 70 images to evaluate in batches of 9."""
    return "--data-set", "IMNET", "--data-path", make_image_folder(tmp_path, n=35), "--input-size", 48


def normalised(batches, *values):
    """Batches of bytes as the model sees them."""
    return ((Normalize(*values)(images), labels) for images, labels in batches)


def assert_same(batches, others, **tolerance):
    for (images, labels), (other_images, other_labels) in zip(batches, others, strict=True):
        assert images.dtype == other_images.dtype == torch.float32
        torch.testing.assert_close(images, other_images, **tolerance or {"rtol": 0, "atol": 0})
        assert torch.equal(labels, other_labels)


# The float path


def test_every_byte_is_normalised_as_by_the_float_path():
    images = torch.arange(256, dtype=torch.uint8).expand(2, 3, 4, 256)
    expected = transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)(images / 255)
    [(sent, labels)] = Prefetcher([(images.permute(0, 2, 3, 1), torch.tensor([4, 5]))], CPU)
    assert torch.equal(sent, images) and labels.tolist() == [4, 5]
    torch.testing.assert_close(Normalize()(sent), expected, rtol=0, atol=1e-6)
    assert torch.equal(Normalize()(expected), expected)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("size", [32, 48])
def test_training_batches_are_those_of_the_float_path(size, num_workers, tmp_path):
    words = (*folder_words(tmp_path), "--input-size", size, "--reprob", 0, "--num-workers", num_workers)
    ours, theirs = build(*words), build(*words, "--no-prefetcher")
    assert next(iter(ours.train))[0].dtype == torch.uint8  # what travels
    assert ours.num_steps == theirs.num_steps == 11
    for step in (0, 7):
        assert_same(normalised(ours.batches(1, step)), theirs.batches(1, step), rtol=0, atol=1e-6)


@pytest.mark.parametrize("ranks", [1, 2])
def test_evaluation_is_that_of_the_float_path(ranks, tmp_path):
    """Twice, since raw and averaged weights are evaluated; the last batch is short."""
    words = folder_words(tmp_path)
    ours, theirs = (build(*words, flag, rank=ranks - 1, size=ranks) for flag in ("--prefetcher", "--no-prefetcher"))
    assert isinstance(ours.val, Prefetcher) and isinstance(theirs.val, DataLoader)
    for _ in range(2):
        assert_same(ours.val, theirs.val, rtol=0, atol=1e-6)
    assert len([*ours.val][-1][0]) == {1: 7, 2: 8}[ranks]
    assert ours.val_is_shared == theirs.val_is_shared == (ranks == 2)
    assert ours.common_val_batches(world(0, ranks)) == theirs.common_val_batches(world(0, ranks))
    before = torch.get_rng_state()
    for count in (3, 20, 100):
        torch.testing.assert_close(ours.first_val_batch(count), theirs.first_val_batch(count), rtol=0, atol=1e-6)
    assert torch.equal(torch.get_rng_state(), before)


def test_streams_are_those_of_the_float_path(tmp_path):
    words = (*write_webdataset(tmp_path, train=(20, 20), validation=(3, 2)), "--num-classes", 3, "--reprob", 0)
    words = (*words, "--batch-size", 4, "--num-workers", 2)
    ours, theirs = build(*words), build(*words, "--no-prefetcher")
    for epoch, step in ((0, 0), (1, 0), (1, 3)):
        assert_same(normalised(ours.batches(epoch, step)), theirs.batches(epoch, step), rtol=0, atol=1e-6)
    assert len([*ours.batches(1, 3)]) == ours.num_steps - 3
    assert_same(ours.val, theirs.val, rtol=0, atol=1e-6)
    for count in (1, 4, 9):
        torch.testing.assert_close(ours.first_val_batch(count), theirs.first_val_batch(count), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [32, 48])
def test_mean_and_deviation_are_those_of_the_float_path(size, tmp_path):
    """In training the step normalises, of what the prefetcher sends."""
    mean, std = (0.25, 0.5, 0.75), (0.1, 0.2, 0.4)
    words = (*folder_words(tmp_path), "--input-size", size, "--reprob", 0, "--mean", *mean, "--std", *std)
    ours, theirs = build(*words), build(*words, "--no-prefetcher")
    assert_same(normalised(ours.batches(0, 0), mean, std), theirs.batches(0, 0), rtol=0, atol=3e-6)
    assert_same(ours.val, theirs.val, rtol=0, atol=3e-6)
    torch.testing.assert_close(ours.first_val_batch(20), theirs.first_val_batch(20), rtol=0, atol=3e-6)
    image = transforms.ToTensor()(Image.open(tmp_path / "val" / "cat" / "0.png").resize((size, size), Image.BICUBIC))
    squared = build(*words, "--crop-pct", 1).first_val_batch(1)[0][0]
    expected = (image - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(squared, expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize(
    ("device", "flag", "prefetches"),
    [("cuda", (), True), ("cpu", (), False), ("cuda", ("--no-prefetcher",), False), ("cpu", ("--prefetcher",), True)],
)
def test_a_gpu_prefetches_by_default(device, flag, prefetches, monkeypatch):
    made = []
    monkeypatch.setattr(datasets, "Normalize", torch.nn.Identity)  # which has nothing to move to a GPU
    monkeypatch.setattr(
        datasets, "Prefetcher", lambda loader, device, *_, **__: made.append((loader.pin_memory, device))
    )
    build_data(data_options(*flag), World(0, 1, 0, 1, torch.device(device)))
    assert made == [(device == "cuda", torch.device(device))] * 2 * prefetches


def test_a_stopped_run_ends_as_one_that_was_not_stopped(tmp_path, monkeypatch):
    flags = (*EVERYTHING, "--epochs", "2", "--prefetcher")
    with few_digits(400):  # 4 steps an epoch
        expected = cut_run(monkeypatch, tmp_path / "whole", flags=flags)
        assert (
            cut_run(monkeypatch, tmp_path / "cut", (0, 2), (1, 1), flags=flags, then=("--num-workers", "2")) == expected
        )
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


# Errors pass through


def test_unreadable_images_are_replaced_and_counted(tmp_path, capfd):
    words = (*folder_words(tmp_path), "--reprob", 0)
    for name in ("17.png", "3.png"):
        (tmp_path / "train" / "cat" / name).write_bytes(b"no image")
    ours, theirs = build(*words), build(*words, "--no-prefetcher")
    for epoch in range(3):
        assert_same(normalised(ours.batches(epoch, 0)), theirs.batches(epoch, 0), rtol=0, atol=1e-6)
    assert ours.bad_images(world()) == theirs.bad_images(world()) == ["cat/17.png", "cat/3.png"]
    assert capfd.readouterr().err.count("replaced by the next one") == 2 * 2


def small_image(index):
    return torch.zeros(4, 4, 3, dtype=torch.uint8), index


@pytest.mark.parametrize(
    ("fail", "timeout", "line"),
    [(kill, 0, "a loader worker was killed"), (hang, 0.5, "gave no batch in time.*--loader-timeout")],
)
def test_a_loader_that_fails_ends_in_one_line(fail, timeout, line):
    gc.collect()  # the end of an earlier test's loader would hide the signal of a worker's death
    loader = Prefetcher(DataLoader(Failing(fail, small_image), batch_size=2, num_workers=1, timeout=timeout), CPU)
    with pytest.raises(SystemExit, match=f"^error: .*{line}"), loader_errors():
        for _ in loader:
            time.sleep(0.01)
