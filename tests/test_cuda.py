"""What only a GPU can show, the longest test last; `python benchmark.py gpu` runs and reports these tests."""

import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from signal import SIGTERM

import pytest
import torch
from cutting import content, points
from families import FAMILIES, build, objective_of
from families import images as images_of_a_family
from helpers import REPOSITORY, TINY, parse, run_main, run_process, train_epoch
from steps import images, make_state, small_vit, train, weights
from timm.utils import ModelEmaV3
from torch._dynamo.utils import counters
from torch._inductor import cudagraph_trees

from benchmarks import training_steps
from benchmarks.measure import host_syncs
from diversity import REGULARIZERS, MixedTarget, PatchMixup, TappedViT
from engine import autocast_dtype
from training.background import copy_to_cpu
from training.build import build_augmentation, build_diverse_loss, build_initial, build_optimizer, compile_and_wrap
from training.log import RunLog
from training.stopping import RESUMABLE
from utils import World, reseed

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

ON_GPU = World(0, 1, 0, 1, torch.device("cuda:0"))
SMALL = (*TINY, "--device", "cuda:0", "--model-kwargs", "depth=1", "embed_dim=24", "num_heads=3")
TWENTY_STEPS = (
    *(*SMALL, "--amp", "off", "--batch-size", "64", "--log-interval", "1", "--tensorboard"),
    *("--warmup-epochs", "0", "--lr", "1e-3", "--unscale-lr"),
)
"""Flags of an epoch of 20 steps in full precision, each of which is logged."""


def losses_of(folder, *words):
    """The loss of every step of a real run, and its last record."""
    run_main(*TWENTY_STEPS, *words, "--output-dir", folder)
    losses = [loss for _, loss in points(folder)["train/loss"]]
    assert len(losses) == 20
    return losses, json.loads((folder / "log.txt").read_text())


# Waits of the host


@pytest.mark.parametrize("words", ["--no-compile", "--compile", "--compile --compile-mode reduce-overhead"])
def test_the_host_never_waits_in_a_step(words):
    args = parse(*SMALL, "--preset", "released", *words.split())
    run = training_steps.diversified(args, ON_GPU)
    run(4)
    assert host_syncs(run, ON_GPU.device) == 0


def test_a_non_finite_step_is_skipped_without_waiting(capsys):
    """By fused AdamW, bit for bit; a step that waited would raise."""
    model = small_vit().cuda()
    state = make_state(model, build_optimizer(parse(), model, 0.01), ModelEmaV3(model, decay=0.9))
    batches = [tuple(tensor.cuda() for tensor in images(4, seed=seed)) for seed in range(4)]
    batches[2][0].fill_(math.nan)
    after = []

    def after_step():
        after.append((weights(model), weights(state.model_ema.module)))
        torch.cuda.set_sync_debug_mode("error" if state.step < len(batches) else "default")

    try:
        train(model, batches, state=state, budget=1, world=ON_GPU, after_step=after_step, log_interval=0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    changed = [not torch.equal(after[i][0], after[i - 1][0]) for i in range(1, len(batches))]
    averaged = [not torch.equal(after[i][1], after[i - 1][1]) for i in range(1, len(batches))]
    assert changed == [True, False, True] and averaged == [True, True, True]
    assert after[-1][0].isfinite().all() and after[-1][1].isfinite().all()
    assert "epoch 0 step 2: step skipped" in capsys.readouterr().out


# The fast path


@pytest.mark.parametrize("part", ["fused optimizer", "prefetcher"])
def test_a_run_trains_the_same_without_a_part_of_the_fast_path(part, tmp_path, monkeypatch):
    """So a prefetcher makes the batches of the float path."""
    words = ["--preset", "released", "--reprob", "0", "--no-compile"]
    losses, record = losses_of(tmp_path / "with", *words)
    if part == "prefetcher":
        words.append("--no-prefetcher")
    else:
        monkeypatch.setattr("training.build.can_fuse", lambda opt: False)
    other_losses, other_record = losses_of(tmp_path / "without", *words)
    assert losses == pytest.approx(other_losses, rel=1e-3)
    assert record["test_loss"] == pytest.approx(other_record["test_loss"], rel=1e-3)


@pytest.mark.parametrize("terms", ["", "--preset released"])
def test_twenty_steps_compiled_are_those_of_eager(terms, tmp_path):
    """With drop-path, random erasing and the terms' probes drawn the same."""
    compiled, eager = (losses_of(tmp_path / flag, flag, *terms.split())[0] for flag in ("--compile", "--no-compile"))
    assert compiled == pytest.approx(eager, rel=1e-3)
    assert compiled != eager  # else nothing was compiled


@pytest.mark.parametrize("words", ["--accum-steps 2", "--amp fp16 --clip-grad 1"])
def test_steps_as_cuda_graphs_are_those_of_eager(words):
    """With drop-path, erasing and probes drawn the same; the norms of gradients are measured between two of them."""
    words = ["--amp", "off", "--drop-path", "0.5", "--reprob", "0.5", "--preset", "released", *words.split()]
    counters.clear()
    as_graphs = five_steps(ON_GPU, *words, "--compile", "--compile-mode", "reduce-overhead")
    assert counters["inductor"]["cudagraph_skips"] == 0
    manager = cudagraph_trees.get_manager(0, create_if_none_exists=False)
    assert manager is not None and any(manager.roots.values())
    eager = five_steps(ON_GPU, *words, "--no-compile")
    assert as_graphs != eager
    assert as_graphs == pytest.approx(eager, rel=3e-2 if "fp16" in words else 1e-3)


def five_steps(world, *words):
    """The losses of five optimizer steps on bytes, by SGD."""
    args = parse(*SMALL, "--model-kwargs", "depth=2", "embed_dim=24", "num_heads=3", *words)
    model = build_initial(args, 10).to(world.device)
    loss_fn = build_diverse_loss(args, world, model, 10, build_augmentation(args, of_bytes=True))
    loss_fn = compile_and_wrap(args, world, loss_fn)
    dtype = autocast_dtype(args.amp, world.device)
    scaler = torch.amp.GradScaler(world.device.type, init_scale=256, enabled=dtype == torch.float16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    state = make_state(model, optimizer, ModelEmaV3(model, decay=0.9), scaler)
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8, generator=generator), torch.arange(8))
        for _ in range(5 * args.accum_steps)
    ]
    log, losses = RunLog(None, world, tensorboard=False), []
    log.scalars = lambda values, step: losses.append(values["train/loss"])

    def measure(number, *batch):
        if number == 3:
            loss_fn.gradient_norms(*batch)

    train_epoch(
        loss_fn, batches, state, world=world, log=log, log_interval=1, amp_dtype=dtype, before_batch=measure,
        accum_steps=args.accum_steps, clip_grad=args.clip_grad,
    )  # fmt: skip
    assert len(losses) == 5
    return losses


