"""diversity_warmup and diversity_until: the factor of all coefficients in each epoch."""

import numpy as np
import pytest
import textbook
import torch
from golden_inputs import normals
from objective_inputs import BATCH, Distillation, outputs, targets, textbook_classification
from steps import images, small_vit

from diversity import REGULARIZERS, DiverseLoss, DiversityObjective, PatchMixup

COEFS = {"mixing": 0.7, "emb_cos_within": 0.3, "attn_cos_within": 2.0}


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ({"diversity_warmup": 4}, [0, 0.25, 0.5, 0.75, 1, 1]),
        ({"diversity_warmup": 1}, [0, 1, 1]),
        ({"diversity_until": 2}, [1, 1, 0, 0]),
        ({"diversity_warmup": 2, "diversity_until": 3}, [0, 0.5, 1, 0, 0]),
        ({}, [1, 1, 1]),
    ],
)
def test_factor_of_each_epoch(schedule, factors):
    objective = DiversityObjective(COEFS, **schedule)
    assert [objective.factor_of(epoch) for epoch in range(len(factors))] == factors


@pytest.mark.parametrize("balance", ["tokens", "equal"])
@pytest.mark.parametrize(("epoch", "factor"), [(0, 0.0), (1, 0.25), (3, 0.75), (4, 1.0), (7, 0.0), (2, 0.5)])
def test_all_coefficients_are_multiplied_by_the_factor(epoch, factor, balance):
    objective = DiversityObjective(COEFS, 0.1, mixing_balance=balance, diversity_warmup=4, diversity_until=7)
    objective.set_epoch(epoch)
    output = outputs()
    loss, terms = objective(output, targets())
    coef = factor * COEFS["mixing"] / (1 if balance == "tokens" else output.patch_logits.shape[1])
    expected = textbook_classification(coef, 0.1)
    for name in ("emb_cos_within", "attn_cos_within"):
        raw = textbook.TEXTBOOK[name](**{tap: getattr(output, tap) for tap in REGULARIZERS[name].reads}).item()
        assert terms[name].item() == pytest.approx(raw, rel=1e-9)  # also where the factor is 0
        assert terms[f"{name}_share"].item() == pytest.approx(factor * COEFS[name] * raw / loss.item(), rel=1e-9)
        expected += factor * COEFS[name] * raw
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert terms["diversity_factor"].item() == factor


def test_distillation_does_not_follow_the_schedule():
    objective = DiversityObjective({"attn_cos_within": 1.0}, distillation=Distillation(0.3), diversity_warmup=2)
    objective.set_epoch(0)
    loss, terms = objective(outputs(), targets(), normals(8, BATCH, 3, 2, 2))
    expected = 0.7 * textbook_classification(0, 0.0) + 0.3 * terms["distillation"].item()
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_without_a_schedule_there_is_no_factor():
    objective = DiversityObjective(COEFS)
    objective.set_epoch(3)
    assert objective.factor is None and "diversity_factor" not in objective.names


def test_a_scheduled_loss_needs_to_know_the_epoch():
    loss_fn = DiverseLoss(small_vit(), COEFS, diversity_until=2)
    with pytest.raises(ValueError, match=r"call set_epoch\(epoch\) at the start of each epoch"):
        loss_fn(*images(4))
    with pytest.raises(ValueError, match="epochs are counted from 0; got -1"):
        loss_fn.set_epoch(-1)
    loss_fn.set_epoch(0)
    assert loss_fn(*images(4))[1]["diversity_factor"] == 1


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"diversity_warmup": -1}, "diversity_warmup must be >= 0 epochs; got -1"),
        ({"diversity_warmup": 3, "diversity_until": 3}, "above diversity_warmup, 3 epochs; got 3"),
        ({"diversity_until": 0}, "above diversity_warmup, 0 epochs; got 0"),
    ],
)
def test_a_wrong_schedule_is_an_error(schedule, message):
    with pytest.raises(ValueError, match=message):
        DiversityObjective(COEFS, **schedule)


def test_the_table_has_the_schedule():
    lines = DiversityObjective(COEFS, diversity_warmup=4, diversity_until=7).table().splitlines()
    assert lines[-2:] == ["coefficients times min(1, epoch / 4)", "coefficients 0 from epoch 7 on"]


def test_an_epoch_does_not_compile_the_step_again():
    torch._dynamo.reset()
    np.random.seed(0)
    losses, draws = [], PatchMixup(mixup_alpha=0).draw(4, (32, 32))
    for compiled in (False, True):
        loss_fn = DiverseLoss(
            small_vit(depth=1), COEFS, PatchMixup(), mixing_where="cutmix", diversity_warmup=3, diversity_until=4
        )
        if compiled:
            loss_fn.compile_step(backend="eager")
        losses.append([])
        with torch._dynamo.config.patch(error_on_recompile=True):
            for epoch in range(6):
                loss_fn.set_epoch(epoch)
                loss, terms = loss_fn(*images(4), draws)
                loss.backward()
                losses[-1].append(loss.item())
                assert terms["diversity_factor"] == pytest.approx([0, 1 / 3, 2 / 3, 1, 0, 0][epoch])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and len(set(losses[0])) == 4
