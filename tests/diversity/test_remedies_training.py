"""Training with remedies: steps on every family, checkpointed and compiled blocks, taps, several processes."""

import json

import pytest
import torch
from families import attentions, build, images
from ranks import run_ranks
from remedied import SERVED, SETTINGS, gradients, of_family, with_remedies
from torch._dynamo.backends.debugging import aot_eager

from diversity import REMEDIES, DiverseLoss, PatchMixup, TappedViT, apply_remedy

COEFS = {"mixing": 1.0, "emb_cos_within": 0.5, "emb_contrast_cross": 0.5, "attn_cos_within": 0.1, "weight_mha_so": 1e-3}
LABELS = torch.tensor([0, 3, 1, 4])
TRAINED = ("deit", "deit3", "registers", "eva02", "swin")


@pytest.mark.parametrize("name", TRAINED)
def test_a_training_step_with_each_remedy(name):
    for remedy in SERVED[name]:
        model = build(name).float()
        apply_remedy(model, remedy, **SETTINGS.get(remedy, {}))
        before = [parameter.detach().clone() for parameter in model.parameters()]
        loss_fn = DiverseLoss(model, COEFS, mixup=PatchMixup(), smoothing=0.1).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        loss, terms = loss_fn(images(4).float(), LABELS)
        loss.backward()
        optimizer.step()
        assert loss.isfinite() and all(value.isfinite() for value in terms.values()), remedy
        assert all(gradient.isfinite().all() for gradient in gradients(model).values()), remedy
        assert all(p.grad.abs().sum() > 0 for p in model.remedies.parameters()), remedy
        assert sum(not torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True)) > 0.9 * len(before)
        logits = loss_fn.eval()(images(4).float())
        assert logits.shape == (4, 5) and logits.isfinite().all(), remedy


def test_taps_see_the_softmax_and_the_changed_tokens():
    stock, model = build(), with_remedies(build(), {"reattention": {}, "ortho_residual": {}})
    tapped = TappedViT(model, ["attention", "first", "last"])
    output, expected = tapped(images()), TappedViT(stock, ["attention", "first", "last"])(images())
    torch.testing.assert_close(output.attention, expected.attention)
    assert torch.equal(output.first, expected.first) and not torch.allclose(output.last, expected.last)
    tapped.close()
    assert [attn.fused_attn for attn in attentions(model)] == [False] * 3
    model(images())


# --- checkpointed blocks


def results(model, *batches, call=None):
    """Gradients and buffers after the forward passes of several batches and then their backward passes."""
    call = model if call is None else call
    for loss in [(call(batch) * torch.arange(5.0).double()).sum() for batch in batches]:
        loss.backward()
    assert model.remedies._kept == {}
    return gradients(model), dict(model.named_buffers())


@pytest.mark.parametrize("name", ["deit", "eva02", "swin"])
def test_checkpointed_blocks_have_the_same_gradients_and_statistics(name):
    found = []
    for checkpointing in (False, True):
        model = with_remedies(build(name), of_family(name))
        model.set_grad_checkpointing(checkpointing)
        found.append(results(model, images()))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-10)


def test_two_forward_passes_before_two_backward_passes():
    """A checkpointed block finds the values of its own forward pass, not those of the latest."""
    found = []
    for checkpointing in (False, True):
        model = with_remedies(build(), of_family("deit", without=["reattention"]))
        model.set_grad_checkpointing(checkpointing)
        found.append(results(model, images(), images(4).flip(0)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-10)


def test_blocks_that_do_not_follow_each_other_are_reported():
    model = with_remedies(build(), {"neutreno": {}})
    with pytest.raises(RuntimeError, match="the input of block 1 is not the output of block 0"):
        model.blocks[1](torch.zeros(1, 17, 24, dtype=torch.float64))


def test_a_hook_that_changes_the_input_of_blocks():
    """As the one that passes tokens from block to block in bfloat16."""
    found = []
    for changed in (False, True):
        model = build()
        for block in model.blocks if changed else ():
            block.register_forward_pre_hook(lambda block, inputs: (inputs[0].clone(),))
        found.append(with_remedies(model, {"value_residual": {}, "neutreno": {}})(images()))
    assert torch.equal(*found)


def test_reentrant_checkpointing_is_reported():
    model, samples = with_remedies(build(), {"value_residual": {}}), images()
    tokens = model._pos_embed(model.patch_embed(samples))
    for block in model.blocks:
        tokens = torch.utils.checkpoint.checkpoint(block, tokens, use_reentrant=True)
    with pytest.raises(RuntimeError, match="gradient checkpointing must be non-reentrant"):
        tokens.sum().backward()


# --- compiled models


@pytest.fixture
def compiling():
    """What the training step sets before it compiles checkpointed blocks."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        yield
    torch._dynamo.reset()


class Counting:
    """The backend aot_eager, which counts the outputs of each graph."""

    def __init__(self):
        self.outputs = []

    def __call__(self, graph, inputs):
        self.outputs.append(len(graph.graph.output_node().args[0]))
        return aot_eager(graph, inputs)


def test_a_compiled_step_with_terms_and_remedies_in_checkpointed_blocks(compiling):
    """One graph, which returns the loss and the terms and no tensor that a remedy keeps.

    The remedies are one for each kind of tensor that remedies read.
    """
    found, counting = [], Counting()
    for compiled in (False, True):
        chosen = ("value_residual", "reattention", "gfsa", "ortho_residual")
        model = with_remedies(build(depth=2), {remedy: SETTINGS.get(remedy, {}) for remedy in chosen})
        model.set_grad_checkpointing(True)
        loss_fn = DiverseLoss(model, {"attn_cos_within": 0.1}, smoothing=0.1).train()
        if compiled:
            loss_fn.compile_step(backend=counting)
        loss, terms = loss_fn(images(4), LABELS)
        loss.backward()
        assert model.remedies._kept == {}
        found.append((terms, gradients(model), dict(model.named_buffers())))
    torch.testing.assert_close(found[1], found[0], rtol=1e-8, atol=1e-10)
    assert counting.outputs == [2]


def assert_compiles(name, settings, checkpointing, backend):
    """As one graph, which returns the logits and nothing else."""
    found = []
    for compiled in (False, True):
        model = with_remedies(build(name), settings)
        model.set_grad_checkpointing(checkpointing)
        called = torch.compile(model, fullgraph=True, backend=backend) if compiled else model
        found.append(results(model, images(), call=called))
    torch.testing.assert_close(found[1], found[0], rtol=1e-8, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("remedy", REMEDIES)
def test_each_remedy_compiles_as_one_graph(compiling, remedy, checkpointing):
    counting = Counting()
    assert_compiles("deit", {remedy: SETTINGS.get(remedy, {})}, checkpointing, counting)
    assert counting.outputs == [1]


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["deit3", "registers", "eva02", "swin"])
def test_all_remedies_of_a_family_compile_as_one_graph(compiling, name, checkpointing):
    counting = Counting()
    assert_compiles(name, of_family(name), checkpointing, counting)
    assert counting.outputs == [1]


@pytest.mark.slow
@pytest.mark.parametrize("remedy", ["gfsa", "neutreno", "ortho_residual"])
def test_inductor(compiling, remedy):
    assert_compiles("deit", {remedy: SETTINGS.get(remedy, {})}, False, "inductor")


# --- several processes


def test_two_ranks_take_the_steps_of_one_process():
    result = run_ranks(2, "tests/ddp_remedies.py")
    assert result.returncode == 0, result.stderr
    (differences,) = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert [*differences] == ["loss", "weights"]
    assert max(differences.values()) < 1e-10
