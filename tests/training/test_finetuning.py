"""Runs with --freeze and --head-init: a linear probe beside logistic regression by hand, average, resume, two ranks."""

import json
from unittest import mock

import pytest
import torch
from cutting import content, cut_run, records
from flag_files import error_of
from helpers import BRIEF, CONVNET, TINY, few_digits, one_line, parse, run_main, train_epoch
from ranks import run_ranks
from steps import CPU, NO_MIX, make_state, small_vit

from diversity import REGULARIZERS, DiverseLoss
from models.freezing import freeze, frozen_modules, init_head
from pipeline.batch_augmentation import BatchAugmentation
from training import build
from training.arguments import parse_args
from training.flag_warnings import run_warnings, without_effect

PROBE = [*TINY, "--freeze", "backbone", "--head-init", 0.01, "--mixing-coef", 1, "--epochs", 2, "--warmup-epochs", 0]
PROBE += ["--drop", 0.2, "--drop-path", 0.5, "--lr", 0.05, "--unscale-lr", "--model-ema-decay", 0.5]
PROBE += ["--save-every-minutes", 0, "--log-interval", 2, "--tensorboard"]


@pytest.fixture(scope="module", autouse=True)
def digits():
    with few_digits():
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The weights of a run of one epoch, with a trained head for the same classes."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    run_main(*TINY, "--lr", 0.01, "--unscale-lr", "--warmup-epochs", 0, "--output-dir", folder)
    return folder / "checkpoint.pth"


@pytest.fixture(scope="module")
def probe(trained, tmp_path_factory):
    """The folder of a run with `PROBE`, and the digests of its batches."""
    folder = tmp_path_factory.mktemp("probe") / "run"
    with pytest.MonkeyPatch.context() as patch:
        return folder, cut_run(patch, folder, flags=(*PROBE, "--finetune", trained))


def test_a_linear_probe_is_logistic_regression_on_the_features():
    """Steps of SGD on softmax regression, by hand from cached features; the average follows the head alone."""
    model = small_vit(drop_path_rate=0.5, proj_drop_rate=0.3).double()
    init_head(model, 0.01)
    freeze(model, "backbone")
    generator = torch.Generator().manual_seed(3)
    data = torch.randn(12, 3, 32, 32, generator=generator, dtype=torch.float64)
    labels = torch.randint(5, (12,), generator=generator)
    with torch.no_grad():
        features = model.eval().forward_head(model.forward_features(data), pre_logits=True)
    weight, bias = model.head.weight.detach().clone(), model.head.bias.detach().clone()
    average = weight.clone()
    for part in range(6):
        x, y = features.roll(2 * part, 0)[:4], labels.roll(2 * part)[:4]
        errors = ((x @ weight.T + bias).softmax(dim=1) - torch.eye(5, dtype=x.dtype)[y]) / 4
        weight, bias = weight - 0.3 * errors.T @ x, bias - 0.3 * errors.sum(dim=0)
        average += 0.2 * (weight - average)

    before = {name: value.clone() for name, value in model.state_dict().items()}
    ema = build.build_ema(parse("--model-ema-decay", 0.8), model)
    loss_fn = DiverseLoss(model, {}, BatchAugmentation(NO_MIX), frozen=frozen_modules(model, "backbone"))
    optimizer = build.build_optimizer(parse("--opt", "momentum", "--momentum", 0, "--weight-decay", 0), model, 0.3)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2
    batches = [(data.roll(2 * part, 0)[:4], labels.roll(2 * part)[:4]) for part in range(6)]
    with mock.patch("torch._foreach_lerp_", side_effect=torch._foreach_lerp_) as lerp:
        train_epoch(loss_fn, batches, make_state(model, optimizer, ema), world=CPU)
    assert [len(call.args[0]) for call in lerp.call_args_list] == [2] * 6  # the average of the head
    torch.testing.assert_close((model.head.weight, model.head.bias), (weight, bias))
    torch.testing.assert_close(ema.module.head.weight, average)
    for state in (model.state_dict(), ema.module.state_dict()):
        changed = {name for name, value in state.items() if not torch.equal(value, before[name])}
        assert changed == {"head.weight", "head.bias"}


def test_a_run_trains_a_new_head_on_the_weights_of_a_file(probe, trained):
    """Bit for bit the file's backbone, in the weights and their average; all of it is in the checkpoint, as always."""
    before = torch.load(trained, weights_only=True)["model"]
    checkpoint = torch.load(probe[0] / "checkpoint.pth", weights_only=True)
    for key in ("model", "model_ema"):
        after = checkpoint[key]
        assert after.keys() == before.keys()
        changed = {name for name in before if not torch.equal(after[name], before[name])}
        assert changed == {"head.weight", "head.bias"}
    assert len(checkpoint["optimizer"]["state"]) == 2
    assert not torch.equal(checkpoint["model"]["head.weight"], checkpoint["model_ema"]["head.weight"])


