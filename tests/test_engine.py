"""The training step and evaluation: what they compute, and what they refuse to step on."""

import math
import time

import pytest
import torch
from helpers import parse
from steps import ALL_TERMS, CPU, images, make_state, small_vit, train, weights
from timm.utils import ModelEmaV3
from torch.utils.data import DataLoader, TensorDataset

from diversity import PatchMixup
from engine import autocast_dtype, evaluate
from training import build
from training.build import build_optimizer
from training.guard import FiniteGuard
from training.update import GuardedUpdate


def test_all_coefficients_zero_is_plain_training_bit_for_bit():
    samples, labels = images(12)
    batches = list(zip(samples.split(4), labels.split(4), strict=True))
    ours, plain = small_vit(), small_vit()
    train(ours, batches, coefs={name: 0 for name in ALL_TERMS}, smoothing=0.0)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    plain.train()
    for x, y in batches:
        logits = plain(x)
        (logits.logsumexp(dim=1) - logits.gather(1, y[:, None]).squeeze(1)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(weights(ours), weights(plain))


def test_accumulated_batches_make_the_step_of_one_large_batch():
    samples, labels = images(8)
    large, accumulated = small_vit(), small_vit()
    train(large, [(samples, labels)])
    train(accumulated, list(zip(samples.split(2), labels.split(2), strict=True)), accum_steps=4)
    torch.testing.assert_close(weights(accumulated), weights(large), rtol=1e-5, atol=1e-6)


def test_clipping_bounds_the_step_and_reports_the_norm_before_it():
    model = small_vit()
    before = weights(model)
    stats = train(model, [images(4)], clip_grad=0.01)
    assert stats["grad_norm"] > 0.01
    assert (weights(model) - before).norm().item() == pytest.approx(0.1 * 0.01, rel=1e-3)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_non_finite_step_is_skipped_named_and_left_out_of_the_means(poison, capsys):
    good, bad = images(4), images(4, seed=2)
    bad[0][0, 0, 0, 0] = poison
    model, clean = small_vit(), small_vit()
    ema = ModelEmaV3(model, decay=0.5)
    stats = train(model, [good, bad], state=make_state(model, ema=ema), budget=1)
    expected = train(clean, [good])
    assert torch.equal(weights(model), weights(clean))
    assert weights(ema.module).isfinite().all()
    assert stats["skipped_steps"] == 1
    assert stats["loss"] == pytest.approx(expected["loss"])
    printed = capsys.readouterr().out
    assert "epoch 0 step 1" in printed
    assert "emb_cos_within" in printed


@pytest.mark.parametrize(("opt", "can_fuse"), [("adamw", True), ("adam", True), ("sgd", True), ("adamw", False)])
def test_a_step_is_skipped_in_the_same_way_by_fused_and_plain_optimizers(opt, can_fuse, monkeypatch):
    """Also the first one. A fused optimizer reads the decision on the device, so that a GPU need not wait."""
    if not can_fuse:
        monkeypatch.setattr(build, "can_fuse", lambda opt: False)
    bad, good, after = images(4, seed=2), images(4), images(4, seed=3)
    bad[0].fill_(math.nan)
    model, clean = small_vit(), small_vit()
    for trained, batches in ((model, [bad, good, bad, after]), (clean, [good, after])):
        optimizer = build_optimizer(parse("--opt", opt), trained, 0.01)
        train(trained, batches, state=make_state(trained, optimizer), budget=2)
    assert torch.equal(weights(model), weights(clean))


@pytest.mark.parametrize(
    ("opt", "fused"), [("adamw", True), ("adam", True), ("sgd", False), ("lamb", False), ("lookahead_adamw", False)]
)
def test_optimizers_are_fused_where_they_can_be(opt, fused):
    optimizer = build_optimizer(parse("--opt", opt), small_vit(), 0.1)
    assert getattr(optimizer, "_step_supports_amp_scaling", False) == fused


def with_batch_norm():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))


def update_of(model, ema, optimizer):
    return GuardedUpdate(model, ema, optimizer, torch.amp.GradScaler("cpu", enabled=False), FiniteGuard(0, CPU))


def test_the_average_is_timms_also_of_buffers():
    model = with_batch_norm()
    ours, timms = ModelEmaV3(model, decay=0.9), ModelEmaV3(model, decay=0.9)
    update = update_of(model, ours, torch.optim.SGD(model.parameters(), lr=0.1))
    for seed in range(3):
        update.before_forward()
        model(images(4, seed)[0]).square().sum().backward()
        update.apply(torch.tensor(True))
        timms.update(model)
        for name, value in timms.module.state_dict().items():
            torch.testing.assert_close(ours.module.state_dict()[name], value, rtol=1e-6, atol=1e-8)
    assert ours.module[1].num_batches_tracked == 3
    assert not torch.equal(weights(ours.module), weights(model))