def test_two_processes_on_one_card_have_the_gradients_of_one(tmp_path):
    flags = (*SMALL, "--preset", "released", "--no-compile", "--drop-path", "0", "--mixup", "0", "--cutmix", "0")
    one, two = tmp_path / "one", tmp_path / "two"

    def start(output, rank, size):
        words = ("tests/ddp_one_card.py", output, rank, size, *flags)
        return run_process(*words, environment={"PYTHONPATH": str(REPOSITORY)})

    with ThreadPoolExecutor() as threads:
        results = [*threads.map(start, (one, two, two), (0, 0, 1), (1, 2, 2))]
    assert [result.returncode for result in results] == [0, 0, 0], [result.stderr[-2000:] for result in results]
    one, two = (torch.load(path, weights_only=True) for path in (one, two))
    torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-12)
    assert any(gradient.abs().max() > 1e-3 for gradient in one.values())


# Parts


def test_reseed_sets_the_gpu():
    device = torch.device("cuda", 0)
    draws = []
    for counter in (1, 1, 2):
        reseed("step", counter, device=device)
        draws.append(torch.rand(4, device=device))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["deit", "eva02", "swin"])
def test_a_training_step_with_all_terms_on_cuda(name, dtype):
    objective = objective_of(FAMILIES[name])
    on_cpu, on_cuda = (
        TappedViT(build(name).float().to(device), objective.reads, objective.patch_logits) for device in ("cpu", "cuda")
    )
    samples, labels = images_of_a_family(4).float(), torch.tensor([0, 3, 1, 4])
    samples, target = PatchMixup(grid=on_cpu.grid)(samples, labels)
    with torch.autocast("cuda", dtype, enabled=dtype is not None):
        loss, terms = objective(on_cuda(samples.cuda()), MixedTarget(*(part.cuda() for part in target)))
    loss.backward()
    assert all(value.isfinite() for value in terms.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in on_cuda.parameters())
    if dtype is None:
        expected = objective(on_cpu(samples), target)[1]
        for term in REGULARIZERS:
            if term in terms and "cond_orth" not in term:  # which draw random start vectors
                assert terms[term].item() == pytest.approx(expected[term].item(), rel=2e-2, abs=1e-4), term


def test_a_copy_from_the_gpu_does_not_follow_the_original():
    whole = torch.randn(512, 1024, device="cuda")
    tree = {"whole": whole, "turned": whole.t(), "column": whole[:, 3], "more": [whole.clone() for _ in range(20)]}
    expected = {key: value.cpu().clone() for key, value in tree.items() if key != "more"}
    copies = copy_to_cpu(tree)
    whole.zero_()
    for key, value in expected.items():
        assert copies[key].device.type == "cpu" and copies[key].is_pinned() and torch.equal(copies[key], value)
    assert all(torch.equal(copy, expected["whole"]) for copy in copies["more"])


# Resuming


def test_a_deterministic_run_that_was_stopped_ends_bit_for_bit_as_one_that_was_not(tmp_path):
    words = ["main.py", *TWENTY_STEPS, "--preset", "released", "--deterministic", "--epochs", "3"]
    with ThreadPoolExecutor(1) as pool:
        whole = pool.submit(run_process, *words, "--output-dir", tmp_path / "whole")
        words += ["--output-dir", str(tmp_path / "cut"), "--resume", "auto"]
        stop_in_second_epoch(words)
        resumed = run_process(*words)
        assert whole.result().returncode == 0, whole.result().stderr
    assert resumed.returncode == 0, resumed.stderr
    assert "from step" in resumed.stdout
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


def stop_in_second_epoch(words):
    """Start a run, and send SIGTERM after the first step of its second epoch."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # as run_process does
    options = {"cwd": REPOSITORY, "env": environment, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, *words], **options) as run:
        next(line for line in run.stdout if line.startswith("epoch 1 "))
        run.send_signal(SIGTERM)
        run.communicate(timeout=120)
    assert run.returncode == RESUMABLE
