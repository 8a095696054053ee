"""examples/hf_trainer.py: training, logs, files, resuming, accumulation, precision, checkpointing, evaluation."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from example_programs import EXACT_COEFS, load_example, weights
from ranks import run_ranks

import diversity

transformers = pytest.importorskip("transformers", reason="the extra [hf] is not installed")
pytest.importorskip("accelerate", reason="the extra [hf] is not installed")


@pytest.fixture(scope="module")
def example():
    return load_example("hf_trainer")


@pytest.fixture
def made(example):
    """A new model and the made images."""
    transformers.set_seed(0)
    labels = torch.randint(example.CLASSES, (64,))
    images = torch.randn(64, 3, 32, 32) + torch.randn(example.CLASSES, 3, 32, 32)[labels]
    data = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]
    config = transformers.ViTConfig(**example.SIZE, intermediate_size=192, num_labels=example.CLASSES)
    return SimpleNamespace(model=transformers.ViTForImageClassification(config), data=data, images=images)


def trainer_of(example, made, folder, coefs=EXACT_COEFS, mixup=None, **options):
    defaults = {"report_to": "none", "use_cpu": True, "num_train_epochs": 1, "per_device_train_batch_size": 16}
    defaults |= {"learning_rate": 1e-3, "disable_tqdm": True, "save_strategy": "no", "optim": "sgd"}
    metrics = options.pop("compute_metrics", None)
    args = transformers.TrainingArguments(str(folder), **(defaults | options))
    data = {"train_dataset": made.data, "eval_dataset": made.data, "compute_metrics": metrics}
    return example.DiverseTrainer(made.model, args, coefs, mixup, **data)


def train(example, made, folder, **options):
    trainer = trainer_of(example, made, folder, **options)
    trainer.train()
    return trainer


def test_training(example, tmp_path):
    trainer = example.main(str(tmp_path), epochs=3)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 3 and logs[-1]["loss"] < logs[0]["loss"]
    for log in logs:
        assert {f"term/{name}" for name in ("cls_ce", *example.COEFS)} <= log.keys()
        assert log["term/loss"] == pytest.approx(log["loss"], rel=1e-3)  # Trainer rounds
    evaluations = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert len(evaluations) == 3 and evaluations[-1] < evaluations[0]
    loaded, report = transformers.AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(weights(loaded), weights(trainer.model))


def test_label_smoothing_is_that_of_the_arguments(example, made, tmp_path):
    trainer = trainer_of(example, made, tmp_path, label_smoothing_factor=0.1)
    expected = diversity.DiverseLoss(made.model.train(), EXACT_COEFS, smoothing=0.1)
    inputs = {"pixel_values": made.images[:8], "labels": torch.stack([one["labels"] for one in made.data[:8]])}
    assert torch.equal(trainer.compute_loss(made.model, inputs), expected(*inputs.values())[0])


def test_evaluation_is_that_of_the_stock_model(example, made, tmp_path):
    seen = {}

    def metrics(predictions):
        seen["logits"] = predictions.predictions
        return {"accuracy": float(np.mean(predictions.predictions.argmax(1) == predictions.label_ids))}

    trainer = trainer_of(example, made, tmp_path, compute_metrics=metrics)
    found = trainer.evaluate()
    logits = made.model.eval()(made.images).logits.detach()
    labels = torch.stack([one["labels"] for one in made.data])
    assert found["eval_loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert found["eval_accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    np.testing.assert_allclose(seen["logits"], logits, atol=1e-5)


def test_accumulated_batches_are_one_batch(example, made, tmp_path):
    start = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    trainer = train(example, made, tmp_path, logging_steps=1)
    expected, losses = weights(made.model), [log["loss"] for log in trainer.state.log_history if "loss" in log]
    made.model.load_state_dict(start)
    options = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "logging_steps": 1}
    trainer = train(example, made, tmp_path, **options)
    torch.testing.assert_close(weights(made.model), expected, rtol=0, atol=1e-6)
    assert [log["loss"] for log in trainer.state.log_history if "loss" in log] == pytest.approx(losses, rel=1e-3)


@pytest.mark.slow
def test_checkpointing_changes_nothing(example, made, tmp_path):
    start = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    train(example, made, tmp_path)
    expected = weights(made.model)
    made.model.load_state_dict(start)
    train(example, made, tmp_path, gradient_checkpointing=True)
    torch.testing.assert_close(weights(made.model), expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_mixed_precision(example, made, tmp_path):
    before = weights(made.model)
    trainer = train(example, made, tmp_path, bf16=True, logging_steps=1, mixup=diversity.PatchMixup())
    assert all(np.isfinite(log["loss"]) for log in trainer.state.log_history if "loss" in log)
    assert weights(made.model).dtype == torch.float32 and not torch.equal(weights(made.model), before)


@pytest.mark.slow
def test_resuming(example, made, tmp_path):
    start = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    options = {"num_train_epochs": 2, "save_strategy": "epoch", "save_total_limit": 3}
    train(example, made, tmp_path, **options)
    expected = weights(made.model)
    made.model.load_state_dict(start)
    trainer = trainer_of(example, made, tmp_path, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert trainer.state.global_step == 8
    torch.testing.assert_close(weights(made.model), expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_best_model_is_loaded_at_the_end(example, made, tmp_path):
    options = {"num_train_epochs": 2, "save_strategy": "epoch", "eval_strategy": "epoch", "learning_rate": 0.01}
    options |= {"load_best_model_at_end": True, "greater_is_better": True}  # the loss: the worse of the two
    trainer = train(example, made, tmp_path, metric_for_best_model="eval_loss", **options)
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert losses[0] != losses[1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(max(losses), rel=1e-4)


@pytest.mark.slow
def test_two_processes(tmp_path):
    expected = run_ranks(1, "tests/ddp_hf_trainer.py", tmp_path / "one", 16)
    found = run_ranks(2, "tests/ddp_hf_trainer.py", tmp_path / "two", 8)
    assert expected.returncode == found.returncode == 0, expected.stderr + found.stderr
    lines = [json.loads(line) for text in (expected, found) for line in text.stdout.splitlines() if line[:2] == '{"']
    assert [line["processes"] for line in lines] == [1, 2, 2]
    of_one, *of_two = [torch.tensor(line["weights"]) for line in lines]
    assert torch.equal(*of_two)
    torch.testing.assert_close(of_two[0], of_one, rtol=0, atol=2e-6)
