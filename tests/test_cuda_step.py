"""The training step, evaluation and save of a GPU, on fake CUDA tensors: devices agree, and the host does not wait.

This cannot show what torch.compile and DistributedDataParallel do, nor any value. See benchmarks/fake_cuda.py and
tests/device_watch.py.
"""

from unittest import mock

import pytest
import torch
from device_watch import watched_fake_cuda
from helpers import parse, train_epoch
from timm.utils import ModelEmaV3

import engine
from benchmarks.fake_cuda import CUDA
from diversity import REGULARIZERS
from diversity.distillation import DistillationLoss
from pipeline.batch_augmentation import BatchAugmentation, Draws, Normalize
from pipeline.prefetch import Prefetcher
from training.background import copy_to_cpu
from training.build import (
    build_augmentation,
    build_diverse_loss,
    build_initial,
    build_model,
    build_optimizer,
)
from training.checkpoint import TrainState
from training.guard import FiniteGuard
from training.predictions import Predictions
from training.update import GuardedUpdate
from utils import World

WORLD = World(0, 1, 0, 1, CUDA)
CLASSES, STEPS = 10, 3
ALL_TERMS = " ".join(f"--{name}_coef 1e-3" for name in ("mixing", *REGULARIZERS))
EVERY_CHOICE = "--emb-layers all --attn-layers all --weight-groups qkv,proj,fc1,fc2 --cond-orth-steps 3"


def run_on_fake_cuda(*words, batch=8, teacher=None):
    """Findings of three training steps, an evaluation and a save: what happens after the first step."""
    args = parse("--batch-size", batch, *words)
    model = build_initial(args, CLASSES)  # real, since timm reads numbers as it builds
    model_ema = ModelEmaV3(model, args.model_ema_decay) if args.model_ema else None
    net = build_model(args.model, CLASSES, args.input_size, args.patch_size, **args.model_kwargs) if teacher else None
    with watched_fake_cuda() as watch:
        model.to(CUDA)
        if model_ema is not None:
            model_ema.module.to(CUDA)
        prefetches = args.prefetcher is not False
        training_loss = build_diverse_loss(args, WORLD, model, CLASSES, build_augmentation(args, of_bytes=prefetches))
        if teacher:
            training_loss.objective.classification.distillation = DistillationLoss(net.to(CUDA), teacher, 0.5, 3.0)
        dtype = engine.autocast_dtype(args.amp, CUDA)
        scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
        state = TrainState(model, model_ema, build_optimizer(args, model, 1e-3), None, scaler)
        batches = [host_batch(batch, args.input_size, as_bytes=prefetches) for _ in range(STEPS * args.accum_steps)]

        def after_step():
            watch.phase = "step" if state.step < STEPS else "end of epoch"

        watch.phase = "first step"
        train_epoch(
            training_loss, Prefetcher(batches, CUDA) if prefetches else batches, state, world=WORLD,
            after_step=after_step, num_steps=STEPS, amp_dtype=dtype, accum_steps=args.accum_steps,
            clip_grad=args.clip_grad, log_interval=0,
        )  # fmt: skip
        assert state.step == STEPS
        watch.phase = "evaluation"
        val = Prefetcher(batches, CUDA, Normalize().to(CUDA)) if prefetches else batches
        with torch.no_grad(), mock.patch.object(engine.World, "sum", lambda world, values: values):
            stop = mock.Mock(side_effect=lambda: setattr(watch, "phase", "evaluation"))
            evaluate = engine.evaluate.__wrapped__  # inference mode knows no fake tensors
            predictions = Predictions(mock.Mock(is_stream=True, val_is_shared=False), WORLD)
            evaluate(model, val, WORLD, dtype, stop, len(batches), model_ema and model_ema.module, predictions)
            assert len(predictions.batches) == len(batches)
        watch.phase = "save"
        copy_to_cpu({"model": model.state_dict(), "optimizer": state.optimizer.state_dict()})
    return watch.findings


def host_batch(batch, side, as_bytes):
    """What a loader that pins memory hands out."""
    shape, dtype = ((batch, side, side, 3), torch.uint8) if as_bytes else ((batch, 3, side, side), torch.float32)
    return torch.empty(shape, dtype=dtype, pin_memory=True), torch.empty(batch, dtype=torch.int64, pin_memory=True)


def assert_no_wait(findings):
    """Steps and the batches of an evaluation do not wait; an evaluation waits after its last batch, and a save waits.
    There is no large pageable upload."""
    for finding in findings:
        if finding.phase == "step" or finding.phase == "save":
            assert finding.kind != "wait" or "synchronize" in finding.what, finding
        assert finding.kind != "pageable upload", finding
    waits = [finding for finding in findings if finding.phase == "evaluation" and finding.kind == "wait"]
    assert all("world.sum" in finding.where or "tolist" in finding.where for finding in waits), waits


SETTINGS = {
    "five terms": "--preset released",
    "no term": "",
    "all terms": f"{ALL_TERMS} {EVERY_CHOICE}",
    "corrected": "--preset corrected",
    "float16, clipping, accumulation": "--preset released --amp fp16 --clip-grad 1 --accum-steps 2",
    "float32": "--amp off",
    "elem": "--preset released --mixup-mode elem",
    "pair": "--preset released --mixup-mode pair",
    "no prefetcher": "--preset released --no-prefetcher",
    "checkpointing": "--preset released --grad-checkpointing",
    "no average": "--no-model-ema",
    "three boxes": "--remode rand --recount 3 --reprob 1",
}