def test_a_stopped_probe_ends_as_one_that_was_not_stopped(probe, trained, tmp_path, monkeypatch):
    folder, digests = probe
    flags = (*PROBE, "--finetune", trained)
    assert cut_run(monkeypatch, tmp_path / "run", (0, 2), (1, 1), flags=flags) == digests
    assert (content(tmp_path / "run"), records(tmp_path / "run")) == (content(folder), records(folder))


@pytest.mark.parametrize("what", ["none", "backbone", "patch-embed"])
def test_the_flags_set_the_modes_of_training(what):
    args = parse(*PROBE, "--freeze", what)
    model = build.build_initial(args, 5)
    build.build_diverse_loss(args, CPU, model, 5).train()
    blocks = {module.training for module in model.blocks.modules()}
    assert blocks == {what != "backbone"} and model.training and model.head_drop.training
    assert model.patch_embed.training == (what == "none")


def test_another_part_cannot_be_frozen_in_a_resumed_run(probe):
    words = [*PROBE, "--resume", probe[0] / "checkpoint.pth", "--epochs", 3, "--resume-with-changes"]
    for what in ("none", "patch-embed"):
        with pytest.raises(SystemExit) as caught:
            run_main(*words, "--freeze", what)
        one_line(caught, f"--freeze backbone -> {what}", "--finetune", "--output-dir")


@pytest.mark.parametrize("head_init", [None, 0.01, 0])
def test_the_head_of_a_file_is_kept_or_drawn_anew(head_init, trained, tmp_path, capsys):
    """With the same values in each run of a seed; the log names what is not the file's."""
    words = [*TINY, "--finetune", trained, "--lr", 1e-12, "--unscale-lr", "--warmup-epochs", 0, "--weight-decay", 0]
    words += [] if head_init is None else ["--head-init", head_init]
    run_main(*words, "--output-dir", tmp_path / "run")
    head = torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)["model"]["head.weight"]
    of_file = torch.load(trained, weights_only=True)["model"]["head.weight"]
    assert torch.allclose(head, of_file, atol=1e-8) == (head_init is None)
    if head_init is not None:
        assert head.std().item() == pytest.approx(head_init, rel=0.2, abs=1e-8)
        initial = build.build_initial(parse_args([*map(str, words)]), 10).head.weight
        torch.testing.assert_close(head, initial.detach(), atol=1e-8, rtol=0)
    out = capsys.readouterr().out
    assert out.count("head.weight is drawn anew") == out.count("head.bias is drawn anew") == (head_init is not None)


def test_two_ranks_with_a_frozen_part_take_the_steps_of_one_process():
    result = run_ranks(2, "tests/ddp_frozen.py")
    assert result.returncode == 0, result.stderr
    (differences,) = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert max(differences.values()) < 1e-12


def test_terms_without_a_gradient_are_refused_by_name(capsys):
    for name in REGULARIZERS:
        line = error_of(capsys, ["--freeze", "backbone", f"--{name}_coef", "1", "--mixing-coef", "1"])
        flag = f"--{name.replace('_', '-')}-coef"
        assert f"no gradient to {flag}, which" in line
    assert parse_args(["--freeze", "backbone", "--mixing-coef", "1"]).mixing_coef == 1
    assert parse_args(["--freeze", "patch-embed", "--preset", "released"]).emb_cos_within_coef == 0.5


def test_what_a_frozen_backbone_makes_of_other_flags():
    words = "--freeze backbone --layer-decay 0.7 --drop-path 0.3 --grad-checkpointing --drop 0.1"
    reported = {line.split()[0] for line in without_effect(parse_args(words.split()))}
    assert reported == {"--layer-decay", "--drop-path", "--grad-checkpointing"}
    for more, is_reported in (("", True), ("--finetune a.pth", False), ("--resume a.pth", False)):
        args = parse(*["--freeze", "backbone"], *more.split())
        lines = run_warnings(args, None, 0.1, 100)
        assert any("random weights" in line for line in lines) == is_reported


@pytest.mark.parametrize(("words", "classes"), [(["--freeze", "patch-embed"], 5), (["--head-init", "0.1"], 0)])
def test_a_model_without_the_part_is_refused(words, classes):
    args = parse_args([*map(str, (*BRIEF, *CONVNET)), *words])
    with pytest.raises(SystemExit) as caught:
        build.build_initial(args, classes)
    one_line(caught, f"--model resnet10t cannot be used with {words[0]}", "ResNet has no")
