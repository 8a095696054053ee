"""Every family of backbones: TappedViT against a forward pass unrolled by hand, and a training step on it."""

import copy

import numpy as np
import pytest
import torch
from families import FAMILIES, attentions, build, fused, hooks, images, objective_of, taps_of
from timm.layers import Attention
from unrolled import unrolled

from diversity import LEVELS, TAPS, PatchMixup, TappedViT

# --- values


@pytest.mark.parametrize("layers", ["default", "all"])
@pytest.mark.parametrize("name", FAMILIES)
def test_taps_equal_an_unrolled_forward(name, layers):
    family, model, samples = FAMILIES[name], build(name), images()
    stock = copy.deepcopy(model)
    chosen, indices = {}, {}
    if layers == "all":
        every = range(2 if "swin" in name else 3)
        chosen = dict(emb_layers="all", attn_layers="all", weight_groups=family.weight_groups)
        indices = dict(emb_layers=every, attn_layers=every, groups=family.weight_groups)
    output = TappedViT(model, reads=taps_of(family), patch_logits=True, **chosen)(samples)
    expected = unrolled(name, stock, samples, **indices)
    for tap in (*taps_of(family), "patch_logits", "logits"):
        value = getattr(output, tap)
        torch.testing.assert_close(value, expected[tap], rtol=1e-9, atol=1e-10, msg=lambda m, t=tap: f"{t}: {m}")
    torch.testing.assert_close(output.logits, stock(samples), rtol=1e-9, atol=1e-10)
    assert output.dist_logits is None


@pytest.mark.parametrize("name", FAMILIES)
def test_eval_returns_the_logits_of_the_untouched_fused_model(name):
    stock = build(name).eval()
    tapped = TappedViT(copy.deepcopy(stock), taps_of(FAMILIES[name]), True, emb_layers="all", attn_layers="all").eval()
    for attn in attentions(stock):
        attn.fused_attn = True
    logits = tapped(images())
    assert type(logits) is torch.Tensor
    torch.testing.assert_close(logits, stock(images()), rtol=0, atol=1e-6)
    assert not tapped._captured


def test_weights_come_block_by_block_and_then_by_group():
    blocks = build().blocks
    qkv, proj = ([getattr(block.attn, group).weight for block in blocks] for group in ("qkv", "proj"))
    fc1 = [block.mlp.fc1.weight for block in blocks]

    def weights(groups):
        return TappedViT(build(), ["weights"], weight_groups=groups)(images()).weights

    assert torch.equal(weights("qkv"), torch.stack([rows for matrix in qkv for rows in matrix.split(24)]))
    assert torch.equal(weights("fc1"), torch.stack(fc1))
    square = [rows for i in range(3) for rows in (*qkv[i].split(24), proj[i])]
    assert torch.equal(weights("proj,qkv"), torch.stack(square))
    for stacks in (weights("fc1,proj,qkv"), weights(("qkv", "proj", "fc1"))):
        assert type(stacks) is tuple and len(stacks) == 2
        assert torch.equal(stacks[0], torch.stack(square)) and torch.equal(stacks[1], torch.stack(fc1))


# --- hooks


@pytest.mark.parametrize("name", FAMILIES)
def test_close_restores_the_model_whose_keys_are_timms(name):
    model = build(name)
    keys = list(model.state_dict())
    for attn in attentions(model):
        attn.fused_attn = True
    tapped = TappedViT(model, taps_of(FAMILIES[name]), patch_logits=True, emb_layers="all", attn_layers="all")
    tapped_blocks = model.layers[-1].blocks if "swin" in name else model.blocks
    assert list(tapped.model.state_dict()) == keys
    assert list(tapped.state_dict()) == [f"model.{key}" for key in keys]
    compiled = sum(type(block.attn) is Attention for block in tapped_blocks)  # their maps have a second hook
    assert len(hooks(model)) == 1 + 2 * len(tapped_blocks) + compiled + 1  # first, last and attention of each, norm
    assert fused(model).count(False) == sum(hasattr(block.attn, "fused_attn") for block in tapped_blocks)
    tapped.close()
    assert hooks(model) == [] and all(fused(model))


# --- training


def step(tapped, objective):
    """The output, the loss and the gradients of one training step."""
    samples, labels = images(4), torch.tensor([0, 3, 1, 4])
    np.random.seed(0)
    samples, target = PatchMixup(grid=tapped.grid)(samples.to(next(tapped.parameters()).dtype), labels)
    torch.manual_seed(0)
    output = tapped(samples)
    loss, terms = objective(output, target)
    loss.backward()
    gradients = {name: p.grad for name, p in tapped.model.named_parameters() if p.grad is not None}
    return output, loss.detach(), terms, gradients


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_training_step_with_all_terms_of_a_level(name, level):
    family, model = FAMILIES[name], build(name).float()
    objective = objective_of(family, [level])
    tapped = TappedViT(model, objective.reads, objective.patch_logits, weight_groups=family.weight_groups)
    _, loss, terms, gradients = step(tapped, objective)
    model.zero_grad()
    model(images().float()).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} <= gradients.keys()
    assert loss.isfinite() and all(value.isfinite() for value in terms.values())
    assert [name for name, gradient in gradients.items() if not gradient.isfinite().all()] == []
    assert set(objective.coefs) <= terms.keys() and len(objective.coefs) > 4


@pytest.mark.parametrize("name", ["deit", "beit", "eva02", "swin"])
def test_checkpointing_changes_neither_taps_nor_gradients(name):
    results = []
    for checkpointing in (False, True):
        model = build(name)
        model.set_grad_checkpointing(checkpointing)
        objective = objective_of(FAMILIES[name])
        tapped = TappedViT(model, TAPS, patch_logits=True, emb_layers="all", attn_layers="all")
        results.append(step(tapped, objective))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10)
