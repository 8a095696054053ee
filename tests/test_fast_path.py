"""Each part of the fast path trains like the plain one."""

import json
import shutil
from functools import partial

import pytest
import torch
from helpers import TINY, few_digits, model_of, parse, run_main, train_epoch, world
from ranks import run_ranks
from steps import images, make_state, small_vit
from timm.utils import ModelEmaV3
from torch._dynamo.backends.common import aot_autograd

from datasets import DataOptions
from diversity import PRESETS, REGULARIZERS, DiverseLoss, DiversityObjective, PatchMixup
from models.execution import (
    PatchProduct,
    keep_residual_in_bfloat16,
)
from pipeline.batch_augmentation import BatchAugmentation
from training import build
from training.arguments import parse_args
from training.build import build_initial, compile_and_wrap, should_compile
from training.log import RunLog
from utils import World

ON_GPU = World(0, 1, 0, 1, torch.device("cuda:0"))
ALL_TERMS = {"mixing": 1.0} | dict.fromkeys(REGULARIZERS, 0.01)


def losses_of(training_loss, model, num_steps):
    """The loss of every step, with AdamW and the average."""
    state = make_state(model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True), ModelEmaV3(model, decay=0.9))
    log, losses = RunLog(None, world(), tensorboard=False), []
    log.scalars = lambda values, step: losses.append(values["train/loss"])
    log.print = lambda text: None
    batches = [images(4, seed=seed) for seed in range(num_steps)]
    train_epoch(training_loss, batches, state, world=world(), log=log, log_interval=1)
    return losses


def losses_of_both(coefs, smoothing=0.1, mixup=None, **settings):
    """Twenty losses in eager mode and compiled by inductor, with the same draws of dropout, drop-path and probes."""
    losses = []
    for flag in ("--no-compile", "--compile"):
        model = small_vit(depth=2, proj_drop_rate=0.1, drop_path_rate=0.1)
        loss_fn = DiverseLoss(model, coefs, BatchAugmentation(mixup or PatchMixup()), smoothing, **settings)
        losses.append(losses_of(compile_and_wrap(parse(flag), world(), loss_fn), model, 20))
    return losses


OBJECTIVES = {
    "no term": dict(coefs={}),
    "no term, no smoothing, no mixing": dict(coefs={}, smoothing=0.0, mixup=PatchMixup(0, 0)),
}
MORE_OBJECTIVES = {
    **{name: dict(coefs=preset.coefs, **preset.settings) for name, preset in PRESETS.items()},
    "released, no smoothing, no mixing":
        dict(coefs=PRESETS["released"].coefs, smoothing=0.0, mixup=PatchMixup(0, 0, grid=(4, 4))),
    "cut images only, with a schedule": dict(coefs={"mixing": 1.0}, mixing_where="cutmix", diversity_until=9),
    **{name: dict(coefs={name: term.coef or 1e-3}) for name, term in REGULARIZERS.items() if "grad" not in term.reads},
}  # fmt: skip


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    "objective",
    [*OBJECTIVES.values(), *(pytest.param(each, marks=pytest.mark.slow) for each in MORE_OBJECTIVES.values())],
    ids=[*OBJECTIVES, *MORE_OBJECTIVES],
)
def test_twenty_steps_compiled_are_those_of_eager(objective):
    eager, compiled = losses_of_both(**objective)
    assert len(compiled) == 20
    assert compiled == pytest.approx(eager, rel=1e-5)
    assert compiled != eager or not objective["coefs"]  # else nothing was compiled


def breaks_forward(training_loss):
    """As a model would that torch.compile cannot trace."""
    loss = training_loss._loss

    def with_graph_break(*batch):
        torch._dynamo.graph_break("this model breaks the graph")
        return loss(*batch)

    training_loss._loss = with_graph_break


def breaks_backward(training_loss):
    def refuse(graph, inputs):
        raise NotImplementedError("this backward pass has no kernel")

    backend = aot_autograd(fw_compiler=lambda graph, inputs: graph, bw_compiler=refuse)
    training_loss.compile_step = partial(training_loss.compile_step, backend=backend, options=None)