@pytest.mark.parametrize("opt", ["adamw", "sgd"])
def test_a_skipped_step_poisons_neither_buffers_nor_average(opt):
    model = with_batch_norm()
    ema = ModelEmaV3(model, decay=0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    update = update_of(model, ema, build_optimizer(parse("--opt", opt), model, 0.1))
    update.before_forward()
    model(torch.full((4, 3, 8, 8), math.nan)).sum().backward()
    assert model[1].running_mean.isnan().all()
    update.apply(torch.tensor(False))
    for state in (model.state_dict(), ema.module.state_dict()):
        for name, value in state.items():
            assert torch.equal(value, before[name]), name


def test_a_skipped_step_is_reported_with_its_images(capsys):
    bad = images(4)
    bad[0].fill_(math.nan)
    train(small_vit(), [bad], budget=1, images=lambda step: f"images of step {step}")
    line = capsys.readouterr().out.splitlines()[0]
    assert "cls_ce" in line and line.endswith("; images of step 0")


def test_more_non_finite_steps_than_the_budget_stop_training():
    bad = images(4)
    bad[0].fill_(math.nan)
    with pytest.raises(SystemExit, match="max-nonfinite-steps 1"):
        train(small_vit(), [bad, bad], budget=1)


def test_fp16_overflow_lowers_the_scale_without_a_step_and_without_the_budget():
    model = small_vit()
    before = weights(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    ema = ModelEmaV3(model, decay=0.5)
    state = make_state(model, ema=ema, loss_scaler=scaler)
    stats = train(model, [images(4)], state=state, amp_dtype=torch.float16)
    assert torch.equal(weights(model), before)
    assert scaler.get_scale() == 2.0**39
    assert (stats["skipped_steps"], stats["overflows"]) == (0, 1)
    assert torch.equal(weights(ema.module), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains_close_to_full_precision(dtype):
    model, half = small_vit(), small_vit()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024, enabled=dtype == torch.float16)
    full = train(model, [images(8)])
    cast = train(half, [images(8)], state=make_state(half, loss_scaler=scaler), amp_dtype=dtype)
    assert cast["loss"] == pytest.approx(full["loss"], rel=1e-2)
    assert (weights(half) - weights(model)).norm() < 0.05 * weights(model).norm()


def test_returned_means_and_shares():
    batches = [images(4, seed=seed) for seed in range(3)]
    state = make_state(small_vit(), torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=0.5))
    state.optimizer.param_groups[0]["params"][0].grad = torch.zeros(())
    stats = train(state.model, batches, state=state, mixup_fn=PatchMixup(grid=(4, 4)))
    parts = [name for name in stats if name.endswith("_share")]
    assert {name.removesuffix("_share") for name in parts} == {"cls_ce", *ALL_TERMS}
    assert sum(stats[name] for name in parts) == pytest.approx(1, abs=1e-5)
    assert stats["lr"] == 0.5
    assert 0 <= stats["data_wait"] <= 1
    assert stats["images_per_s"] > 0


@pytest.mark.parametrize("num_batches", [1, 4])
def test_the_first_step_of_a_process_is_not_in_the_throughput(num_batches):
    """Unless it is all there is."""

    def slow_start():
        time.sleep(0.5)
        for seed in range(num_batches):
            yield images(4, seed)

    stats = train(small_vit(), slow_start(), num_steps=num_batches, log_interval=0)
    assert (stats["data_wait"] < 0.2) == (num_batches > 1)
    assert (stats["images_per_s"] > 8) == (num_batches > 1)


def test_evaluate_counts_each_image_once_also_in_a_short_last_batch():
    samples, labels = images(11)
    model = small_vit()
    stats = evaluate(model, DataLoader(TensorDataset(samples, labels), batch_size=4), CPU)
    with torch.no_grad():
        logits = model(samples)
    assert stats["images"] == 11
    assert stats["acc1"] == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item())
    assert stats["acc5"] == 100
    assert stats["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)


def test_the_calibration_of_an_evaluation_is_that_of_its_images():
    """Batch by batch against bin by bin, of an over-confident model."""
    samples, labels = images(50)
    model = small_vit()
    model.head.weight.data.mul_(20)
    stats = evaluate(model, DataLoader(TensorDataset(samples, labels), batch_size=8), CPU)
    with torch.no_grad():
        confidence, predicted = model(samples).softmax(dim=1).max(dim=1)
    total = 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if inside.any():
            is_right = (predicted == labels)[inside].double()
            total += inside.double().mean() * (is_right.mean() - confidence[inside].double().mean()).abs()
    assert stats["ece"] == pytest.approx(100 * total.item(), rel=1e-5) and stats["ece"] > 10


def test_model_and_average_are_evaluated_in_one_pass():
    batches = [images(4, seed) for seed in range(3)]
    model, average = small_vit(), small_vit(depth=1)
    read = []
    stats = evaluate(model, (read.append(0) or batch for batch in batches), CPU, model_ema=average)
    assert len(read) == 3
    for suffix, each in (("", model), ("_ema", average)):
        assert {
            f"{name}{suffix}": value for name, value in evaluate(each, batches, CPU).items()
        }.items() <= stats.items()
    assert stats["loss"] != stats["loss_ema"]


def test_evaluate_refuses_an_empty_set():
    with pytest.raises(SystemExit, match="empty"):
        evaluate(small_vit(), [], CPU)


def test_ema_follows_the_steps():
    model = small_vit()
    start = weights(model)
    ema = ModelEmaV3(model, decay=0.75)
    train(model, [images(4)], state=make_state(model, ema=ema))
    torch.testing.assert_close(weights(ema.module), 0.75 * start + 0.25 * weights(model))


@pytest.mark.parametrize(
    ("amp", "dtype"), [("auto", None), ("off", None), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_autocast_on_cpu(amp, dtype):
    assert autocast_dtype(amp, torch.device("cpu")) is dtype
