"""Measures of classification from the results of single images: accuracies, calibration, classes, confusions.

Arrays are of numpy or torch, one entry for each image, on the CPU; only `calibration_sums` also works on a GPU. All
accuracies and errors are in percent. Without an image a mean is NaN.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

NUM_BINS = 15
"""Bins of the confidence, as in Guo et al. 2017."""

ALEXNET_ERRORS = {
    **{"gaussian_noise": 88.6428, "shot_noise": 89.4468, "impulse_noise": 92.2640, "defocus_blur": 81.9880},
    **{"glass_blur": 82.6268, "motion_blur": 78.5948, "zoom_blur": 79.8360, "snow": 86.6816, "frost": 82.6572},
    **{"fog": 81.9324, "brightness": 56.4592, "contrast": 85.3204, "elastic_transform": 64.6056},
    **{"pixelate": 71.7840, "jpeg_compression": 60.6500},
}
"""{corruption of ImageNet-C: top-1 error of AlexNet in percent, the mean of severities 1 to 5}, as its authors publish
them with their code (hendrycks/robustness)."""


class ImageResults(NamedTuple):
    """What a model predicts for each of n images; tensors of a batch, or numpy arrays of a set.

    Attributes:
        predicted: the class of the largest logit [n].
        confidence: its softmax probability [n]; None where a file of an earlier version has none, as the next two.
        in_top5: whether the label is among the classes of the five largest logits, or among all if there are fewer [n].
        loss: the cross-entropy in nats [n].
    """

    predicted: torch.Tensor | np.ndarray
    confidence: torch.Tensor | np.ndarray | None = None
    in_top5: torch.Tensor | np.ndarray | None = None
    loss: torch.Tensor | np.ndarray | None = None


class ClassAccuracies(NamedTuple):
    """Accuracies by the true class, each [C].

    Attributes:
        images: with this label.
        correct: of them, predicted correctly.
        accuracy: in percent; NaN for a class without images.
    """

    images: np.ndarray
    correct: np.ndarray
    accuracy: np.ndarray


class ConfusionPair(NamedTuple):
    """Images of one class that are predicted as another one.

    Attributes:
        label, predicted: the two classes.
        count: of images.
        fraction: of the images of class `label`, in percent.
    """

    label: int
    predicted: int
    count: int
    fraction: float


def summary(label: np.ndarray, results: ImageResults) -> dict[str, float]:
    """images, and acc1, acc5 and ece in percent and loss in nats; only images and acc1 where the rest is not known."""
    is_right = np.asarray(results.predicted) == np.asarray(label)
    values = {"images": len(is_right), "acc1": _percent(is_right)}
    if results.confidence is not None:
        values["acc5"] = _percent(results.in_top5)
        values["loss"] = _mean(results.loss)
        values["ece"] = expected_calibration_error(results.confidence, is_right)
    return values


def expected_calibration_error(confidence, is_right, num_bins: int = NUM_BINS) -> float:
    """The mean distance between confidence and accuracy, in percent (ECE).

    The images are divided by their confidence into bins of equal width, ((m - 1)/M, m/M] for m = 1 to M. With n_m of n
    images in bin m: sum over m of n_m / n * |accuracy of the bin - mean confidence of the bin|. It is 0 if, in every
    bin, the fraction of correct predictions is the mean confidence, and 100 if all predictions are certain and wrong.

    Args:
        confidence: softmax probability of the predicted class [n], from 0 to 1.
        is_right: whether the prediction is correct [n].

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3; M = 15 as there.
    """
    confidence, is_right = (torch.as_tensor(np.asarray(values)) for values in (confidence, is_right))
    return calibration_error(calibration_sums(confidence, is_right, num_bins))


def calibration_sums(confidence: torch.Tensor, is_right: torch.Tensor, num_bins: int = NUM_BINS) -> torch.Tensor:
    """For each bin of the confidence its images, the sum of their confidences, and how many are right [M, 3] float64.

    Sums of batches and of processes may be added. The host does not wait for a GPU.
    """
    confidence = confidence.double()
    bins = ((confidence * num_bins).ceil() - 1).clamp(min=0)  # NaN remains NaN, and makes every sum NaN
    is_in = (bins[:, None] == torch.arange(num_bins, device=bins.device)).double()
    return is_in.T @ torch.stack([torch.ones_like(confidence), confidence, is_right.double()], dim=1)


def calibration_error(sums) -> float:
    """The ECE in percent from `calibration_sums`; NaN without an image, or if a confidence is NaN."""
    images, confidence, right = torch.as_tensor(sums, dtype=torch.float64).T
    return (100 * (right - confidence).abs().sum() / images.sum()).item()


def class_accuracies(label, predicted, num_classes: int) -> ClassAccuracies:
    """The accuracy of each class: the fraction of the images with this label that are predicted correctly.

    Raises:
        ValueError: a label is not a number from 0 to `num_classes` - 1.
    """
    label, predicted = np.asarray(label), np.asarray(predicted)
    if len(label) and (label.min() < 0 or label.max() >= num_classes):
        raise ValueError(f"labels are from {label.min()} to {label.max()}, but there are {num_classes} classes")
    images = np.bincount(label, minlength=num_classes)
    correct = np.bincount(label[label == predicted], minlength=num_classes)
    accuracy = np.full(num_classes, math.nan)
    np.divide(100 * correct, images, out=accuracy, where=images > 0)
    return ClassAccuracies(images, correct, accuracy)


def confusion_pairs(label, predicted, limit: int | None = 20) -> list[ConfusionPair]:
    """The pairs of classes that are confused most often: by count, then by fraction, then in the order of the classes.

    A pair has a direction: images of one class that are predicted as another. `limit` is the number of pairs; None =
    all.
    """
    label, predicted = np.asarray(label), np.asarray(predicted)
    wrong = label != predicted
    both = np.stack([label[wrong], predicted[wrong]], axis=1)
    pairs, counts = np.unique(both, axis=0, return_counts=True)
    images = dict(zip(*map(np.ndarray.tolist, np.unique(label, return_counts=True)), strict=True))
    found = [
        ConfusionPair(true, guess, count, 100 * count / images[true])
        for (true, guess), count in zip(pairs.tolist(), counts.tolist(), strict=True)
    ]
    return sorted(found, key=lambda pair: (-pair.count, -pair.fraction, pair.label, pair.predicted))[:limit]


def real_accuracy(predicted, labels: Sequence[Sequence[int]]) -> tuple[float, int]:
    """The accuracy in percent where an image may have several labels, such as ReaL's, and the images that it is of.

    A prediction is correct if it is one of the labels of its image. Images without a label are left out.

    Raises:
        ValueError: there is not one entry of `labels` for each prediction.

    Source: Beyer et al. 2020, "Are we done with ImageNet?", section 3.
    """
    if len(predicted) != len(labels):
        raise ValueError(f"there are {len(predicted)} predictions, and labels of {len(labels)} images")
    hits = [guess in of_image for guess, of_image in zip(predicted, labels, strict=True) if len(of_image)]
    return _percent(hits), len(hits)


def corruption_errors(errors: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The corruption errors of ImageNet-C in percent, {corruption: CE}: 100 is AlexNet's, lower is better.

    CE = 100 * (sum over the severities of the model's top-1 error) / (the same sum of AlexNet). Their mean over the 15
    corruptions is `mean_corruption_error`.

    Args:
        errors: {corruption: top-1 errors in percent of severities 1 to 5}.

    Raises:
        ValueError: a corruption is not one of `ALEXNET_ERRORS`, or has not five errors.

    Source: Hendrycks and Dietterich 2019, "Benchmarking Neural Network Robustness to Common Corruptions and
    Perturbations", section 4.
    """
    for name, of_severities in errors.items():
        if name not in ALEXNET_ERRORS:
            raise ValueError(f"{name} is no corruption that mCE is of; they are {', '.join(ALEXNET_ERRORS)}")
        if len(of_severities) != 5:
            raise ValueError(f"{name} has errors of {len(of_severities)} severities; mCE needs all five")
    return {name: 100 * _mean(of_severities) / ALEXNET_ERRORS[name] for name, of_severities in errors.items()}


def mean_corruption_error(errors: Mapping[str, Sequence[float]]) -> float:
    """The mean of `corruption_errors` over all 15 corruptions in percent (mCE); AlexNet's is 100.

    Raises:
        ValueError: a corruption or a severity is missing, or is unknown.
    """
    if missing := [name for name in ALEXNET_ERRORS if name not in errors]:
        raise ValueError(f"mCE is the mean of {len(ALEXNET_ERRORS)} corruptions; {', '.join(missing)} is missing")
    return _mean([*corruption_errors(errors).values()])


def _mean(values) -> float:
    values = np.asarray(values, dtype=np.float64)
    return values.mean().item() if len(values) else math.nan


def _percent(is_right) -> float:
    return 100 * _mean(is_right)