@pytest.mark.parametrize("words", SETTINGS.values(), ids=SETTINGS)
def test_the_host_does_not_wait(words):
    findings = run_on_fake_cuda(*words.split())
    assert_no_wait(findings)
    sent = [finding for finding in findings if finding.phase == "step" and finding.kind == "upload"]
    assert len(sent) > 0


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_the_host_does_not_wait_for_a_teacher(kind):
    assert_no_wait(run_on_fake_cuda("--preset", "released", teacher=kind))


def test_a_large_batch_sends_little_beside_its_images():
    """With one draw for each image, 1024 of 14 x 14 patches."""
    findings = run_on_fake_cuda("--preset", "released", "--mixup-mode", "elem", "--input-size", 112, batch=1024)
    assert_no_wait(findings)
    uploads = [finding for finding in findings if finding.phase == "step" and finding.kind == "upload"]
    beside = [finding.num_bytes for finding in uploads if finding.num_bytes < 1024 * 112 * 112 * 3]
    assert sum(beside) / (STEPS - 1) < 100_000  # labels 8 KiB, mixing 48 KiB, boxes 16 KiB


def test_decisions_are_read_at_the_same_step_on_all_ranks():
    """Not when the device happens to have made them."""
    with watched_fake_cuda() as watch:
        guard = FiniteGuard(0, WORLD)
        for step in range(2 * guard.LAG):
            guard.check(["loss"], torch.zeros(1, device=CUDA), 0, step)
            guard.report_pending()
            assert len([each for each in watch.findings if each.kind == "wait"]) == max(0, step + 1 - guard.LAG)
        guard.report_pending(wait=True)
    assert len([each for each in watch.findings if each.kind == "wait"]) == 2 * guard.LAG


def test_the_buffers_of_saves_are_allocated_once():
    with watched_fake_cuda():
        state = {"model": {"a": torch.empty(3, device=CUDA), "b": [torch.empty(2, 2, device=CUDA)]}, "epoch": 1}
        buffers = {}
        first = copy_to_cpu(state, buffers)
        assert len(buffers) == 2
        second = copy_to_cpu(state, buffers)
        assert second["model"]["a"] is first["model"]["a"] and second["model"]["b"][0] is first["model"]["b"][0]
        state["model"]["a"] = torch.empty(4, device=CUDA)
        third = copy_to_cpu(state, buffers)
        assert third["model"]["a"].shape == (4,) and third["model"]["b"][0] is first["model"]["b"][0]


# Planted faults: each is found


def findings_of(kind, phase, *words, **options):
    return [each for each in run_on_fake_cuda(*words, **options) if each.kind == kind and each.phase == phase]


def test_tensors_of_two_devices_are_found():
    def draw(augment, images, seed, rank, epoch, batch):
        return Draws(augment.mixup.draw(len(images), images.shape[-2:]))

    with mock.patch.object(BatchAugmentation, "draw", draw), pytest.raises(RuntimeError, match="devices"):
        run_on_fake_cuda("--reprob", "0")


def test_a_look_at_the_decision_is_found():
    take = GuardedUpdate.apply

    def look(update, allowed):
        if allowed:
            take(update, allowed)

    with mock.patch.object(GuardedUpdate, "apply", look):
        [finding, *_] = findings_of("wait", "step")
    assert "if allowed:" in finding.where and "reads a value" in finding.what


def test_an_optimizer_that_is_not_fused_looks():
    assert findings_of("wait", "step", "--opt", "sgd")


def test_an_index_that_lies_on_the_host_is_found():
    mix = BatchAugmentation.forward

    def index(augment, images, labels, draws):
        return mix(augment, images[torch.arange(len(images))], labels, draws)

    with mock.patch.object(BatchAugmentation, "forward", index):
        assert findings_of("wait", "step")


@pytest.mark.parametrize("batch", [1024, 2048])
def test_a_large_upload_from_pageable_memory_is_found(batch):
    """48 bytes of draws an image: under 64 KiB at 1024."""

    def send(tensor, device):
        return tensor.to(device, non_blocking=True)

    with mock.patch("pipeline.batch_augmentation.to_device", send):
        found = findings_of("pageable upload", "step", "--mixup-mode", "elem", "--reprob", "0", batch=batch)
    assert bool(found) == (batch == 2048)


def test_a_blocking_upload_is_found():
    def send(tensor, device):
        return tensor.to(device)

    with mock.patch("pipeline.batch_augmentation.to_device", send):
        assert findings_of("wait", "step")


def test_a_wait_in_every_batch_of_an_evaluation_is_found():
    count = engine._sums_and_results

    def wait(model, samples, labels, amp_dtype):
        sums, results = count(model, samples, labels, amp_dtype)
        return sums + labels.new_tensor([1.0]), results

    with mock.patch.object(engine, "_sums_and_results", wait), pytest.raises(AssertionError, match="new_tensor"):
        assert_no_wait(run_on_fake_cuda())


def test_results_that_are_copied_to_the_host_in_every_batch_are_found():
    add = Predictions.add

    def copy(predictions, labels, results):
        add(predictions, labels.cpu(), results)

    with mock.patch.object(Predictions, "add", copy), pytest.raises(AssertionError, match="cpu"):
        assert_no_wait(run_on_fake_cuda())
