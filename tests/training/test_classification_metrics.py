"""Measures of classification against double loops, scikit-learn and timm, published numbers, and closed forms."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, log_loss, recall_score, top_k_accuracy_score
from timm.data import RealLabelsImagenet

from training import classification_metrics as metrics
from training.classification_metrics import ConfusionPair, ImageResults

ALEXNET = """
gaussian_noise 0.69528 0.82542 0.93554 0.98138 0.99452
shot_noise 0.71224 0.85108 0.93574 0.98182 0.99146
impulse_noise 0.78374 0.89808 0.9487 0.9872 0.99548
defocus_blur 0.65624 0.73202 0.85036 0.91364 0.94714
glass_blur 0.64308 0.75054 0.88806 0.91622 0.93344
motion_blur 0.5843 0.70048 0.82108 0.8975 0.92638
zoom_blur 0.70008 0.76992 0.80784 0.84198 0.87198
snow 0.71726 0.88392 0.86468 0.9187 0.94952
frost 0.6139 0.79734 0.8879 0.89942 0.9343
fog 0.67474 0.7605 0.84378 0.8726 0.945
brightness 0.4514 0.48502 0.54048 0.62166 0.7244
contrast 0.64548 0.7615 0.88874 0.9776 0.9927
elastic_transform 0.52596 0.70116 0.55686 0.64076 0.80554
pixelate 0.52218 0.5462 0.73728 0.87092 0.91262
jpeg_compression 0.51002 0.54718 0.57294 0.65458 0.74778
"""
"""AlexNet's published errors of each severity; the program has another publication's means."""
ERRORS = {name: [100 * float(error) for error in rest] for name, *rest in map(str.split, ALEXNET.split("\n")[1:-1])}


def made(n=400, classes=7, seed=0):
    """Labels [n] and probabilities [n, classes] of a made classifier that is right more often than chance."""
    random = np.random.RandomState(seed)
    labels = random.randint(0, classes - 1, n)  # no image of the last class
    logits = 2 * random.standard_normal((n, classes)) + 2 * np.eye(classes)[labels]
    return labels, np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def results_of(labels, probs):
    """What `ImageResults` says about these probabilities, image by image."""
    rows = []
    for label, row in zip(labels, probs, strict=True):
        order = sorted(range(len(row)), key=lambda i: -row[i])
        rows.append((order[0], row[order[0]], label in order[:5], -math.log(row[label])))
    return ImageResults(*map(np.array, zip(*rows, strict=True)))


def textbook_ece(confidence, is_right, num_bins):
    """Bin by bin, with the edges of the reference implementation: above the lower one, up to the upper one."""
    total, edges = 0.0, np.linspace(0, 1, num_bins + 1)
    for low, high in itertools.pairwise(edges):
        inside = [i for i in range(len(confidence)) if low < confidence[i] <= high]
        if inside:
            accuracy = sum(bool(is_right[i]) for i in inside) / len(inside)
            mean = sum(float(confidence[i]) for i in inside) / len(inside)
            total += len(inside) / len(confidence) * abs(accuracy - mean)
    return 100 * total


@pytest.mark.parametrize("num_bins", [1, 10, 15])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_calibration_error_is_the_textbooks(num_bins, dtype):
    labels, probs = made()
    confidence = np.concatenate([probs.max(1), [1.0, 1 / 7, 0.5, 0.2, 0.6]]).astype(dtype)  # also on edges of bins
    is_right = np.concatenate([probs.argmax(1) == labels, [True, False, True, False, True]])
    expected = textbook_ece(confidence, is_right, num_bins)
    assert expected > 1
    assert metrics.expected_calibration_error(confidence, is_right, num_bins) == pytest.approx(expected, rel=1e-12)


def test_calibration_in_closed_form():
    """Perfect calibration is 0; a constant confidence is the distance from the accuracy."""
    confidence, is_right = [], []
    for right in range(1, 10):  # in a bin with confidence k/10, k of 10 predictions are right
        confidence += [right / 10] * 10
        is_right += [i < right for i in range(10)]
    assert metrics.expected_calibration_error(confidence, is_right) == pytest.approx(0, abs=1e-12)
    half = [True, False] * 4
    assert metrics.expected_calibration_error([0.75] * 8, half) == pytest.approx(25)
    assert metrics.expected_calibration_error([1.0] * 8, half) == 50
    assert metrics.expected_calibration_error([1.0] * 8, [False] * 8) == 100
    assert metrics.expected_calibration_error([1.0] * 8, [True] * 8) == 0


def test_an_upper_edge_belongs_to_its_bin():
    """With 0.5 in the lower of two bins, each bin has one image; in one bin the errors would cancel."""
    assert metrics.expected_calibration_error([0.5, 0.5 + 1e-6], [True, False], 2) == pytest.approx(50, rel=1e-5)
    assert metrics.expected_calibration_error([0.5, 0.5 - 1e-6], [True, False], 2) == pytest.approx(0, abs=1e-4)


def test_sums_of_parts_add_up():
    labels, probs = made()
    confidence, is_right = torch.tensor(probs.max(1)), torch.tensor(probs.argmax(1) == labels)
    parts = zip(confidence.split(33), is_right.split(33), strict=True)
    sums = sum(metrics.calibration_sums(*part) for part in parts)
    assert sums.shape == (15, 3) and sums.dtype == torch.float64
    assert sums.sum(0).tolist() == pytest.approx([400, confidence.sum().item(), is_right.sum().item()])
    assert metrics.calibration_error(sums) == pytest.approx(textbook_ece(confidence, is_right, 15), rel=1e-12)


def test_a_number_that_is_not_known_is_nan():
    """Also that of a model whose probabilities are NaN: it is not left out of the mean."""
    assert math.isnan(metrics.expected_calibration_error([], []))
    assert math.isnan(metrics.expected_calibration_error([0.5, math.nan], [True, False]))
    assert math.isnan(metrics.real_accuracy([1], [[]])[0])


def test_the_summary_is_scikit_learns():
    labels, probs = made()
    found = metrics.summary(labels, results_of(labels, probs))
    assert found["images"] == 400
    assert found["acc1"] == pytest.approx(100 * accuracy_score(labels, probs.argmax(1)))
    assert found["acc5"] == pytest.approx(100 * top_k_accuracy_score(labels, probs, k=5, labels=range(7)))
    assert found["loss"] == pytest.approx(log_loss(labels, probs, labels=range(7)))
    assert found["ece"] == pytest.approx(textbook_ece(probs.max(1), probs.argmax(1) == labels, 15))
    assert metrics.summary(labels, ImageResults(probs.argmax(1))) == {"images": 400, "acc1": found["acc1"]}


def test_accuracies_of_classes_are_scikit_learns_recalls():
    labels, probs = made()
    predicted = probs.argmax(1)
    of_classes = metrics.class_accuracies(labels, predicted, 7)
    recalls = recall_score(labels, predicted, labels=range(7), average=None, zero_division=np.nan)
    assert of_classes.accuracy == pytest.approx(100 * recalls, nan_ok=True) and np.isnan(of_classes.accuracy[6])
    counts = confusion_matrix(labels, predicted, labels=range(7))
    assert [*of_classes.images] == [*counts.sum(1)] and [*of_classes.correct] == [*counts.diagonal()]


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_that_is_no_class_is_refused(label):
    with pytest.raises(ValueError, match=f"labels are from {min(label, 0)} to {max(label, 0)}, but there are 3"):
        metrics.class_accuracies([0, label], [0, 1], 3)


def test_confused_pairs_are_the_largest_entries_of_the_confusion_matrix():
    labels, probs = made()
    predicted = probs.argmax(1)
    counts = confusion_matrix(labels, predicted, labels=range(7))
    pairs = metrics.confusion_pairs(labels, predicted, None)
    assert len(pairs) == sum(counts[i, j] > 0 for i in range(7) for j in range(7) if i != j)
    for pair in pairs:
        assert pair.label != pair.predicted and pair.count == counts[pair.label, pair.predicted]
        assert pair.fraction == pytest.approx(100 * pair.count / counts[pair.label].sum())
    assert [pair.count for pair in pairs] == sorted((pair.count for pair in pairs), reverse=True)
    assert (
        metrics.confusion_pairs(labels, predicted, 3) == pairs[:3]
        and len(metrics.confusion_pairs(labels, predicted)) == 20
    )


def test_equal_counts_are_in_the_order_of_fractions_then_of_classes():
    labels, predicted = [0, 0, 1, 1, 2, 2, 2, 3], [1, 2, 0, 1, 0, 2, 0, 2]
    assert metrics.confusion_pairs(labels, predicted) == [
        ConfusionPair(2, 0, 2, pytest.approx(200 / 3)),
        ConfusionPair(3, 2, 1, 100),
        ConfusionPair(0, 1, 1, 50),
        ConfusionPair(0, 2, 1, 50),
        ConfusionPair(1, 0, 1, 50),
    ]
    assert metrics.confusion_pairs([1, 2], [1, 2]) == metrics.confusion_pairs([], []) == []


def test_real_labels_are_timms(tmp_path):
    random = np.random.RandomState(0)
    logits = torch.tensor(random.standard_normal((60, 10)))
    labels = [random.choice(10, random.randint(0, 4), replace=False).tolist() for _ in range(60)]
    (tmp_path / "real.json").write_text(json.dumps(labels))
    names = [f"folder/ILSVRC2012_val_{i + 1:08d}.JPEG" for i in range(60)]
    timms = RealLabelsImagenet(names, tmp_path / "real.json")
    timms.add_result(logits)
    accuracy, images = metrics.real_accuracy(logits.argmax(1).numpy(), labels)
    assert accuracy == pytest.approx(timms.get_accuracy(1))
    assert images == sum(map(bool, labels)) < 60
    with pytest.raises(ValueError, match="60 predictions, and labels of 59 images"):
        metrics.real_accuracy(logits.argmax(1).numpy(), labels[1:])


def test_alexnets_corruption_errors_are_100():
    assert metrics.corruption_errors(ERRORS) == pytest.approx(dict.fromkeys(ERRORS, 100), rel=1e-6)
    assert len(ERRORS) == 15 and metrics.mean_corruption_error(ERRORS) == pytest.approx(100, rel=1e-6)


def test_mean_corruption_error_is_the_mean_of_ratios_of_sums():
    factors = {name: 0.2 + 0.05 * i for i, name in enumerate(ERRORS)}
    scaled = {name: [factors[name] * error for error in errors] for name, errors in ERRORS.items()}
    expected = 100 * sum(factors.values()) / 15
    assert metrics.mean_corruption_error(scaled) == pytest.approx(expected, rel=1e-6)
    flat = {name: [50] * 5 for name in ERRORS}
    expected = sum(100 * 250 / sum(errors) for errors in ERRORS.values()) / 15
    assert metrics.mean_corruption_error(flat) == pytest.approx(expected, rel=1e-6)


def test_an_incomplete_mean_corruption_error_is_refused():
    part = {name: errors for name, errors in ERRORS.items() if name not in ("fog", "snow")}
    with pytest.raises(ValueError, match="15 corruptions; snow, fog is missing"):
        metrics.mean_corruption_error(part)
    assert len(metrics.corruption_errors(part)) == 13
    with pytest.raises(ValueError, match="fog has errors of 4 severities"):
        metrics.mean_corruption_error(ERRORS | {"fog": [1, 2, 3, 4]})
    with pytest.raises(ValueError, match="speckle_noise is no corruption that mCE is of"):
        metrics.mean_corruption_error(ERRORS | {"speckle_noise": [1] * 5})
