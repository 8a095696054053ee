"""The learning rate of each epoch for all schedules, warm-ups, cool-downs and noise, fresh and resumed."""

import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from helpers import TINY, log_of, one_line, parse, run_main, world
from timm.utils import ModelEmaV3

from training import evaluation
from training.build import build_ema, build_schedule
from training.checkpoint import TrainState
from training.flag_warnings import unusual_settings
from training.guard import FiniteGuard
from training.resuming import find_checkpoint
from training.update import GuardedUpdate
from utils import World

pytestmark = pytest.mark.filterwarnings("ignore:PlateauLRScheduler", "ignore:Detected call of")
EPOCHS, LR, MIN_LR, WARMUP_LR = 8, 0.1, 0.002, 0.001
ACCURACIES = [10.0, 30.0, 20.0, 25.0, 31.0, 30.0, 29.0, 28.0, 27.0, 50.0, 40.0]
SCHEDULES = ("cosine", "tanh", "step", "poly", "constant", "plateau")
NOISE = (None, (0.5,), (0.25, 0.75))


def expected(sched, warmup, cooldown, noise):
    """The rate of each epoch, from the formulas: what the schedule gives at t trains the epoch after epoch t.

    Decay rate 0.5, which is also poly's power; decays every 3 epochs; patience 1.
    """
    rates = [WARMUP_LR if warmup else LR]
    for t in range(EPOCHS - 1):
        rate = at(sched, t, warmup)
        in_noise = noise and noise[0] * EPOCHS <= t < (*noise, math.inf)[1] * EPOCHS
        if in_noise and not (sched == "plateau" and t <= warmup):
            rate *= 1 + noise_at(t)
        rates.append(rate)
    return rates + cooldown * [MIN_LR]


def at(sched, t, warmup):
    done = t / EPOCHS
    top = LR if sched != "tanh" or not warmup else decayed("tanh", warmup / EPOCHS, warmup)
    if t < warmup:
        return WARMUP_LR + t * (top - WARMUP_LR) / warmup
    return decayed(sched, done, t) if sched != "plateau" else plateau(t, warmup)


