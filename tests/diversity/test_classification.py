"""The classification loss: class token, patch tokens and distillation, and how they are weighed."""

import pytest
import textbook
import torch
from golden_inputs import normals
from objective_inputs import BATCH, Distillation, outputs, targets, textbook_classification

from diversity import (
    DiversityObjective,
)


@pytest.mark.parametrize("coef", [0, 0.3, 1, 2])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixing_coefficient_weighs_the_patch_tokens(coef, smoothing):
    objective = DiversityObjective({"mixing": coef}, smoothing=smoothing)
    assert objective.patch_logits == (coef > 0) and objective.reads == []
    loss, terms = objective(outputs(), targets())
    assert loss.item() == pytest.approx(textbook_classification(coef, smoothing), rel=1e-10)
    assert terms["classification"].item() == loss.item()
    assert terms["cls_ce"].item() == pytest.approx(textbook_classification(0, smoothing), rel=1e-10)
    assert ("mixing" in terms) == (coef > 0)


@pytest.mark.parametrize("coef", [0, 0.3, 1, 2])
@pytest.mark.parametrize("alpha", [None, 0.3])
def test_equal_balance_weighs_the_patches_as_one(coef, alpha):
    distillation = None if alpha is None else Distillation(alpha)
    objective = DiversityObjective({"mixing": coef}, 0.1, distillation, mixing_balance="equal")
    output, target = outputs(), targets()
    loss, terms = objective(output, target, torch.ones(BATCH, 3, 2, 2, dtype=torch.float64))
    labels = target.labels, target.partner
    cls_ce = textbook.token_cross_entropy(output.logits[:, None], *labels, target.lam[:, None], 0.1).mean()
    patch_ce = textbook.token_cross_entropy(output.patch_logits, *labels, target.patch_lam, 0.1).mean()
    mixed = (cls_ce + coef * patch_ce) / (1 + coef)
    expected = mixed if alpha is None else (1 - alpha) * mixed + alpha * terms["distillation"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    assert terms["cls_ce"].item() == pytest.approx(cls_ce.item(), rel=1e-10)
    assert sum(value for name, value in terms.items() if name.endswith("_share")).item() == pytest.approx(1)
    if coef and not alpha:
        share = coef * patch_ce / (1 + coef) / mixed
        assert terms["mixing"].item() == pytest.approx(patch_ce.item(), rel=1e-10)
        assert terms["mixing_share"].item() == pytest.approx(share.item(), rel=1e-10)


def test_unknown_balance_is_an_error():
    with pytest.raises(ValueError, match="unknown mixing_balance 'even'; there are tokens, equal"):
        DiversityObjective({"mixing": 1.0}, mixing_balance="even")


@pytest.mark.parametrize("coef", [0, 1.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dist_logits", [False, True])
def test_distillation_is_weighed_against_the_rest_of_the_classification(dist_logits, alpha, coef):
    output, samples = outputs(dist_logits), normals(8, BATCH, 3, 2, 2)
    distillation = Distillation(alpha)
    objective = DiversityObjective({"mixing": coef, "attn_cos_within": 0.5}, distillation=distillation)
    loss, terms = objective(output, targets(), samples)
    student = output.dist_logits if dist_logits else output.logits
    assert distillation.called_with[0] is samples and distillation.called_with[1] is student
    distilled = (student.square().mean() + samples.mean()).item()
    expected = (1 - alpha) * textbook_classification(coef, 0.0) + alpha * distilled
    assert terms["distillation"].item() == pytest.approx(distilled)
    assert terms["classification"].item() == pytest.approx(expected)
    assert loss.item() == pytest.approx(expected + 0.5 * terms["attn_cos_within"].item())
