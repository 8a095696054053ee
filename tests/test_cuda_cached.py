"""Cached images on a GPU; `python benchmark.py gpu` runs and reports these tests."""

import pytest
import torch
from helpers import TINY, data_options, log_of, make_image_folder, run_main, world

from benchmarks.measure import host_syncs
from datasets import build_data
from utils import World

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

ON_GPU = World(0, 1, 0, 1, torch.device("cuda:0"))
PLACES = ("memory", "device")


@pytest.fixture
def words(tmp_path):
    root = make_image_folder(tmp_path / "images", n=40)
    return "--data-set", "IMNET", "--data-path", root, "--batch-size", 10, "--num-workers", 0, "--repeats-together"


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("size", [32, 48])
def test_batches_are_those_of_a_cpu(size, place, words):
    """A value may be rounded otherwise, which some operations amplify."""
    words = (*words, "--input-size", size, "--cache-images", place)
    ours, theirs = (build_data(data_options(*words), where) for where in (ON_GPU, world()))
    assert ours.train.dataset.images.device.type == {"memory": "cpu", "device": "cuda"}[place]
    batches = [(images.cpu(), labels.cpu()) for images, labels in ours.batches(1, 0)]
    for (images, labels), (expected, expected_labels) in zip(batches, theirs.batches(1, 0), strict=True):
        assert torch.equal(labels, expected_labels)
        assert ((images - expected).abs() > 0.03).float().mean() < 0.02
    for (images, labels), (expected, expected_labels) in zip(ours.val, theirs.val, strict=True):
        assert images.is_cuda and torch.equal(labels.cpu(), expected_labels)
        torch.testing.assert_close(images.cpu(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("place", PLACES)
def test_batches_made_ahead_are_not_written_while_they_are_used(place, words):
    data = build_data(data_options(*words, "--cache-images", place), ON_GPU)
    data.train.is_ahead = False
    expected = [images.clone() for epoch in range(3) for images, _ in data.batches(epoch, 0)]
    data.train.is_ahead, made = True, []
    busy = torch.randn(4000, 4000, device=ON_GPU.device)
    for epoch in range(3):
        for images, _ in data.batches(epoch, 0):
            for _ in range(3):
                busy = (busy @ busy).clamp(-1, 1)  # the copy below waits for it, the host does not
            made.append(images.clone())
            del images
    assert all(map(torch.equal, made, expected)) and len(made) == len(expected)


@pytest.mark.parametrize("place", PLACES)
def test_the_host_does_not_wait_for_a_batch(place, words):
    data = build_data(data_options(*words, "--cache-images", place), ON_GPU)

    def run(num_batches):
        for _, _ in zip(range(num_batches), data.batches(0, 0), strict=False):
            pass

    run(2)
    assert host_syncs(run, ON_GPU.device) == 0


def test_a_run_in_either_memory_is_the_same(words, tmp_path):
    for place in PLACES:
        flags = ("--device", "cuda:0", "--deterministic", "--no-compile", "--output-dir", tmp_path / place)
        run_main(*TINY, *words, *flags, "--cache-images", place)
    losses = [[record["train_loss"] for record in log_of(tmp_path / place)] for place in PLACES]
    assert losses[0] == losses[1]
