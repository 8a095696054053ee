"""--layer-decay: the rate of every parameter, by hand, under every schedule and optimizer, fresh and resumed."""

import pytest
import torch
from families import build, images
from helpers import TINY, log_of, one_line, parse, run_main, world
from torch.nn import functional as F

from diversity import apply_remedy
from training.build import build_optimizer, build_schedule
from training.checkpoint import TrainState
from training.schedule import layer_rates_line, learning_rates
from training.update import step_if

pytestmark = pytest.mark.filterwarnings("ignore:PlateauLRScheduler", "ignore:Detected call of")
DECAY, LR, MIN_LR, WARMUP_LR = 0.5, 0.1, 0.002, 0.001


def vit_layer(name):
    """Of a ViT of depth 3: 0 = input, 1 to 3 = blocks, 4 = head."""
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return {"norm": 3, "head": 4, "head_dist": 4}.get(name.split(".")[0], 0)


def swin_layer(name):
    """Of a Swin with two stages of two blocks: 0 = input, 1 to 4 = blocks, 5 = head."""
    parts = name.split(".")
    if parts[0] != "layers":
        return {"patch_embed": 0, "norm": 4, "head": 5}[parts[0]]
    stage, block = int(parts[1]), 0 if parts[2] == "downsample" else int(parts[3])
    return 2 * stage + block + 1


LAYERS = {"vit": (vit_layer, 4), "distilled": (vit_layer, 4), "swin": (swin_layer, 5)}


def state_of(model="vit", *words):
    args = parse("--layer-decay", DECAY, "--lr", LR, "--min-lr", MIN_LR, "--warmup-lr", WARMUP_LR, *words)
    model = build(model) if isinstance(model, str) else model
    optimizer = build_optimizer(args, model, LR)
    schedule = build_schedule(args, optimizer)
    return TrainState(model, None, optimizer, schedule, torch.amp.GradScaler("cpu", enabled=False))


def rates_of(state):
    """{name of a parameter: its rate}; each is in one group."""
    names = {parameter: name for name, parameter in state.model.named_parameters()}
    pairs = [(names[p], group["lr"]) for group in state.optimizer.param_groups for p in group["params"]]
    assert len(dict(pairs)) == len(pairs) == len(names)
    return dict(pairs)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("opt", ["adamw", "muon", "lookahead_sgd"])
def test_each_layer_has_its_rate(name, opt):
    layer_of, top = LAYERS[name]
    state = state_of(name, "--opt", opt, "--warmup-epochs", 0)
    state.scheduler.start(0)
    for parameter, rate in rates_of(state).items():
        assert rate == pytest.approx(LR * DECAY ** (top - layer_of(parameter)), rel=1e-12), parameter
    assert learning_rates(state.optimizer) == pytest.approx({"lr": LR, "lr_min": LR * DECAY**top})


@pytest.mark.parametrize("sched", ["cosine", "tanh", "step", "poly", "constant", "plateau"])
@pytest.mark.parametrize("warmup", [0, 2])
def test_every_rate_of_a_schedule_is_scaled_fresh_and_resumed(sched, warmup):
    """The first one, the warm-up, noise, the decays of plateau down to its limit, and the cool-down."""
    words = ["--sched", sched, "--warmup-epochs", warmup, "--cooldown-epochs", 1, "--epochs", 9, "--lr-noise", 0.8]
    words += ["--decay-rate", 0.1, "--patience-epochs", 0, "--decay-epochs", 2]
    state, plain = state_of("vit", *words), state_of("vit", *words, "--layer-decay", 1)
    for each in (state, plain):
        each.scheduler.start(0)
    seen = []
    for epoch in range(10):
        resumed = state_of("vit", *words)
        resumed.restore(state.state_dict(world()), "checkpoint.pth")
        rates, unscaled = rates_of(state), rates_of(plain)
        assert rates_of(resumed) == rates
        for name, rate in unscaled.items():
            assert rates[name] == pytest.approx(rate * DECAY ** (4 - vit_layer(name)), rel=1e-9), (epoch, name)
        seen.append(unscaled["head.weight"])
        for each in (state, plain):
            each.scheduler.step(50.0)
            each.next_epoch({"acc1": 0.0})
    assert seen[0] == (WARMUP_LR if warmup else LR) and seen[-1] == MIN_LR
    if sched == "plateau":
        assert min(rate for rate in seen if rate > MIN_LR) < 2 * LR and MIN_LR in seen[:-1]