def decayed(sched, done, t):
    match sched:
        case "cosine":
            return MIN_LR + (LR - MIN_LR) * (1 + math.cos(math.pi * done)) / 2
        case "tanh":
            return MIN_LR + (LR - MIN_LR) * (1 - math.tanh(-7 + 10 * done)) / 2
        case "poly":
            return MIN_LR + (LR - MIN_LR) * math.sqrt(1 - done)
        case "step":
            return LR * 0.5 ** (t // 3)
        case "constant":
            return LR


def plateau(t, warmup):
    """Accuracies count after the warm-up; halved after 2 epochs without a gain of a relative 1e-4."""
    rate, best, bad = LR, -math.inf, 0
    for accuracy in ACCURACIES[warmup + 1 if warmup else 0 : t + 1]:
        best, bad = (accuracy, 0) if accuracy > best * (1 + 1e-4 * (best > 0)) else (best, bad + 1)
        if bad > 1:
            rate, bad = max(rate / 2, MIN_LR), 0
    return rate


def noise_at(t):
    generator = torch.Generator().manual_seed(3 + t)
    return next(n for n in iter(lambda: 0.3 * torch.randn(1, generator=generator).item(), None) if abs(n) < 0.4)


def flags(sched, warmup, cooldown, noise):
    words = ["--sched", sched, "--warmup-epochs", warmup, "--cooldown-epochs", cooldown, "--epochs", EPOCHS]
    words += ["--lr", LR, "--min-lr", MIN_LR, "--warmup-lr", WARMUP_LR, "--seed", 3, "--momentum", 0.9]
    words += ["--decay-rate", 0.5, "--decay-epochs", 3, "--patience-epochs", 1]
    return parse(*words, *(["--lr-noise", *noise, "--lr-noise-pct", 0.4, "--lr-noise-std", 0.3] if noise else []))


def state_of(args, lr=LR):
    """A state of a run of one weight, at the start."""
    model = torch.nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    schedule = build_schedule(args, optimizer)
    return TrainState(model, None, optimizer, schedule, torch.amp.GradScaler("cpu", enabled=False))


def rate_of(state):
    return state.optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize(
    ("sched", "warmup", "cooldown", "noise"), [*itertools.product(SCHEDULES, (0, 1, 3), (0, 1, 3), NOISE)]
)
def test_each_epoch_has_its_rate_fresh_and_resumed(sched, warmup, cooldown, noise):
    args = flags(sched, warmup, cooldown, noise)
    table = expected(sched, warmup, cooldown, noise)
    state = state_of(args)
    assert state.scheduler.num_epochs == len(table) == EPOCHS + cooldown
    saved = []
    rates = rates_from(state, lambda: saved.append(state.state_dict(world())))
    assert rates == pytest.approx(table, rel=1e-9)
    for epoch, checkpoint in enumerate(saved):
        resumed = state_of(args)
        resumed.restore(checkpoint, "checkpoint.pth")
        assert (resumed.epoch, resumed.step) == (epoch, epoch % 2)
        assert rates_from(resumed) == rates[epoch:]


def rates_from(state, save=lambda: None):
    """The rates of a run from its present epoch on, and `save` within each odd one and at the start of the others."""
    rates = []
    while state.epoch < state.scheduler.num_epochs:
        state.step = state.epoch % 2
        save()
        rates.append(rate_of(state))
        state.scheduler.step(ACCURACIES[state.epoch])
        state.next_epoch({"acc1": 0.0})
    return rates


@pytest.mark.parametrize("sched", SCHEDULES)
@pytest.mark.parametrize("epoch", [0, 1, 2, 5, 9])
def test_start_epoch_begins_at_its_rate(sched, epoch):
    """Without accuracies plateau has not decayed."""
    state = state_of(flags(sched, 2, 2, None))
    state.scheduler.start(epoch)
    table = expected("constant" if sched == "plateau" else sched, 2, 2, None)
    assert rate_of(state) == pytest.approx(table[epoch], rel=1e-9)


def test_the_rest_of_an_epoch_has_the_rate_of_the_flags():
    state = state_of(flags("cosine", 0, 0, None))
    state.step = 3
    resumed = state_of(flags("cosine", 0, 0, None), lr=0.7)
    resumed.restore(state.state_dict(world()), "checkpoint.pth")
    assert rate_of(resumed) == 0.7


def test_plateau_needs_the_accuracies_of_the_epochs_before():
    saved = state_of(flags("cosine", 0, 0, None))
    saved.epoch, saved.scheduler.accuracies = 2, [1.0, 2.0]
    checkpoint = saved.state_dict(world())
    state_of(flags("plateau", 0, 0, None)).restore(checkpoint, "checkpoint.pth")
    checkpoint["lr_scheduler"] = {"metric": 2.0}  # as timm and DeiT store it
    state_of(flags("cosine", 0, 0, None)).restore(checkpoint, "checkpoint.pth")
    with pytest.raises(SystemExit) as caught:
        state_of(flags("plateau", 0, 0, None)).restore(checkpoint, "checkpoint.pth")
    one_line(caught, "checkpoint.pth does not contain the accuracies", "--sched plateau")


@pytest.mark.parametrize("epochs", [(0, 1), (0,), (0, 1, 2)])
def test_the_accuracies_of_an_earlier_versions_checkpoint_are_in_its_log(epochs, tmp_path):
    path, state = tmp_path / "checkpoint.pth", state_of(flags("plateau", 0, 0, None))
    state.epoch = 2
    torch.save(state.state_dict(world()) | {"lr_scheduler": {"metric": 2.0}}, path)
    records = [{"epoch": epoch, "test_acc1": ACCURACIES[epoch]} for epoch in epochs]
    (tmp_path / "log.txt").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    found = find_checkpoint(str(path), "", world()).content["lr_scheduler"]
    assert found == ({"metric": 2.0} if epochs == (0,) else {"accuracies": ACCURACIES[:2]})


def test_a_factor_that_plateau_cannot_have_is_refused():
    with pytest.raises(SystemExit) as caught:
        state_of(parse("--sched", "plateau", "--decay-rate", 1))
    one_line(caught, "--sched plateau", "--decay-rate")


def test_all_ranks_have_the_accuracies_of_the_main_one(monkeypatch):
    """Where each evaluates all images; GPUs may disagree about one."""
    alone = {"acc1": 50.0, "images": 7}
    data = SimpleNamespace(val_is_shared=False, val=[], num_val=7, common_val_batches=lambda world: 0)
    monkeypatch.setattr(evaluation, "evaluate", lambda *args: dict(alone))
    monkeypatch.setattr(World, "from_main", lambda world, value: value | {"acc1": 51.0 if world.size == 2 else 0.0})
    assert evaluation.evaluate_both(None, None, data, world(rank=1, size=2))["acc1"] == 51.0
    data.val_is_shared = True  # the ranks have added their hits
    assert evaluation.evaluate_both(None, None, data, world(rank=1, size=2))["acc1"] == 50.0


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("", ""),
        ("--warmup-epochs 299", "--warmup-epochs 299 --epochs 300"),
        ("--epochs 1", "--warmup-epochs 5 --epochs 1"),
        ("--epochs 1 --warmup-epochs 0", ""),
        ("--epochs 4 --warmup-epochs 2", ""),
        ("--warmup-lr 0.2", "--warmup-lr 0.2"),
        ("--warmup-lr 0.2 --warmup-epochs 0", ""),
        ("--min-lr 0.2", "--min-lr 0.2"),
        ("--min-lr 0.2 --sched step", ""),
        ("--min-lr 0.2 --sched constant --cooldown-epochs 1", "--min-lr 0.2"),
        ("--model-ema-decay 0.999999", "--model-ema-decay 0.999999"),
        ("--model-ema-decay 0.999999 --model-ema-warmup", ""),
        ("--model-ema-decay 0.999999 --no-model-ema", ""),
        ("--model-ema-decay 1", "--model-ema-decay 1"),
        ("--diversity-warmup 299 --diversity-until 302 --cooldown-epochs 3", ""),
        ("--diversity-warmup 300", "--diversity-warmup 300"),
        ("--diversity-until 300", "--diversity-until 300"),
        ("--compile-mode reduce-overhead --grad-checkpointing", "--compile-mode reduce-overhead --grad-checkpointing"),
        ("--compile-mode reduce-overhead --grad-checkpointing --drop-path 0", ""),
        ("--compile-mode reduce-overhead", ""),
    ],
)
def test_settings_that_no_run_of_this_length_and_rate_means_are_said(words, named):
    args = parse("--epochs", 300, "--model-ema-decay", 0.9, *words.split())
    lines = unusual_settings(args, lr=LR, num_steps=1000)
    assert len(lines) == bool(named) and all(word in "".join(lines) for word in named.split())


