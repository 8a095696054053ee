"""An evaluation on a GPU; `python benchmark.py gpu` runs and reports this test."""

from unittest import mock

import pytest
import torch
from steps import images, small_vit

from engine import evaluate
from training.classification_metrics import summary
from training.predictions import Predictions, results_of
from utils import World

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

ON_GPU = World(0, 1, 0, 1, torch.device("cuda:0"))


def test_an_evaluation_that_keeps_results_does_not_wait_between_batches():
    """After the first batch; a wait would raise. The kept results are those that it counts."""
    model = small_vit().cuda()
    batches = [tuple(tensor.cuda() for tensor in images(4, seed=seed)) for seed in range(4)]
    predictions = Predictions(mock.Mock(is_stream=True, val_is_shared=False), ON_GPU)

    def watched():
        for number, batch in enumerate(batches):
            torch.cuda.set_sync_debug_mode("error" if number else "default")
            yield batch
        torch.cuda.set_sync_debug_mode("default")

    try:
        stats = evaluate(model, watched(), ON_GPU, predictions=predictions)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    arrays = predictions.gather()
    found = summary(arrays["label"], results_of(arrays)["raw"])
    assert found == pytest.approx({name: stats[name] for name in found}, rel=1e-5)
