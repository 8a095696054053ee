"""The term that reads the gradient of the classification loss: its value, its gradient, and its cost."""

from unittest import mock

import pytest
import textbook
import torch
from families import attentions, build, images
from golden_inputs import normals
from objective_inputs import BATCH, Distillation, outputs, targets
from unrolled import classified, unrolled

from diversity import (
    DiversityObjective,
    MixedTarget,
    TappedViT,
    token_cross_entropy,
)


def token_gradient_case(name="deit", mixing=0.7, alpha=None):
    """A model, its target, and a training step: a call that returns the loss and the terms."""
    model, samples = build(name), images()
    if name == "distilled":
        model.set_distilled_training(True)
    distillation = None if alpha is None else Distillation(alpha)
    objective = DiversityObjective({"mixing": mixing, "emb_grad_diversity": 0.5}, 0.1, distillation)
    tapped = TappedViT(model, objective.reads, objective.patch_logits)
    labels, shares = torch.tensor([0, 3]), normals(5, 2, 1 + tapped.grid[0] * tapped.grid[1]).sigmoid()
    target = MixedTarget(labels, labels.flip(0), shares[:, 0], shares[:, 1:])
    return model, target, lambda: objective(tapped(samples), target, samples)


@pytest.mark.parametrize("alpha", [None, 0.3])
@pytest.mark.parametrize("mixing", [0, 0.7])
@pytest.mark.parametrize("name", ["deit", "average", "distilled", "beit", "swin_windows"])
def test_gradient_diversity_is_that_of_the_classification_loss_at_every_token(name, mixing, alpha):
    model, target, step = token_gradient_case(name, mixing, alpha)
    loss, terms = step()
    tokens = unrolled(name, model, images())["tokens"].detach().requires_grad_()
    logits, patch_logits = classified(name, model, tokens)
    logits, student = logits if name == "distilled" else (logits, logits)
    classification = textbook.mixing_loss(logits, patch_logits, **target._asdict(), smoothing=0.1, coef=mixing)
    if alpha is not None:
        classification = (1 - alpha) * classification + alpha * Distillation(alpha)(images(), student)
    (gradient,) = torch.autograd.grad(classification, tokens)
    expected = textbook.TEXTBOOK["emb_grad_diversity"](gradient.reshape(2, -1, tokens.shape[-1])).item()
    assert terms["emb_grad_diversity"].item() == pytest.approx(expected, rel=1e-9)
    assert terms["classification"].item() == pytest.approx(classification.item(), rel=1e-9)
    assert loss.item() == pytest.approx(classification.item() + 0.5 * expected, rel=1e-9)


@pytest.mark.parametrize("alpha", [None, 0.3])
@pytest.mark.parametrize("mixing", [0, 0.7])
@pytest.mark.parametrize("name", ["deit", "swin_windows"])
def test_gradient_of_gradient_diversity_is_that_of_finite_differences(name, mixing, alpha):
    model, _, step = token_gradient_case(name, mixing, alpha)
    step()[0].backward()
    everything = dict(model.named_parameters())
    after = {name: p for name, p in everything.items() if name.startswith(("norm", "head"))}
    before = {name: p for name, p in everything.items() if name not in after}
    for parameters in (everything, before, after):
        pairs = [(p, normals(seed, *p.shape)) for seed, p in enumerate(parameters.values())]
        slope = sum((p.grad * direction).sum() for p, direction in pairs).item()
        losses = []
        for size in (1e-6, -2e-6, 1e-6):  # there, to the other side, and back
            with torch.no_grad():
                for p, direction in pairs:
                    p.add_(direction, alpha=size)
            losses.append(step()[0].item())
        assert slope == pytest.approx((losses[0] - losses[1]) / 2e-6, rel=1e-5)


@pytest.mark.parametrize("name", ["deit", "swin_windows"])
def test_gradient_diversity_differentiates_no_block_twice(name):
    gradients = {}
    for is_fused in (False, True):  # fused attention has no second derivative
        model, _, step = token_gradient_case(name)
        for attn in attentions(model):
            attn.fused_attn = is_fused
        seen = []

        def watch(module, inputs, output, seen=seen):
            output.register_hook(seen.append)

        last_blocks = model.layers[-1].blocks if name == "swin_windows" else model.blocks
        last_blocks[-2].register_forward_hook(watch)
        loss, _ = step()
        assert seen == []
        loss.backward()
        assert len(seen) == 1
        gradients[is_fused] = {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(gradients[True], gradients[False], rtol=1e-8, atol=1e-10)


def test_gradient_diversity_of_tokens_that_need_no_gradient_is_an_error():
    objective = DiversityObjective({"emb_grad_diversity": 1.0})
    with pytest.raises(ValueError, match="is the backbone frozen"):
        objective(outputs()._replace(tokens=normals(7, BATCH, 7, 4)), targets())


def test_gradient_diversity_does_not_depend_on_the_size_of_the_loss():
    _, _, step = token_gradient_case()
    expected = step()[1]

    def scaled(*arguments, **options):
        return 1000 * token_cross_entropy(*arguments, **options)

    with mock.patch("diversity.classification.token_cross_entropy", scaled):
        terms = step()[1]
    assert terms["classification"].item() == pytest.approx(1000 * expected["classification"].item())
    assert terms["emb_grad_diversity"].item() == pytest.approx(expected["emb_grad_diversity"].item(), rel=1e-10)
