"""The cross-entropy of every token: against its dense textbook form and timm's loss, its derivatives, its memory."""

from functools import partial

import pytest
import textbook
import torch
from golden_inputs import normals
from timm.data.mixup import mixup_target
from timm.loss import SoftTargetCrossEntropy

from benchmarks.measure import peak_bytes
from diversity import token_cross_entropy


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 3, 5), (4, 7, 11)], ids=str)
def test_token_cross_entropy_against_the_textbook(shape, smoothing):
    batch, tokens, num_classes = shape
    logits = (3 * normals(0, *shape)).requires_grad_()
    labels = torch.arange(batch) % num_classes
    lam = torch.rand(batch, tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    lam[0, 0] = 1
    losses = [
        f(logits, labels, labels.flip(0), lam, smoothing) for f in (token_cross_entropy, textbook.token_cross_entropy)
    ]
    torch.testing.assert_close(*losses, rtol=1e-10, atol=1e-12)
    weights = normals(1, batch, tokens)
    torch.testing.assert_close(*(torch.autograd.grad((loss * weights).sum(), logits)[0] for loss in losses))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_token_cross_entropy_is_twice_differentiable(smoothing):
    logits = normals(0, 3, 2, 4).requires_grad_()
    labels, partner = torch.tensor([0, 1, 3]), torch.tensor([3, 1, 0])  # image 1 is mixed with its own class
    lam = torch.tensor([[0.3, 0.7], [0.6, 0.2], [1.0, 0.0]], dtype=torch.float64)
    loss = partial(token_cross_entropy, labels=labels, partner=partner, lam=lam, smoothing=smoothing)
    assert torch.autograd.gradgradcheck(loss, logits)
    weights = normals(1, 3, 2)
    once, twice = (
        torch.autograd.grad((loss(logits) * weights).sum(), logits, create_graph=create_graph)[0]
        for create_graph in (False, True)
    )
    assert twice.requires_grad and not once.requires_grad
    torch.testing.assert_close(twice, once, rtol=1e-12, atol=1e-14)


def test_token_cross_entropy_is_timms_loss_for_the_class_token():
    logits, labels, lam = normals(0, 6, 10).float(), torch.tensor([3, 1, 4, 1, 5, 9]), 0.37
    expected = SoftTargetCrossEntropy()(logits, mixup_target(labels, 10, lam, smoothing=0.1))
    ours = token_cross_entropy(logits[:, None], labels, labels.flip(0), torch.full((6, 1), lam), 0.1)
    assert ours.mean().item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(dtype, autocast):
    logits, labels = (5 * normals(0, 2, 3, 50)).to(dtype), torch.tensor([7, 8])
    loss = partial(
        token_cross_entropy, labels=labels, partner=labels.flip(0), lam=torch.full((2, 3), 0.3), smoothing=0.1
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value = loss(logits)
    assert value.dtype == torch.float32
    assert torch.equal(value, loss(logits.float()))


def test_half_precision_logits_are_held_once_in_full_precision():
    logits, labels = torch.randn(4, 64, 500, dtype=torch.bfloat16, requires_grad=True), torch.randint(500, (4,))
    lam = torch.rand(4, 64)

    def step():
        token_cross_entropy(logits, labels, labels.flip(0), lam, 0.1).mean().backward()
        logits.grad = None

    per_logit = peak_bytes(step, torch.device("cpu")) / logits.numel()
    assert per_logit < 4 + 2 + 0.5  # one buffer of float32, the gradient in bfloat16, and vectors per token
