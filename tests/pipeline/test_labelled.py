"""Samples of labelled images: spread over the classes, in a random order that the seed decides."""

import collections

import numpy as np
from helpers import data_options, make_image_folder
from torchvision.datasets import FakeData

from pipeline.labelled import known_labels, spread_sample
from pipeline.opening import build_source

LABELS = [0] * 50 + [1] * 30 + [2] * 3 + [3] * 17


def counts(chosen):
    return [collections.Counter(LABELS[i] for i in chosen)[label] for label in range(4)]


def test_classes_have_equally_many_images_while_they_have_any():
    assert counts(spread_sample(LABELS, 100, 12, 0)) == [3, 3, 3, 3]
    assert counts(spread_sample(LABELS, 100, 33, 0)) == [10, 10, 3, 10]
    assert sorted(counts(spread_sample(LABELS, 100, 35, 0))) == [3, 10, 11, 11]
    for count in (0, 100, 1000):
        assert sorted(spread_sample(LABELS, 100, count, 0)) == [*range(100)]


def test_the_order_is_random_and_repeatable():
    chosen = spread_sample(LABELS, 100, 60, 0)
    assert chosen == spread_sample(LABELS, 100, 60, 0) != spread_sample(LABELS, 100, 60, 1)
    assert len({*chosen}) == 60
    labels = np.array([LABELS[i] for i in chosen])
    assert (labels[1:] != labels[:-1]).sum() > 10  # neither sorted nor one class after the other
    assert (labels[:30] == 0).any() and (labels[30:] == 0).any()


def test_labels_that_are_not_known_give_a_plain_sample():
    chosen = spread_sample(None, 100, 10, 0)
    assert len({*chosen}) == 10 and max(chosen) < 100 and chosen != sorted(chosen)


def test_data_sets_that_know_their_labels(tmp_path):
    make_image_folder(tmp_path, n=3)
    folder = build_source(data_options("--data-set", "IMNET", "--data-path", tmp_path), is_training=True)
    assert known_labels(folder) == [0, 0, 0, 1, 1, 1]
    digits = build_source(data_options(), is_training=False)
    assert known_labels(digits) == [digits[i][1] for i in range(len(digits))]
    assert known_labels(FakeData(8, (3, 4, 4), 2)) is None