def test_a_run_with_plateau_and_without_warm_up_trains_at_its_rate(tmp_path, few_digits):
    words = (
        "--sched",
        "plateau",
        "--warmup-epochs",
        0,
        "--epochs",
        2,
        "--lr",
        2e-4,
        "--unscale-lr",
        "--patience-epochs",
        5,
    )
    words = [*TINY, *words, "--model-ema-warmup", "--output-dir", tmp_path / "run"]
    run_main(*words)
    resumed = ["--resume", tmp_path / "run" / "checkpoint.pth", "--resume-with-changes", "--start-epoch", 1]
    run_main(*words, "--epochs", 4, "--cooldown-epochs", 1, "--min-lr", 1e-6, *resumed)
    assert [record["train_lr"] for record in log_of(tmp_path / "run")] == [2e-4] * 4 + [1e-6]


def test_the_decay_of_the_average_grows_as_timms_does():
    model = torch.nn.Linear(3, 2)
    average = build_ema(parse("--model-ema-warmup", "--model-ema-decay", 0.7), model)
    timms = ModelEmaV3(model, decay=0.7, use_warmup=True)
    guard, scaler = FiniteGuard(0, world()), torch.amp.GradScaler("cpu", enabled=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(8):
        if step % 3 == 0:  # as a process that resumes there
            update = GuardedUpdate(model, average, optimizer, scaler, guard, num_updates=step)
        model(torch.ones(1, 3)).square().sum().backward()
        update.apply(torch.tensor(True))
        timms.update(model, step=step + 1)
        torch.testing.assert_close(average.module.weight, timms.module.weight)
    assert timms.get_decay(8) == 0.7 > timms.get_decay(5)
