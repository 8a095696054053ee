"""Labels of other kinds than PatchMixup's, and mistakes in one's own loop: their errors say what to do."""

import copy
import pickle

import pytest
import torch
from helpers import model_of
from timm.data.mixup import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch.nn import functional as F
from torch.nn.parallel import DataParallel

from diversity import DiverseLoss, DiversityObjective, PatchMixup, TappedViT

IMAGES, LABELS = torch.randn(4, 3, 32, 32), torch.tensor([3, 0, 6, 2])


@pytest.fixture(scope="module")
def tapped():
    return TappedViT(model_of(), ["last"], patch_logits=True).train()


def objective_of(tapped, target, coefs=None, **options):
    return DiversityObjective(coefs or {"emb_cos_within": 0.5}, **options)(tapped(IMAGES), target)


def test_integer_labels(tapped):
    _, terms = objective_of(tapped, LABELS, smoothing=0.1)
    _, same = objective_of(tapped, PatchMixup(0, 0)(IMAGES, LABELS)[1], smoothing=0.1)
    torch.testing.assert_close(terms, same)


def test_soft_labels_of_timms_mixup(tapped):
    images, target = Mixup(num_classes=7, label_smoothing=0.1)(IMAGES.clone(), LABELS)
    output = tapped(images)
    loss, terms = DiversityObjective({"emb_cos_within": 0.5})(output, target)
    torch.testing.assert_close(terms["cls_ce"], SoftTargetCrossEntropy()(output.logits, target).detach())
    assert torch.isfinite(loss) and terms["emb_cos_within"] > 0


@pytest.mark.parametrize("target", [LABELS, F.one_hot(LABELS, 7).float()])
def test_mixing_needs_the_labels_of_patches(tapped, target):
    with pytest.raises(TypeError, match="PatchMixup"):
        objective_of(tapped, target, {"mixing": 1.0})


@pytest.mark.parametrize(
    ("target", "line"),
    [
        (LABELS + 4, r"labels must be from 0 to 6 .* got 10\. Build the model with the num_classes"),
        (LABELS - 1, r"labels must be from 0 to 6 .* got -1\."),
        (LABELS[:3], r"logits of shape \[4, 7\] need labels .* got torch.int64 of shape \[3\]"),
        (torch.zeros(4, 5), r"got torch.float32 of shape \[4, 5\]"),
    ],
)
def test_labels_that_do_not_fit(tapped, target, line):
    with pytest.raises(ValueError, match=line):
        objective_of(tapped, target)


def test_labels_out_of_range_in_the_one_module():
    with pytest.raises(ValueError, match="labels must be from 0 to 6"):
        DiverseLoss(model_of(), {"mixing": 1.0}).train()(IMAGES, LABELS + 4)


@pytest.mark.parametrize("wrap", [DataParallel, torch.compile])
def test_a_wrapped_model(wrap):
    with pytest.raises(TypeError, match=r"is needed, not the (DataParallel|OptimizedModule) around"):
        DiverseLoss(wrap(model_of()), {"emb_cos_within": 0.5})


def test_the_output_of_train_mode_is_not_logits(tapped):
    output = tapped(IMAGES)
    with pytest.raises(AttributeError, match=r"no attribute 'argmax': .*its class logits are the attribute `logits`"):
        output.argmax(dim=1)
    with pytest.raises(TypeError, match=r"cross_entropy needs a tensor: .*its class logits are the attribute `logits`"):
        F.cross_entropy(output, LABELS)
    assert output.logits.argmax(dim=1).shape == (4,)


@pytest.mark.parametrize("copied", [copy.copy, pickle.dumps])
def test_a_tapped_model_cannot_be_copied(tapped, copied):
    with pytest.raises(TypeError, match="cannot be shallowly copied or pickled, since its hooks belong to this object"):
        copied(tapped)