def test_plateau_lowers_the_smallest_rates_too():
    words = ["--sched", "plateau", "--epochs", 9, "--layer-decay", 0.01, "--decay-rate", 0.5, "--min-lr", 0]
    state = state_of("vit", *words, "--patience-epochs", 0, "--warmup-epochs", 0)
    state.scheduler.start(0)
    for accuracy in (2.0, 1.0):
        state.scheduler.step(accuracy)
    assert rates_of(state)["patch_embed.proj.weight"] == pytest.approx(LR / 2 * 0.01**4, rel=1e-9)


def test_an_update_has_the_rate_of_its_layer():
    """The same gradients with SGD: each weight moves by its rate times its gradient; a step that is not taken, by 0."""
    state = state_of("vit", "--opt", "momentum", "--momentum", 0, "--weight-decay", 0, "--warmup-epochs", 0)
    before = {name: value.detach().clone() for name, value in state.model.named_parameters()}
    F.cross_entropy(state.model(images()), torch.tensor([1, 3])).backward()
    for allowed in (False, True):
        step_if(state.optimizer, torch.tensor(allowed))
        for name, value in state.model.named_parameters():
            moved = allowed * LR * DECAY ** (4 - vit_layer(name)) * value.grad
            torch.testing.assert_close(value, before[name] - moved)


def test_parameters_of_remedies_and_of_fc_norm_have_the_heads_rate():
    model = build("average")
    apply_remedy(model, "attnscale")
    state = state_of(model, "--warmup-epochs", 0)
    new = {name: rate for name, rate in rates_of(state).items() if name.startswith(("remedies.", "fc_norm."))}
    assert len({name.split(".")[0] for name in new}) == 2 and {*new.values()} == {LR}


def test_a_run_reports_the_range_of_its_rates(tmp_path, few_digits, capsys):
    """Resuming with another factor is a change; with none, which has other groups of parameters, it is refused."""
    words = [*TINY, "--lr", 1e-3, "--unscale-lr", "--sched", "constant", "--warmup-epochs", 0]
    words += ["--output-dir", tmp_path / "run"]
    run_main(*words, "--layer-decay", 0.5)
    assert "4 layers with 0.125 to 1 times" in (out := capsys.readouterr().out)
    assert "lr 0.000125 to 0.001" in out
    resume = ["--epochs", 2, "--resume", tmp_path / "run" / "checkpoint.pth"]
    for changed in ([], ["--layer-decay", 0.7]):
        with pytest.raises(SystemExit) as caught:
            run_main(*words, *resume, *changed)
        one_line(caught, "--layer-decay 0.5 ->")
    with pytest.raises(SystemExit) as caught:
        run_main(*words, *resume, "--resume-with-changes")
    one_line(caught, "other groups of parameters", "--layer-decay", "--finetune")
    run_main(*words, *resume, "--layer-decay", 0.1, "--resume-with-changes")
    records = log_of(tmp_path / "run")
    assert [(record["train_lr"], record["train_lr_min"]) for record in records] == [
        (1e-3, 1.25e-4),
        (1e-3, pytest.approx(1e-6)),
    ]


def test_without_it_there_is_one_rate():
    args, model = parse(), build("vit")
    optimizer = build_optimizer(args, model, LR)
    assert learning_rates(optimizer) == {"lr": LR} and layer_rates_line(optimizer, None, LR) == ""
    assert len(optimizer.param_groups) == 2