@pytest.mark.parametrize("fault", [breaks_forward, breaks_backward])
def test_a_step_that_does_not_compile_runs_in_eager_mode_unless_it_was_asked_for(fault, monkeypatch, capsys):
    losses = {}
    for flag in ("--no-compile", "--compile", None):
        torch._dynamo.reset()
        model = small_vit()
        training_loss = DiverseLoss(model, {"emb_cos_within": 0.5}, BatchAugmentation(), smoothing=0.1)
        args = parse(*([flag] if flag else []))
        if flag != "--no-compile":
            fault(training_loss)
            monkeypatch.setattr(build, "should_compile", lambda *_: True)  # as on a GPU
        compile_and_wrap(args, world(), training_loss)
        monkeypatch.undo()
        if flag == "--compile":
            with pytest.raises(SystemExit, match=r"^error: --compile: the training step cannot be compiled: .*\S$"):
                losses_of(training_loss, model, 3)
        else:
            losses[flag] = losses_of(training_loss, model, 3)
    assert losses[None] == losses["--no-compile"]
    errors = capsys.readouterr().err
    assert errors.count("warning: the training step of rank 0 cannot be compiled and runs in eager mode: ") == 1
    assert {breaks_forward: "graph break", breaks_backward: "this backward pass has no kernel"}[fault] in errors


