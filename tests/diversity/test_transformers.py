"""Models of transformers against models of timm with the same weights: taps, terms, gradients, measures, errors."""

import numpy as np
import pytest
import torch
from transformers_pairs import FAMILIES, SIZE, make_pair

import diversity

transformers = pytest.importorskip("transformers", reason="the extra [hf] is not installed")

ALL_BLOCKS = {"emb_layers": "all", "attn_layers": "all", "weight_groups": "qkv,proj,fc1,fc2"}


def images(count=4, size=SIZE):
    return torch.randn(count, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


LABELS = torch.tensor([0, 3, 1, 4])


def has_patch_head(family: str) -> bool:
    return not family.startswith("dinov2")


def losses(family: str, model, call=None, **coefs):
    """The loss and terms of a batch, patches mixed where the head can classify them; the gradients are in the model."""
    coefs = coefs or {name: 0.1 for name in diversity.REGULARIZERS}
    mixing = {"mixing": 0.7} if has_patch_head(family) else {}
    loss_fn = diversity.DiverseLoss(model.train(), coefs | mixing, mixup=diversity.PatchMixup(), smoothing=0.1)
    np.random.seed(1)
    torch.manual_seed(1)
    model.zero_grad()
    loss, terms = loss_fn(images(), LABELS, call=call)
    loss.backward()
    loss_fn.tapped.close()
    return loss, terms


def gradients(model) -> dict[str, torch.Tensor]:
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
class TestSameAsTimm:
    def test_taps(self, family):
        theirs, ours, _ = make_pair(family, transformers)
        wanted = {"reads": diversity.TAPS, "patch_logits": has_patch_head(family)} | ALL_BLOCKS
        found, expected = (diversity.TappedViT(m, **wanted).train()(images()) for m in (theirs, ours))
        for name in ("logits", *diversity.TAPS, *(["patch_logits"] if has_patch_head(family) else [])):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-10, atol=1e-12)

    def test_terms_and_gradients(self, family):
        theirs, ours, rename = make_pair(family, transformers)
        loss, terms = losses(family, theirs)
        expected_loss, expected_terms = losses(family, ours)
        torch.testing.assert_close(terms, expected_terms, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(loss, expected_loss, rtol=1e-9, atol=1e-11)
        found, expected = rename(gradients(theirs)), gradients(ours)
        if family == "dinov2_with_registers":  # timm's token is the sum of token and position, each with its gradient
            found["cls_token"] = found["cls_token"] / 2
        assert {name for name, grad in expected.items() if grad.any()} <= found.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-10)

    def test_redundancy(self, family):
        reports = [diversity.measure_redundancy(m, [(images(), LABELS)]) for m in make_pair(family, transformers)[:2]]
        assert numbers(reports[0]).keys() == numbers(reports[1]).keys()
        assert numbers(reports[0]) == pytest.approx(numbers(reports[1]), rel=1e-6, abs=1e-9, nan_ok=True)

    def test_logits_in_eval_mode(self, family):
        model, ours, _ = make_pair(family, transformers)
        loss_fn = diversity.DiverseLoss(model, {"emb_cos_within": 1.0}).eval()
        model.eval()
        logits = loss_fn(images())
        assert torch.equal(logits, model(images()).logits)
        torch.testing.assert_close(logits, ours.eval()(images()), rtol=1e-10, atol=1e-12)


def numbers(report, path="") -> dict[str, float]:
    """{path: number} of nested dicts and lists; None is NaN."""
    if isinstance(report, dict | list):
        items = report.items() if isinstance(report, dict) else enumerate(report)
        return {name: n for key, value in items for name, n in numbers(value, f"{path}.{key}").items()}
    return {path: float("nan") if report is None else report}
