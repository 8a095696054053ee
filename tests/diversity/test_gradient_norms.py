"""DiverseLoss.gradient_norms: against torch.autograd by hand, and that it changes nothing."""

import copy

import numpy as np
import pytest
import textbook
import timm
import torch
from golden_inputs import normals
from helpers import assert_equal
from torch import nn

from diversity import REGULARIZERS, DiverseLoss, PatchMixup, TappedViT, apply_remedy

COEFS = {"mixing": 0.7, "emb_cos_within": 0.5, "attn_cos_within": 1e-4, "weight_mha_so": 0.01}
LABELS = torch.tensor([0, 3, 4, 2])


def vit(**kwargs):
    torch.manual_seed(0)
    size = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 3, "num_classes": 5}
    return timm.create_model("deit_tiny_patch16_224", **size | kwargs)


def with_random_numbers_and_buffers():
    model = vit(proj_drop_rate=0.1, drop_path_rate=0.2)
    apply_remedy(model, "reattention")  # which has the running statistics of a BatchNorm
    assert any(True for _ in model.buffers())
    return model


def norm_by_hand(value, model):
    total = 0.0
    for parameter in model.parameters():
        (grad,) = torch.autograd.grad(value, parameter, retain_graph=True, allow_unused=True)
        total += 0.0 if grad is None else grad.square().sum().item()
    return total**0.5


@pytest.mark.parametrize("where", ["always", "cutmix"])
def test_norms_are_those_of_autograd_by_hand(where):
    model, images = vit().double(), normals(1, 4, 3, 32, 32)
    loss_fn = DiverseLoss(model, COEFS, PatchMixup(mode="elem"), 0.1, mixing_where=where)
    np.random.seed(0)
    draws = loss_fn.mixup.draw(4, (32, 32))
    norms = loss_fn.gradient_norms(images, LABELS, draws)

    reads = {tap for name in COEFS if name != "mixing" for tap in REGULARIZERS[name].reads}
    with TappedViT(copy.deepcopy(vit()).double(), reads, patch_logits=True) as tapped:
        samples, target = loss_fn.mixup(images, LABELS, draws)
        output = tapped.train()(samples)
        values = {
            name: coef * textbook.TEXTBOOK[name](**{tap: getattr(output, tap) for tap in REGULARIZERS[name].reads})
            for name, coef in COEFS.items()
            if name != "mixing"
        }
        labels = target.labels, target.partner
        cls_ce = textbook.token_cross_entropy(output.logits[:, None], *labels, target.lam[:, None], 0.1)[:, 0]
        patch_ce = textbook.token_cross_entropy(output.patch_logits, *labels, target.patch_lam, 0.1).sum(dim=1)
        cut = torch.tensor([where == "always" or len(set(lams)) > 1 for lams in target.patch_lam.tolist()])
        coef = 0.7 * cut.double()
        values["cls_ce"] = (cls_ce / (1 + 16 * coef)).mean()
        values["mixing"] = (coef * patch_ce / (1 + 16 * coef)).mean()
        values["classification"] = values["cls_ce"] + values["mixing"]
        expected = {name: norm_by_hand(values[name], tapped.model) for name in norms}
    assert [*norms] == ["classification", "cls_ce", *COEFS]
    assert {name: norm.item() for name, norm in norms.items()} == pytest.approx(expected, rel=1e-9)
    assert all(norm.dim() == 0 and not norm.requires_grad for norm in norms.values())


def test_they_change_no_state():
    loss_fn = DiverseLoss(with_random_numbers_and_buffers(), COEFS, PatchMixup(), diversity_warmup=4)
    loss_fn.set_epoch(2)
    images = normals(1, 4, 3, 32, 32).float()
    loss_fn(images, LABELS)[0].backward()

    def state():
        of_numpy = np.random.get_state()[1].tolist()
        grads = [parameter.grad.clone() for parameter in loss_fn.model.parameters()]
        values = {name: value.clone() for name, value in loss_fn.model.state_dict().items()}
        return [torch.get_rng_state(), of_numpy, grads, values, loss_fn.objective.factor.item(), images.clone()]

    before = state()
    norms = loss_fn.gradient_norms(images, LABELS)
    assert_equal(state(), before)
    assert all(norm > 0 for norm in norms.values())


