"""Deep copies of DiverseLoss and TappedViT, such as averages of weights make: their own model, weights and hooks."""

import copy

import numpy as np
import pytest
import timm
import torch

from diversity import DiverseLoss, PatchMixup, TappedViT, apply_remedy

COEFS = {"mixing": 1.0, "emb_cos_within": 0.5, "emb_contrast_cross": 0.5, "attn_cos_within": 0.1, "weight_mha_so": 0.1}
SIZE = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 3, "num_classes": 5}
IMAGES, LABELS = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 3])


def loss_of(loss_fn) -> torch.Tensor:
    np.random.seed(0)
    return loss_fn(IMAGES, LABELS)[0]


def hooks_of(model) -> list[int]:
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


@pytest.fixture
def loss_fn():
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224", **SIZE)
    apply_remedy(model, "attnscale")
    return DiverseLoss(model, COEFS, mixup=PatchMixup(), attn_layers="all")


def test_a_copy_has_its_own_model(loss_fn):
    before, hooks = loss_of(loss_fn), hooks_of(loss_fn.model)
    copied = copy.deepcopy(loss_fn)
    assert copied.model is not loss_fn.model and copied.names == loss_fn.names
    assert hooks_of(loss_fn.model) == hooks and hooks_of(copied.model) == hooks
    assert torch.equal(loss_of(copied), before)
    loss_of(copied).backward()
    assert all(parameter.grad is None for parameter in loss_fn.model.parameters())
    with torch.no_grad():
        for parameter in copied.model.parameters():
            parameter.add_(parameter.grad, alpha=-0.1)
    assert torch.equal(loss_of(loss_fn), before) and loss_of(copied) < before


def test_a_copy_keeps_its_mode(loss_fn):
    copied = copy.deepcopy(loss_fn.eval())
    assert not copied.training and not copied.tapped.training
    assert torch.equal(copied(IMAGES), loss_fn(IMAGES))


def test_a_copy_of_a_closed_wrapper_has_no_hooks():
    model = timm.create_model("deit_tiny_patch16_224", **SIZE)
    tapped, hooks = TappedViT(model, {"last", "attention"}), hooks_of(model)
    tapped.close()
    copied = copy.deepcopy(tapped)
    assert sum(hooks) > 0 == sum(hooks_of(model)) == sum(hooks_of(copied.model))
    assert copied.train()(IMAGES).last is None


def test_a_compiled_loss_is_not_copied(loss_fn):
    loss_fn.compile_step(backend="eager")
    with pytest.raises(TypeError, match="copy it before compile_step"):
        copy.deepcopy(loss_fn)
