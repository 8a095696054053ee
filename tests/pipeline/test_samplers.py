"""Which samples form which batch: seeds, epochs, ranks, repeated augmentation, and epochs that start in the middle."""

import pytest
from data_files import build
from helpers import few_digits, make_image_folder
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import DistributedSampler

from pipeline.samplers import SeededRepeatAugSampler

LENGTH = 320
"""Training images of most tests; timm's sampler shows a multiple of 256 of them where there are so many."""
NUM_DIGITS = {LENGTH: 400, 102: 128}


@pytest.fixture(autouse=True)
def digits(request):
    """DIGITS has as many training images as the test's `length`, or `LENGTH` of them."""
    length = request.node.callspec.params.get("length") if hasattr(request.node, "callspec") else None
    with few_digits(NUM_DIGITS.get(length, NUM_DIGITS[LENGTH])):
        yield


def draw(sampler, epoch):
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize("length", [10, 300, 1000])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_repeated_augmentation_of_seed_0_is_timms(length, size):
    for rank in range(size):
        split = {"num_replicas": size, "rank": rank, "num_repeats": 3}
        ours, timms = SeededRepeatAugSampler(range(length), seed=0, **split), RepeatAugSampler(range(length), **split)
        for epoch in (0, 5):
            assert draw(ours, epoch) == draw(timms, epoch)
        assert len(ours) == len(timms) == len(list(ours)) > 0


def test_repeated_augmentation_differs_by_seed_and_epoch():
    split = {"num_replicas": 1, "rank": 0}
    first, second = (SeededRepeatAugSampler(range(300), seed=seed, **split) for seed in (1, 2))
    draws = [draw(sampler, epoch) for sampler in (first, second) for epoch in (0, 1)]
    assert len({tuple(order) for order in draws}) == 4
    assert draw(first, 0) == draws[0]


def test_ranks_see_each_image_as_often_as_repeated():
    """As in DeiT, the copies of an image follow each other, so that three ranks get one each."""
    draws = [draw(SeededRepeatAugSampler(range(60), num_replicas=3, rank=rank, seed=4), 0) for rank in range(3)]
    assert draws[0] == draws[1] == draws[2]
    draws = [draw(SeededRepeatAugSampler(range(60), num_replicas=2, rank=rank, seed=4), 0) for rank in range(2)]
    everything = sorted(draws[0] + draws[1])
    assert len(everything) == 60
    assert max(everything.count(image) for image in everything) == 3


def samples_of(data, epoch, step=0):
    """The samples of all batches from a step on."""
    data.batches(epoch, step)
    return [sample for batch in data.train.batch_sampler for sample in batch]


@pytest.mark.parametrize("flags", [("--repeated-aug", "--aug-repeats", 2), ("--no-repeated-aug",)])
def test_the_order_of_a_run_follows_seed_and_epoch(flags):
    orders = {}
    for seed in (0, 7):
        data = build("--data-set", "DIGITS", "--seed", seed, *flags)
        for epoch in (0, 1, 0):
            order = [(sample.index, sample.repeat) for sample in samples_of(data, epoch)]
            orders.setdefault((seed, epoch), []).append(tuple(order))
    assert all(len(set(draws)) == 1 for draws in orders.values())
    assert len({draws[0] for draws in orders.values()}) == 4
    if "--aug-repeats" in flags:
        (first, a), (second, b), (third, c) = orders[0, 0][0][:3]
        assert first == second != third and (a, b, c) == (0, 1, 0)
    else:
        assert {repeat for _, repeat in orders[0, 0][0]} == {0}


@pytest.mark.parametrize("repeats", [("--no-repeated-aug",), (), ("--aug-repeats", 2)])
@pytest.mark.parametrize("length", [LENGTH, 102])
@pytest.mark.parametrize("order", ["--no-repeats-together", "--repeats-together"])
def test_a_global_batch_has_the_same_samples_on_any_number_of_ranks(repeats, length, order):
    words = ("--data-set", "DIGITS", *repeats, order)
    steps = {}
    for ranks, batch, accumulated in ((1, 24, 1), (1, 12, 2), (2, 12, 1), (3, 8, 1), (2, 4, 3), (3, 4, 2)):
        flags = (*words, "--batch-size", batch, "--accum-steps", accumulated)
        loaders = [build(*flags, rank=rank, size=ranks) for rank in range(ranks)]
        [num_steps] = {data.num_steps for data in loaders}
        of_ranks = [samples_of(data, 3) for data in loaders]
        size = batch * accumulated
        assert all(len(samples) == size * num_steps for samples in of_ranks)
        steps[ranks, batch, accumulated] = [
            sorted(sample for samples in of_ranks for sample in samples[step * size : (step + 1) * size])
            for step in range(num_steps)
        ]
    assert len(steps[1, 24, 1]) == {LENGTH: 13 if repeats == ("--no-repeated-aug",) else 10, 102: 4}[length]
    assert all(samples == steps[1, 24, 1] for samples in steps.values())


@pytest.mark.parametrize("repeats", [1, 2, 3])
@pytest.mark.parametrize("length", [LENGTH, 102])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_draw_what_timms_and_torchs_samplers_give_them(repeats, length, size):
    words = ["--data-set", "DIGITS", "--batch-size", 6, "--seed", 5]
    words += ["--aug-repeats", repeats] if repeats > 1 else ["--no-repeated-aug"]
    for rank in range(size):
        data = build(*words, rank=rank, size=size)
        split = {"num_replicas": size, "rank": rank, "seed": 5}
        if repeats > 1:
            sampler = SeededRepeatAugSampler(data.train.dataset, num_repeats=repeats, **split)
        else:
            sampler = DistributedSampler(data.train.dataset, **split)
        drawn = [sample.index for sample in samples_of(data, 4)]
        assert len(drawn) == data.num_steps * 6
        assert drawn == draw(sampler, 4)[: len(drawn)]


def test_repeats_together_follow_each_other_on_one_rank():
    words = ("--data-set", "DIGITS", "--batch-size", 6, "--aug-repeats", 3, "--repeats-together")
    order = samples_of(build(*words, "--batch-size", 12), 1)
    for rank in range(2):
        mine = samples_of(build(*words, rank=rank, size=2), 1)
        assert mine == [sample for batch in range(len(mine) // 6) for sample in order[batch * 12 + rank * 6 :][:6]]
        assert all(len({sample.index for sample in mine[i : i + 3]}) == 1 for i in range(0, len(mine), 3))
        assert [sample.repeat for sample in mine] == [0, 1, 2] * (len(mine) // 3)


def test_an_epoch_can_start_at_any_step():
    data = build("--data-set", "DIGITS", "--batch-size", 8, "--accum-steps", 3)
    every = samples_of(data, 2)
    for step in (0, 1, 7, data.num_steps):
        assert samples_of(data, 2, step) == every[step * 24 :]
    data.batches(2, 7)
    assert data.step_images(1) == f"images number {', '.join(str(sample.index) for sample in every[24:48])}"


def test_less_than_one_step_of_images_is_refused(tmp_path):
    words = ("--data-set", "IMNET", "--data-path", make_image_folder(tmp_path, n=5), "--no-repeated-aug")
    with pytest.raises(SystemExit, match="has 10 images, less than the 12 of one step"):
        build(*words, "--batch-size", 2, "--accum-steps", 3, size=2)


def test_plain_sampler_shows_ranks_disjoint_images():
    orders = [samples_of(build("--data-set", "DIGITS", "--no-repeated-aug", rank=r, size=3), 0) for r in range(3)]
    assert len(set().union(*orders)) == sum(map(len, orders)) == LENGTH // 6 * 6
