"""--compile-mode: the step as CUDA graphs, whose memory each step overwrites; see also tests/test_cuda.py."""

from functools import partial

import pytest
import torch
from graph_memory import graph_memory
from helpers import parse, train_epoch, world
from steps import images, make_state, small_vit, weights
from timm.utils import ModelEmaV3
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from diversity import DiverseLoss, PatchMixup
from pipeline.batch_augmentation import BatchAugmentation, BatchErasing
from training.build import compile_and_wrap, compile_options
from training.flag_warnings import without_effect
from utils import World

ON_GPU = World(0, 1, 0, 1, torch.device("cuda:0"))


def trained(compile_step, accum_steps, before_batch=lambda *batch: None, wrap=None, **size):
    """Weights, their average and the means of the terms after three optimizer steps; with `wrap` one of two ranks."""
    model = small_vit(**{"depth": 1, "drop_path_rate": 0.5} | size)
    coefs = {"mixing": 1.0, "attn_cos_within": 0.1}
    loss_fn = DiverseLoss(model, coefs, BatchAugmentation(PatchMixup(), BatchErasing(0.5)), diversity_warmup=2)
    compile_step(loss_fn)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    state = make_state(model, optimizer, ModelEmaV3(model, decay=0.9))
    batches = [images(4, seed=seed) for seed in range(3 * accum_steps)]
    options = {"accum_steps": accum_steps, "clip_grad": 1.0, "before_batch": partial(before_batch, loss_fn)}
    wrapped = loss_fn if wrap is None else wrap(loss_fn)
    stats = train_epoch(wrapped, batches, state, world=world(size=1 if wrap is None else 2), **options)
    del stats["images_per_s"], stats["data_wait"]
    return weights(model), weights(state.model_ema.module), stats


@pytest.mark.parametrize("accum_steps", [1, 2])
def test_no_step_reads_what_an_earlier_one_has_returned(accum_steps):
    """Neither its terms nor, with accumulation, its gradients; and only the batch may change its address."""

    def measure(loss_fn, number, images, labels, draws):
        if number == 1:
            loss_fn.gradient_norms(images, labels, draws)

    eager = trained(lambda loss_fn: None, accum_steps)
    with graph_memory() as memory:
        with_graphs = partial(DiverseLoss.compile_step, backend=memory, options={"triton.cudagraphs": True})
        found = trained(with_graphs, accum_steps, measure)
    assert eager[2]["skipped_steps"] == 0
    for expected, value in zip(eager, found, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    assert memory.num_steps == 3 * accum_steps and len(memory.outputs) > 20
    names = ("draws_boxes", "draws_mixing", "images", "labels")
    assert [name.strip("_").removeprefix("l_") for name in sorted(memory.varying)] == [*names]


@pytest.mark.slow
def test_each_bucket_of_several_processes_is_a_graph():
    """One process takes part, which so has the gradients of both."""
    ddp = partial(DistributedDataParallel, gradient_as_bucket_view=True, bucket_cap_mb=1)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        eager = trained(lambda loss_fn: None, 2, wrap=ddp, depth=3, embed_dim=192)
        with graph_memory() as memory:
            with_graphs = partial(DiverseLoss.compile_step, backend=memory, options={"triton.cudagraphs": True})
            found = trained(with_graphs, 2, wrap=ddp, depth=3, embed_dim=192)
    finally:
        distributed.destroy_process_group()
    for expected, value in zip(eager, found, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    assert memory.num_graphs > 2 and memory.num_steps == 6
    assert not any("parameters" in name for name in memory.varying)


def test_losses_in_a_plain_loop_stay_as_they_were():
    """With graphs; without them no step is announced."""
    kept = []
    with graph_memory() as memory:
        loss_fn = DiverseLoss(small_vit(depth=1), {})
        loss_fn.compile_step(backend="eager")
        loss_fn(*images(4))
        assert memory.num_steps == 0
        loss_fn.compile_step(backend=memory, mode="reduce-overhead")
        for seed in range(3):
            loss, terms = loss_fn(*images(4, seed=seed))
            loss.backward()
            kept.append((loss, terms["loss"]))
    assert len({loss.item() for loss, _ in kept}) == 3 == memory.num_steps
    assert all(torch.equal(loss.detach(), of_terms) for loss, of_terms in kept)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_a_mode_sets_options_of_torch_compile_on_a_gpu(mode):
    """With the random numbers of eager mode."""
    loss_fn = DiverseLoss(small_vit(), {})
    on_gpu, on_cpu = (compile_options(parse("--compile-mode", mode), each) for each in (ON_GPU, world()))
    compile_and_wrap(parse("--compile-mode", mode), ON_GPU, loss_fn)  # torch refuses options that it does not know
    assert loss_fn.compiled and loss_fn.has_cuda_graphs == (mode != "default")
    assert on_gpu.get("triton.cudagraphs", False) == loss_fn.has_cuda_graphs
    assert on_gpu.get("max_autotune", False) == (mode == "max-autotune")
    assert on_gpu["fallback_random"] is True and on_cpu == {"fallback_random": True}


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--compile", "the device is a CPU"),
        ("--device auto --no-compile", "--no-compile"),
        ("--device auto --emb_grad_diversity_coef 1", "steps with a term that reads a gradient are eager"),
    ],
)
def test_a_mode_without_effect_is_reported(words, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "auto" in words)
    lines = without_effect(parse("--compile-mode", "reduce-overhead", *words.split()))
    assert set(lines) - {*without_effect(parse(*words.split()))} == {f"--compile-mode has no effect: {reason}"}