def test_the_random_numbers_are_those_of_the_step_that_follows():
    """So the sum of the gradients is that of the step."""
    loss_fn = DiverseLoss(with_random_numbers_and_buffers(), {}, PatchMixup())
    images = normals(1, 4, 3, 32, 32).float()
    norm = loss_fn.gradient_norms(images, LABELS)["classification"]
    loss_fn(images, LABELS)[0].backward()
    assert nn.utils.get_total_norm([parameter.grad for parameter in loss_fn.model.parameters()]) == norm


def test_training_is_the_same_with_and_without_them():
    weights = []
    for measures in (False, True):
        model = with_random_numbers_and_buffers()
        loss_fn = DiverseLoss(model, COEFS, PatchMixup(), 0.1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        np.random.seed(0), torch.manual_seed(0)
        for seed in range(3):
            images = normals(seed, 4, 3, 32, 32).float()
            if measures:
                loss_fn.gradient_norms(images, LABELS)
            loss_fn(images, LABELS)[0].backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(model.state_dict())
    assert_equal(weights[0], weights[1])


def test_a_term_without_a_gradient_has_norm_0():
    model = vit()
    for block in model.blocks:
        block.attn.qkv.weight.requires_grad_(False)
    loss_fn = DiverseLoss(model, {"emb_cos_within": 0.5, "weight_mha_so": 1.0}, diversity_until=3)
    images = normals(1, 4, 3, 32, 32).float()
    loss_fn.set_epoch(0)
    norms = loss_fn.gradient_norms(images, LABELS)
    assert norms["weight_mha_so"] == 0 < norms["emb_cos_within"]
    loss_fn.set_epoch(3)
    norms = loss_fn.gradient_norms(images, LABELS)
    assert norms["emb_cos_within"] == 0 < norms["classification"] == norms["cls_ce"]


def test_small_gradients_survive_float16():
    model, images = vit(), normals(1, 4, 3, 32, 32).float()
    loss_fn = DiverseLoss(model, {"emb_cos_within": 1e-7})
    full = loss_fn.gradient_norms(images, LABELS)["emb_cos_within"]
    with torch.autocast("cpu", torch.float16):
        half = loss_fn.gradient_norms(images, LABELS)["emb_cos_within"]
    assert half.item() == pytest.approx(full.item(), rel=0.02)


def test_under_autocast_the_norm_is_that_of_a_training_step():
    """Whose backward pass is outside of autocast."""
    model, images = vit(), normals(1, 4, 3, 32, 32).float()
    loss_fn = DiverseLoss(model, {})
    with torch.autocast("cpu", torch.bfloat16):
        norm = loss_fn.gradient_norms(images, LABELS)["cls_ce"]
        loss, _ = loss_fn(images, LABELS)
    loss.backward()
    assert nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()]) == norm


def test_gradient_checkpointing_changes_nothing():
    images, found = normals(1, 4, 3, 32, 32), []
    for checkpointed in (False, True):
        model = vit().double()
        model.set_grad_checkpointing(checkpointed)
        found.append(DiverseLoss(model, COEFS).gradient_norms(images, LABELS))
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=0)


def test_what_cannot_be_measured_is_an_error():
    loss_fn, images = DiverseLoss(vit(), COEFS), normals(1, 4, 3, 32, 32).float()
    with pytest.raises(ValueError, match="call train"):
        loss_fn.eval().gradient_norms(images, LABELS)
    with torch.inference_mode(), pytest.raises(ValueError, match="inference mode"):
        loss_fn.train().gradient_norms(images, LABELS)
    with torch.no_grad():
        assert loss_fn.gradient_norms(images, LABELS)["cls_ce"] > 0