@pytest.mark.parametrize("backend", [None, pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_grad_checkpointing_gives_the_gradients_of_every_term(backend):
    """Also compiled; then without the terms that read a gradient."""
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    samples, labels = images(4)
    augment = BatchAugmentation(PatchMixup())
    draws = augment.draw(samples, seed=0, rank=0, epoch=0, batch=0)
    gradients = []
    for checkpointing in (False, True):
        model = small_vit(drop_path_rate=0.1).double()
        model.set_grad_checkpointing(checkpointing)
        coefs = ALL_TERMS | ({"emb_grad_diversity": 0} if backend else {})
        training_loss = DiverseLoss(model, coefs, augment, smoothing=0.1).train()
        with training_loss.tapped:
            if backend and checkpointing:
                training_loss.compile_step(backend=backend)
            torch.manual_seed(0)
            training_loss(samples.double(), labels, draws)[0].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-12)


def test_compiling_is_for_gpus_and_not_for_terms_that_read_a_gradient():
    plain, with_gradient = DiversityObjective({"mixing": 1}), DiversityObjective({"emb_grad_diversity": 1})
    assert should_compile(parse(), ON_GPU, plain)
    assert not should_compile(parse("--no-compile"), ON_GPU, plain)
    assert not should_compile(parse(), world(), plain)
    assert should_compile(parse("--compile"), world(), plain)
    assert not should_compile(parse(), ON_GPU, with_gradient)
    with pytest.raises(SystemExit, match="--emb-grad-diversity-coef"):
        run_main(*TINY, "--compile", "--emb_grad_diversity_coef", "1")


def without_fused_optimizer(patch):
    patch.setattr(build, "can_fuse", lambda opt: False)
    return []


def without_decoding_once(patch):
    patch.setitem(DataOptions.__init__.__kwdefaults__, "decode_once", False)
    return []


PARTS = {
    **{flag: lambda patch, flag=flag: [flag] for flag in ("--no-fused-attn", "--grad-checkpointing")},
    **{flag: lambda patch, flag=flag: [flag] for flag in ("--prefetcher", "--channels-last")},
    "no fused optimizer": without_fused_optimizer,
    "no decoding once": without_decoding_once,
}


def record_of(folder, *words):
    """What a short run with the released terms writes into its log."""
    with few_digits(512):
        run_main(*TINY, "--preset", "released", "--reprob", 0, *words, "--output_dir", folder)
    return json.loads((folder / "log.txt").read_text())


@pytest.fixture(scope="module")
def default_record(tmp_path_factory):
    return record_of(tmp_path_factory.mktemp("default") / "run")


@pytest.mark.parametrize("change", PARTS.values(), ids=PARTS)
def test_a_run_trains_in_the_same_way_without_a_part(change, default_record, tmp_path, monkeypatch):
    record = record_of(tmp_path / "run", *change(monkeypatch))
    for name, value in default_record.items():
        if name not in ("train_images_per_s", "train_data_wait"):
            assert record[name] == pytest.approx(value, rel=1e-3), name


@pytest.mark.parametrize(("side", "patch"), [((32, 32), 8), ((24, 40), 8), ((12, 18), (4, 6))])
def test_a_patch_product_is_the_convolution(side, patch):
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 5, patch, patch).double()
    images_ = torch.randn(2, 3, *side, dtype=torch.float64, requires_grad=True)
    results = []
    for kind in (torch.nn.Conv2d, PatchProduct):
        conv.__class__ = kind
        conv.zero_grad()
        value = conv(images_)
        (gradient,) = torch.autograd.grad(value.square().sum(), images_, retain_graph=True)
        value.square().sum().backward()
        results.append((value, gradient, conv.weight.grad.clone(), conv.bias.grad.clone()))
    for product, convolution in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(product, convolution, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layer_scale", [None, 0.5])
@pytest.mark.parametrize("residual", ["float32", "bfloat16"])
def test_blocks_hand_on_tokens_in_the_residual_dtype(residual, layer_scale):
    model = model_of(depth=3, init_values=layer_scale)
    if residual == "bfloat16":
        keep_residual_in_bfloat16(model)
    seen = []
    for block in model.blocks:
        block.norm1.register_forward_pre_hook(lambda norm, inputs: seen.append(inputs[0].dtype))
    samples = torch.randn(2, 3, 32, 32)
    full = model(samples)
    assert seen == [torch.float32] * 3
    with torch.autocast("cpu", torch.bfloat16):
        half = model(samples)
    assert seen[3:] == [getattr(torch, residual)] * 3
    torch.testing.assert_close(half.float(), full, rtol=0.05, atol=0.05)


def test_every_initial_model_has_the_residual_dtype_of_the_flags():
    """So a run's and a benchmark's."""
    model = build_initial(parse("--residual-dtype", "bfloat16", "--amp", "bf16"), 5)
    seen = []
    model.blocks[1].norm1.register_forward_pre_hook(lambda norm, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(2, 3, 32, 32))
    assert seen == [torch.bfloat16]


def test_the_residual_in_bfloat16_trains_nearly_the_same(tmp_path):
    losses = {}
    for residual in ("float32", "bfloat16"):
        record = record_of(tmp_path / residual, "--amp", "bf16", "--residual-dtype", residual)
        losses[residual] = record["train_loss"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=2e-2)
    assert losses["bfloat16"] != losses["float32"]


@pytest.mark.parametrize(
    ("model", "flag", "reason"),
    [
        ("regnety_002", "--patch-product", "RegNet has no convolution of patches that do not overlap"),
        ("regnety_002", "--residual-dtype bfloat16", "RegNet has no list of blocks"),
        ("pit_ti_224", "--grad-checkpointing", "PoolingVisionTransformer does not support gradient checkpointing"),
    ],
)
def test_a_model_that_a_flag_cannot_change_is_refused_in_one_line(model, flag, reason):
    args = parse_args(["--model", model, *flag.split()])
    with pytest.raises(SystemExit, match=f"^error: --model {model} cannot be used with {flag}: {reason}$"):
        build_initial(args, 5)


def test_two_ranks_exchange_what_plain_data_parallel_training_does():
    words = [*TINY, "--preset", "released", "--batch-size", "4"]
    result = run_ranks(2, "tests/ddp_volume.py", *words)
    assert result.returncode == 0, result.stderr
    (volume,) = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert volume["ours"] == volume["plain"]  # bucket by bucket
    assert volume["beside"] == [4, 8, 12, 16]  # bytes: whether a step was finite
    assert sum(volume["plain"]) == 4 * 4 * sum(p.numel() for p in model_of(num_classes=1000).parameters())


@pytest.mark.slow
def test_gradients_travel_early_also_compiled_with_checkpointed_blocks():
    """In many buckets that leave during the backward pass, and with equal gradients."""
    result = run_ranks(2, "tests/ddp_buckets.py")
    assert result.returncode == 0, result.stderr
    ways = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert len(ways) == 4
    for way in ways:
        assert way["early"] >= 4 and way["buckets"] >= 8
        assert way["norm"] == pytest.approx(ways[0]["norm"], rel=1e-6)
