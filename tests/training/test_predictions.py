"""`--save-predictions`: one prediction for each validation image, whatever the number of ranks, or one line."""

import errno
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data_files import write_webdataset
from helpers import TINY, data_options, few_digits, log_of, model_of, parse, run_main, world
from ranks import run_ranks

from datasets import build_data
from models import build_model
from training.classification_metrics import ImageResults, summary
from training.evaluation import evaluate_both
from training.predictions import Predictions, read_predictions, results_of
from utils import World

FLAGS = (
    *(*TINY, "--lr", "1e-3", "--unscale-lr", "--warmup-epochs", "0", "--model-ema-decay", "0.9"),
    *("--no-repeated-aug", "--save-predictions", "--resume", "auto"),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with predictions of many classes; two ranks have unequal numbers of its validation images."""
    folder = tmp_path_factory.mktemp("trained")
    weights = model_of(num_classes=10).state_dict()
    for name in ("head.weight", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.attn.proj.weight"):
        weights[name] *= 30  # so that the classes depend on the images
    torch.save(weights, folder / "weights.pth")
    with few_digits(165):
        run_main(*FLAGS, "--finetune", folder / "weights.pth", "--output-dir", folder / "run")
        yield folder / "run"


def test_predictions_are_those_of_the_last_weights_in_the_order_of_the_images(trained):
    saved = read_predictions(trained)
    (start,) = json.loads((trained / "environment.json").read_text())
    assert (saved["val_digest"], saved["epoch"]) == (start["data"]["val_digest"], 0)
    assert [*saved["image"]] == [*range(33)]
    args = parse()
    model = build_model(args.model, 10, args.input_size, args.patch_size, **args.model_kwargs).eval()
    stored = torch.load(trained / "checkpoint.pth", weights_only=True)
    images, labels = map(torch.cat, zip(*build_data(data_options(), world()).val, strict=True))
    assert np.array_equal(saved["label"], labels)
    for name, weights, accuracy in (("raw", "model", "test_acc1"), ("ema", "model_ema", "test_acc1_ema")):
        model.load_state_dict(stored[weights])
        with torch.no_grad():
            logits = model(images).double()
        assert np.array_equal(saved[name], logits.argmax(1))
        (ours, probs) = results_of(saved)[name], logits.softmax(dim=1)
        assert ours.confidence == pytest.approx(probs.amax(1).numpy(), rel=1e-5)
        assert ours.loss == pytest.approx(-probs[range(33), labels].log().numpy(), rel=1e-5)
        assert [*ours.in_top5] == [label in row[:5] for label, row in zip(labels, logits.argsort(1, True), strict=True)]
        assert 5 < sum(ours.in_top5) < 33
        assert 100 * (saved[name] == saved["label"]).mean() == pytest.approx(log_of(trained)[-1][accuracy])
        assert len({*saved[name]}) > 2  # a test of the order needs several
    assert not np.array_equal(saved["raw"], saved["ema"])


def test_two_ranks_save_the_file_of_one_and_a_finished_run_gets_it(trained):
    before = read_predictions(trained)
    (trained / "predictions.npz").unlink()
    flags = (*FLAGS, "--finetune", trained.parent / "weights.pth", "--output-dir", trained)
    result = run_ranks(2, "main.py", *flags, "--batch-size", 8)
    assert result.returncode == 0, result.stderr
    after = read_predictions(trained)
    assert [*after] == [*before]
    for name, values in before.items():  # a smaller batch may round otherwise
        assert after[name].dtype == values.dtype
        is_float = values.dtype == np.float32
        assert np.allclose(after[name], values, rtol=1e-5) if is_float else np.array_equal(after[name], values), name
    assert len(log_of(trained)) == 1 and (trained / "summary.json").exists()


def results(*classes):
    """Results of images with these predicted classes; the other fields say which image it is."""
    values = torch.tensor(classes, dtype=torch.float32)
    return ImageResults(torch.tensor(classes), values / 10, values > 4, values / 4)


def of_process(monkeypatch, names, count=None):
    """The values that `Predictions.gather` gets from the main process, where no group exists: sums are its own."""
    types = {name: {"confidence": torch.float32, "loss": torch.float32}.get(name.partition("_")[2], torch.int64)
             for name in names}  # fmt: skip
    monkeypatch.setattr(World, "from_main", lambda world, value: count if isinstance(value, int) else types)
    monkeypatch.setattr(World, "sum", lambda world, values: values)


NAMES = ("label", "raw", "raw_confidence", "raw_in_top5", "raw_loss")


def test_where_every_rank_evaluates_all_images_the_main_one_is_saved(monkeypatch):
    data = SimpleNamespace(val_numbers=range(3), val_is_shared=False, is_stream=False)
    ranks = [Predictions(data, world(rank, 2)) for rank in range(2)]
    for rank, predictions in enumerate(ranks):
        predictions.add(torch.tensor([1, 2]), {"": results(4, 5 + rank)})
        predictions.add(torch.tensor([3]), {"": results(6)})
    of_process(monkeypatch, NAMES)
    (main, other) = [predictions.gather() for predictions in ranks]
    assert [[*main[name]] for name in ("image", "label", "raw")] == [[0, 1, 2], [1, 2, 3], [4, 5, 6]]
    assert [*main["raw_confidence"]] == [*np.float32([0.4, 0.5, 0.6])] and [*main["raw_loss"]] == [1, 1.25, 1.5]
    assert [*main["raw_in_top5"]] == [False, True, True] and main["raw_in_top5"].dtype == bool
    assert not any(other[name].any() for name in NAMES)


def test_images_of_a_stream_are_numbered_as_they_come(monkeypatch):
    data = SimpleNamespace(val_is_shared=False, is_stream=True)
    ranks = [Predictions(data, world(rank, 2)) for rank in range(2)]
    for predictions, count in zip(ranks, (3, 2), strict=True):  # ranks may read unequal numbers
        predictions.add(torch.arange(count), {"": results(*range(4, 4 + count))})
    of_process(monkeypatch, NAMES, count=3)
    (main, other) = [predictions.gather() for predictions in ranks]
    assert [*main["image"]] == [*other["image"]] == [0, 1, 2] and [*main["raw"]] == [4, 5, 6]
    assert not other["raw"].any()


def test_results_of_a_stream_are_those_of_its_evaluation(tmp_path):
    words = write_webdataset(tmp_path, train=[4], validation=[3, 4])
    data = build_data(data_options(*words, "--num-classes", 7, "--batch-size", 2), world())
    predictions = Predictions(data, world())
    stats = evaluate_both(model_of(), None, data, world(), predictions=predictions)
    arrays = predictions.gather()
    assert [*arrays["image"]] == [*range(7)]
    found = summary(arrays["label"], results_of(arrays)["raw"])
    assert found.keys() <= stats.keys()
    assert found == pytest.approx({name: stats[name] for name in found}, rel=1e-5)


def test_a_rank_without_an_image_takes_part(monkeypatch):
    data = SimpleNamespace(val_numbers=range(1), val_is_shared=True, is_stream=False)
    of_process(monkeypatch, NAMES)
    gathered = Predictions(data, world(1, 2)).gather()
    assert {name: [*values] for name, values in gathered.items()} == {name: [0] for name in ("image", *NAMES)}


def test_a_full_disk_is_one_line_and_the_next_start_writes_the_file(tmp_path, monkeypatch):
    flush = os.fsync

    def full(number):
        if os.readlink(f"/proc/self/fd/{number}").endswith("predictions.npz.tmp"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(number)

    flags = (*FLAGS, "--epochs", 2, "--no-model-ema", "--output-dir", tmp_path)
    with few_digits():
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
            patch.setattr(os, "fsync", full)
            run_main(*flags)
        assert caught.value.code == (
            f"error: {tmp_path} cannot be written: No space left on device; the run is saved, start again with "
            "--resume auto"
        )
        assert not {"predictions.npz", "predictions.npz.tmp", "summary.json"} & {*os.listdir(tmp_path)}
        run_main(*flags)
    assert {*read_predictions(tmp_path)} == {"val_digest", "epoch", "image", *NAMES}
    assert (tmp_path / "summary.json").exists()


def test_an_evaluation_of_such_a_run_does_not_save_predictions(trained, refused):
    run_main("--eval", "--device", "cpu", "--resume", trained / "checkpoint.pth")
    words = ("--eval", "--resume", trained / "checkpoint.pth", "--save-predictions")
    assert "--save-predictions belongs to training and to --eval-sets; leave it out with --eval alone" in refused(
        *words
    )


def test_a_stream_is_refused(refused):
    line = refused("--data-set", "wds/x", "--num-classes", 2, "--data-path", "x", "--save-predictions")
    assert "--save-predictions needs images with numbers, but --data-set wds/x streams" in line


def test_a_file_of_an_earlier_version_has_the_classes_alone(tmp_path):
    arrays = {"label": [1, 2, 3], "raw": [1, 2, 2], "ema": [1, 1, 1], "image": [0, 1, 2], "val_digest": "", "epoch": 0}
    np.savez(tmp_path / "predictions.npz", **arrays)
    saved = read_predictions(tmp_path)
    found = {kind: summary(saved["label"], results) for kind, results in results_of(saved).items()}
    assert found["raw"] == pytest.approx({"images": 3, "acc1": 200 / 3})
    assert found["ema"] == pytest.approx({"images": 3, "acc1": 100 / 3})


@pytest.mark.parametrize(("content", "words"), [(b"PK\x03\x04", "cannot be read"), (b"", "cannot be read")])
def test_a_damaged_file_is_refused(content, words, tmp_path):
    (tmp_path / "predictions.npz").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_predictions(tmp_path)
    assert read_predictions(tmp_path / "other") is None


def test_a_file_of_another_program_is_refused(tmp_path):
    np.savez(tmp_path / "predictions.npz", raw=np.zeros(3), label=np.zeros(3))
    with pytest.raises(ValueError, match="has no epoch, image, val_digest"):
        read_predictions(tmp_path)
