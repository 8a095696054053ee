"""The loaders of a run: streams, workers, the shares of an evaluation, and images that cannot be read."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from data_files import build, images_of, labels_of, write_shards, write_webdataset
from helpers import TINY, data_options, make_image_folder, photo, run_main, world
from PIL import Image

import datasets
from datasets import build_data
from utils import BadImageError, World

# Streams


@pytest.mark.parametrize(("num_workers", "shards"), [(0, (4, 4)), (2, (4, 4)), (0, (8,)), (2, (8,))])
def test_webdataset(tmp_path, num_workers, shards):
    words = (*write_webdataset(tmp_path, train=shards, validation=(3, 2)), "--num-workers", num_workers)
    with pytest.raises(SystemExit, match="--num-classes"):
        build(*words)
    data = build(*words, "--num-classes", 3)
    batches = list(data.batches(0, 0))
    assert all(samples.shape == (2, 3, 32, 32) for samples, _ in batches)
    assert len(batches) == data.num_steps == 4
    torch.manual_seed(5)  # what was drawn before does not matter
    assert [labels.tolist() for _, labels in data.batches(0, 1)] == [labels.tolist() for _, labels in batches[1:]]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(data.batches(0, 2), batches[2:], strict=True))
    assert sorted(labels_of(data.val)) == [0, 0, 1, 1, 2]
    assert len(set(images_of(data.val))) == 5


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("count", [1, 3, 4, 9])
def test_first_images_of_a_webdataset(tmp_path, num_workers, count):
    words = (*write_webdataset(tmp_path, train=(4,), validation=(3, 2)), "--num-classes", 3)
    data = build(*words, "--num-workers", num_workers)
    every = [torch.cat(of_batches) for of_batches in zip(*data.val, strict=True)]
    before = torch.get_rng_state()
    assert all(map(torch.equal, data.first_val_batch(count), (part[:count] for part in every)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_evaluates_all_of_a_webdataset(tmp_path, rank):
    words = write_webdataset(tmp_path, train=(4, 4), validation=(3, 2))
    data = build(*words, "--num-classes", 3, rank=rank, size=2)
    assert not data.val_is_shared
    assert data.num_val == len(set(images_of(data.val))) == len(images_of(data.val)) == 5


def test_webdataset_without_a_shard_or_with_an_unknown_label_is_refused(tmp_path):
    words = write_webdataset(tmp_path, train=(4, 4), validation=(3,))
    with pytest.raises(BadImageError, match="labelled 2, but --num-classes is 2"):
        list(build(*words, "--num-classes", 2).val)
    (tmp_path / "train-1.tar").unlink()
    with pytest.raises(SystemExit, match=r"lacks the shard train-1\.tar"):
        build(*words, "--num-classes", 3)


def test_a_webdataset_with_less_than_one_step_of_images_is_refused(tmp_path):
    words = (*write_webdataset(tmp_path, train=(4,), validation=(3,)), "--num-classes", 3)
    assert build(*words, "--accum-steps", 2).num_steps == 1
    with pytest.raises(SystemExit, match="has 4 images per process, less than the 6 of one step"):
        build(*words, "--accum-steps", 3)


def test_unreadable_image_of_a_webdataset(tmp_path, monkeypatch):
    """timm would leave it out, and the accuracy would be that of the other images."""
    words = write_webdataset(tmp_path, train=(4,), validation=(3,))
    good = photo(0).tobytes()
    save = Image.Image.save
    broken = lambda image, file, kind: file.write(b"x") if image.tobytes() == good else save(image, file, kind)  # noqa: E731
    monkeypatch.setattr(Image.Image, "save", broken)
    write_shards(tmp_path, "validation", (3,))
    with pytest.raises(SystemExit, match="error: 1 of 3 validation images are unreadable"):
        run_main(*TINY, *words, "--num-classes", 3, "--batch-size", 2)


# Workers


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(
    ("device", "cores", "ranks", "num_workers"),
    [("cpu", 48, 4, 12), ("cpu", 48, 1, 48), ("cpu", 7, 2, 3), ("cpu", 2, 4, 1), ("cuda", 16, 1, 14),
     ("cuda", 50, 4, 12), ("cuda", 2, 1, 1)],
)  # fmt: skip
def test_workers_share_the_cores(monkeypatch, device, cores, ranks, num_workers):
    """Evaluation has half as many; on a GPU machine two cores stay free."""
    monkeypatch.setattr(datasets, "cpu_count", lambda: cores)
    options = replace(data_options(), num_workers=None, prefetcher=False)
    data = build_data(options, World(0, ranks, 0, ranks, torch.device(device)))
    assert (data.train.num_workers, data.val.num_workers) == (num_workers, math.ceil(num_workers / 2))
    assert build("--num-workers", 5, size=ranks).train.num_workers == 5


@pytest.mark.parametrize("num_workers", [0, 2])
def test_decoding_once_changes_no_pixel(num_workers, tmp_path):
    words = ("--data-set", "IMNET", "--data-path", make_image_folder(tmp_path, n=12), "--input-size", 48)
    words += ("--batch-size", 8, "--num-workers", num_workers)
    options = data_options("--batch-size", 2, *words)
    once, each = (datasets.build_data(replace(options, decode_once=value), world()) for value in (True, False))
    assert (once.train.dataset.decode_once, each.train.dataset.decode_once) == (True, False)
    for ours, theirs in zip(once.batches(1, 0), each.batches(1, 0), strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


# Evaluation


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("n", [1, 5, 7])
def test_ranks_share_the_evaluation_exactly(tmp_path, size, n):
    make_image_folder(tmp_path, n=n, splits=("val",))
    words = ("--data-set", "IMNET", "--data-path", tmp_path, "--eval", "--resume", "some.pth")
    everything = sorted(images_of(build(*words).val))
    assert len(set(everything)) == 2 * n
    shares = [images_of(build(*words, rank=rank, size=size).val) for rank in range(size)]
    assert sorted(itertools.chain(*shares)) == everything
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert sorted(images_of(build(*words, "--no-dist-eval", rank=size - 1, size=size).val)) == everything


# Images that cannot be read


def damaged_folder(root, names, split="train"):
    """An image folder whose class "cat" also has files that are no images."""
    make_image_folder(root, n=4)
    paths = [root / split / "cat" / name for name in names]
    for path in paths:
        path.write_bytes(b"no image")
    return "--data-set", "IMNET", "--data-path", root, "--no-repeated-aug"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_training_images_are_replaced_reported_and_counted_once(tmp_path, capfd, num_workers):
    names = ("x.png", "y.jpg", "z.png")
    words = (*damaged_folder(tmp_path, names), "--num-workers", num_workers)
    data = build(*words)
    for epoch in range(3):
        assert len(list(data.batches(epoch, 0))) == data.num_steps == 5
    assert len(data.bad_images(world())) == 3
    lines = capfd.readouterr().err.splitlines()
    assert all(line.startswith("unreadable image") and "replaced" in line for line in lines)
    assert [sum(name in line for line in lines) for name in names] == [1, 1, 1]
    with pytest.raises(BadImageError, match=r"unreadable image .*number 3; 2 may be replaced"):
        list(build(*words, "--max-bad-images", 2).train)


def test_an_unreadable_validation_image_stops(tmp_path):
    words = damaged_folder(tmp_path, ["x.png"], split="val")
    with pytest.raises(BadImageError, match=str(tmp_path / "val" / "cat" / "x.png")):
        list(build(*words).val)
