"""Every optimizer of timm's list that runs on a CPU continues from a checkpoint as if it had not stopped."""

import argparse

import pytest
import timm.optim
import torch
from helpers import TINY, assert_equal, log_of, one_line, run_main, world
from timm.scheduler import create_scheduler_v2
from torch import nn

from models.weights import read
from training import checkpoint
from training.background import copy_to_cpu
from training.schedule import Schedule

NAMES = [
    name
    for name in [*timm.optim.list_optimizers(), *(f"lookahead_{name}" for name in ("adamw", "sgd", "lamb"))]
    if not name.startswith(("bnb", "fused"))  # of packages that need a GPU
    and name != "adahessian"  # refused, as it needs second derivatives
]
SLOW = {"kron", "kronc", "kronw"}  # they compile


class Net(nn.Module):
    """A parameter of each kind that optimizers tell apart: a convolution, matrices, vectors and a position."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 2, 2), nn.LayerNorm(8)
        self.fc1, self.fc2 = nn.Linear(8, 6), nn.Linear(6, 3)
        self.pos_embed = nn.Parameter(torch.randn(1, 4, 8))

    def forward(self, images):
        tokens = self.conv(images).flatten(2).transpose(1, 2) + self.pos_embed
        return self.fc2(self.fc1(self.norm(tokens)).relu().mean(dim=1))


def state_of(opt, seed=0):
    torch.manual_seed(seed)
    model = Net()
    optimizer = timm.optim.create_optimizer_v2(model, opt=opt, lr=0.01, weight_decay=0.05, momentum=0.9)
    scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=9, warmup_epochs=2, warmup_lr=1e-3)
    schedule = Schedule(scheduler, epochs=9)
    return checkpoint.TrainState(model, None, optimizer, schedule, torch.amp.GradScaler("cpu", enabled=False))


def train(state, epochs):
    for _ in range(epochs):
        torch.manual_seed(100 + state.epoch)
        state.optimizer.zero_grad()
        state.model(torch.randn(4, 3, 4, 4)).square().sum().backward()
        state.optimizer.step()
        state.scheduler.step()
        state.epoch += 1


def saved(state, path):
    torch.save(copy_to_cpu(state.state_dict(world())), path)
    return read(str(path))


@pytest.mark.parametrize("opt", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in NAMES])
def test_a_resumed_run_ends_like_one_that_was_not_interrupted(opt, tmp_path):
    whole, rest = state_of(opt), state_of(opt, seed=1)
    train(whole, 3)
    rest.restore(saved(whole, tmp_path / "checkpoint.pth"), "checkpoint.pth")
    for state in (whole, rest):
        train(state, 4)
    assert_equal(whole.model.state_dict(), rest.model.state_dict())
    assert_equal(whole.optimizer.state_dict(), rest.optimizer.state_dict())


def test_another_optimizer_is_refused(tmp_path):
    state = state_of("adamw")
    train(state, 1)
    for opt in ("adam", "sgd", "lamb", "lookahead_adamw"):
        with pytest.raises(SystemExit) as caught:
            state_of(opt).restore(saved(state, tmp_path / "checkpoint.pth"), "checkpoint.pth")
        one_line(caught, "--resume checkpoint.pth was written with another optimizer, AdamW", "see --opt")
    file = saved(state, tmp_path / "checkpoint.pth")
    del file["optimizer_name"]  # as in a file of DeiT
    with pytest.raises(SystemExit) as caught:
        state_of("sgd").restore(file, "checkpoint.pth")
    one_line(caught, "--resume checkpoint.pth was written with another optimizer, without momentum, not SGD; see --opt")


def test_keys_that_only_one_version_of_an_optimizer_has(tmp_path):
    """torch adds keys to the groups of its optimizers; the file keeps those that this version does not know."""
    state, rest = state_of("adamw"), state_of("adamw", seed=1)
    train(state, 1)
    file = saved(state, tmp_path / "checkpoint.pth")
    for group in file["optimizer"]["param_groups"]:
        del group["decoupled_weight_decay"], group["foreach"]
        group["of_a_later_version"] = 1
    rest.restore(file, "checkpoint.pth")
    assert_equal(state.optimizer.state_dict()["state"], rest.optimizer.state_dict()["state"])
    assert [group["decoupled_weight_decay"] for group in rest.optimizer.param_groups] == [True, True]


@pytest.mark.parametrize("change", [lambda groups: groups.pop(), lambda groups: groups[0]["params"].pop()])
def test_other_groups_of_parameters_are_refused(change, tmp_path):
    state = state_of("adamw")
    train(state, 1)
    file = saved(state, tmp_path / "checkpoint.pth")
    change(file["optimizer"]["param_groups"])
    with pytest.raises(SystemExit) as caught:
        state_of("adamw").restore(file, "checkpoint.pth")
    one_line(caught, "--resume checkpoint.pth was written with another optimizer:", "group")


def test_a_run_with_lamb_continues(tmp_path, few_digits):
    words = (*TINY, "--opt", "lamb", "--sched", "constant", "--batch-size", 32, "--output-dir", tmp_path)
    run_main(*words)
    run_main(*words, "--epochs", 2, "--resume", "auto", "--resume-with-changes")
    assert [record["epoch"] for record in log_of(tmp_path)] == [0, 1]


def test_a_checkpoint_of_deit_continues(tmp_path, few_digits):
    """DeiT's layout, written with the torch of its time: steps are numbers, and groups have fewer keys."""
    words = (*TINY, "--sched", "constant", "--batch-size", 32)
    run_main(*words, "--output-dir", tmp_path)
    ours = read(str(tmp_path / checkpoint.LAST))
    optimizer = ours["optimizer"]
    for group in optimizer["param_groups"]:
        for key in group.keys() - {"params", "lr", "betas", "eps", "weight_decay", "amsgrad", "initial_lr"}:
            del group[key]
    for state in optimizer["state"].values():
        state["step"] = int(state["step"])
    deits = {name: ours[name] for name in ("model", "optimizer", "epoch", "model_ema", "scaler")}
    deits["lr_scheduler"] = {"t_initial": 1, "warmup_t": 5, "metric": 9.0}  # some of timm's
    torch.save(deits | {"args": argparse.Namespace(opt="adamw", lr=5e-4, clip_grad=None)}, tmp_path / "deit.pth")
    run_main(*words, "--epochs", 2, "--output-dir", tmp_path / "rest", "--resume", tmp_path / "deit.pth")
    run_main(*words, "--epochs", 2, "--output-dir", tmp_path, "--resume", "auto", "--resume-with-changes")
    assert_equal(*(read(str(folder / checkpoint.LAST))["model"] for folder in (tmp_path, tmp_path / "rest")))
