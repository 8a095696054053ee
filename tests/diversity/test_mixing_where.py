"""mixing_where="cutmix": patch tokens count in the images that CutMix has cut; against loops over images."""

import numpy as np
import pytest
import textbook
import torch
from golden_inputs import normals
from objective_inputs import Distillation

from diversity import DiversityObjective, PatchMixup, TapOutput

BATCH, CLASSES, SIZE, GRID = 6, 5, (32, 24), (4, 3)
PATCHES = GRID[0] * GRID[1]


def mixed(mode, seed):
    """The labels of a batch of which some images are cut (or, in batch mode, all or none)."""
    np.random.seed(seed)
    mixup = PatchMixup(mode=mode, prob=0.8, grid=GRID)
    images = normals(0, BATCH, 3, *SIZE)
    return mixup(images, torch.tensor([0, 3, 4, 2, 1, 3]))[1]


def num_cut(target):
    return sum(len(set(lams)) > 1 for lams in target.patch_lam.tolist())


def logits(requires_grad=True):
    return normals(1, BATCH, CLASSES).requires_grad_(requires_grad), normals(2, BATCH, PATCHES, CLASSES).requires_grad_(
        requires_grad
    )


CASES = {("batch", 0): 0, ("batch", 2): BATCH, ("pair", 1): 4, ("elem", 1): 4}
"""{mode and seed: number of images that are cut}."""


@pytest.mark.parametrize(("mode", "seed"), CASES)
@pytest.mark.parametrize("balance", ["tokens", "equal"])
@pytest.mark.parametrize("alpha", [None, 0.3])
def test_only_cut_images_have_a_loss_of_patches(mode, seed, balance, alpha):
    target, (cls, patch) = mixed(mode, seed), logits()
    assert num_cut(target) == CASES[mode, seed]
    distillation = None if alpha is None else Distillation(alpha)
    objective = DiversityObjective({"mixing": 0.7}, 0.1, distillation, balance, mixing_where="cutmix")
    samples = normals(3, BATCH, 3, 2, 2)
    loss, _ = objective(TapOutput(cls, patch_logits=patch), target, samples)
    own = torch.autograd.grad(loss, [cls, patch])

    expected = textbook.mixing_loss_of_cut_images(cls, patch, target, 0.1, 0.7, balance)
    if alpha is not None:
        expected = (1 - alpha) * expected + alpha * (cls.square().mean() + samples.mean())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    by_hand = torch.autograd.grad(expected, [cls, patch], allow_unused=True)
    for one, other in zip(own, by_hand, strict=True):
        torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other, rtol=1e-10, atol=1e-14)
    assert (own[1].abs().sum(dim=(1, 2)) > 0).sum() == num_cut(target)


def test_raw_mixing_is_of_all_images_and_its_fraction_is_what_the_loss_has():
    target, (cls, patch) = mixed("elem", 1), logits()
    output = TapOutput(cls, patch_logits=patch)
    loss, terms = DiversityObjective({"mixing": 0.7}, mixing_where="cutmix")(output, target)
    all_terms = DiversityObjective({"mixing": 0.7})(output, target)[1]
    assert terms["mixing"] == all_terms["mixing"] and terms["cls_ce"] == all_terms["cls_ce"]
    part = 0.0
    for b in range(BATCH):
        if len(set(target.patch_lam[b].tolist())) > 1:
            labels = target.labels[b : b + 1], target.partner[b : b + 1]
            ces = textbook.token_cross_entropy(patch[b : b + 1], *labels, target.patch_lam[b : b + 1], 0.0)
            part += (0.7 * ces.sum() / (1 + 0.7 * PATCHES) / BATCH).item()
    assert terms["mixing_share"].item() == pytest.approx(part / loss.item(), rel=1e-12)
    assert (terms["mixing_share"] + terms["cls_ce_share"]).item() == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("balance", ["tokens", "equal"])
@pytest.mark.parametrize("where", ["always", "cutmix"])
def test_one_pass_over_all_tokens_is_the_same(where, balance):
    """As it is taken under torch.compile."""
    target, (cls, patch) = mixed("elem", 1), logits()
    results = []
    for tokens in (None, torch.cat((cls[:, None], patch), dim=1)):
        objective = DiversityObjective({"mixing": 0.7}, 0.1, mixing_balance=balance, mixing_where=where)
        loss, terms = objective(TapOutput(cls, patch_logits=patch, token_logits=tokens), target)
        results.append((loss.detach(), terms, torch.autograd.grad(loss, [cls, patch])))
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("size", [(37, 29), (224, 224)])
def test_an_image_that_is_replaced_altogether_is_not_cut(size):
    """Though the fractions of its patches are rounded."""
    mixup = PatchMixup(grid=(7, 6))
    draws = torch.tensor([[0.0, 1, 0, size[0], 0, size[1]]], dtype=torch.float64)
    target = mixup.target(normals(0, 2, 3, *size).float(), torch.tensor([0, 1]), draws)
    output = TapOutput(normals(1, 2, CLASSES).float(), patch_logits=normals(2, 2, 42, CLASSES).float())
    loss, terms = DiversityObjective({"mixing": 1.0}, mixing_where="cutmix")(output, target)
    assert loss == terms["cls_ce"] and terms["mixing_share"] == 0


def test_without_mixing_nothing_changes():
    target, (cls, _) = mixed("elem", 1), logits()
    losses = [DiversityObjective({}, mixing_where=where)(TapOutput(cls), target)[0] for where in ("always", "cutmix")]
    assert losses[0] == losses[1]


def test_an_unknown_choice_is_an_error():
    with pytest.raises(ValueError, match="unknown mixing_where 'mixup'; there are always, cutmix"):
        DiversityObjective({"mixing": 1.0}, mixing_where="mixup")
