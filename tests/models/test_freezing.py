"""What --freeze leaves to train in every family of models, what then computes as in evaluation, and --head-init."""

import pytest
import timm
import torch
from families import FAMILIES, build, images
from torch.nn import functional as F

from diversity import REGULARIZERS, DiverseLoss
from models.freezing import freeze, frozen_modules, init_head, trained_line

HEADS = ("head.", "head_dist.")
DROPOUT = dict(drop_rate=0.5, drop_path_rate=0.5)


def trained_names(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def frozen(name, what="backbone", **options):
    model = build(name, **options)
    freeze(model, what)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_frozen(name):
    every = {name for name, _ in build(name).named_parameters()}
    of_head = {name for name in every if name.startswith(HEADS)}
    embedding = {name for name in every if name.startswith("patch_embed.")}
    assert of_head and embedding
    assert trained_names(frozen(name, "none")) == every
    assert trained_names(frozen(name)) == of_head
    assert trained_names(frozen(name, "patch-embed")) == every - embedding


def test_other_models():
    """A model without tokens has a head but no patch embedding; one without a head has nothing left to train."""
    model = timm.create_model("resnet10t", num_classes=3)
    freeze(model, "backbone")
    assert trained_names(model) == {"fc.weight", "fc.bias"}
    with pytest.raises(ValueError, match="ResNet has no module patch_embed"):
        freeze(model, "patch-embed")
    for change in (lambda model: freeze(model, "backbone"), lambda model: init_head(model, 0.01)):
        with pytest.raises(ValueError, match="VisionTransformer has no"):
            change(build(num_classes=0))


@pytest.mark.parametrize("name", ["deit", "distilled", "average", "swin", "eva02_clip"])
def test_a_frozen_backbone_computes_as_in_evaluation(name):
    """Dropout, dropped paths and patches are off in it; the dropout before the classifier is on."""
    model = frozen(name, **DROPOUT)
    loss_fn = DiverseLoss(model, {}, frozen=frozen_modules(model, "backbone"))
    kept = []
    head = model.head.fc if "swin" in name else model.head
    head.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
    loss_fn.eval()(images())
    for _ in range(2):  # after an evaluation, too
        loss_fn.train()(images(), torch.tensor([0, 1]))
    expected, *seen = kept
    for features in seen:
        dropped = features == 0
        assert 0.2 < dropped.double().mean() < 0.8
        torch.testing.assert_close(features, (expected * 2).masked_fill(dropped, 0))
    assert all(module.training for module in DiverseLoss(build(name, **DROPOUT), {}).train().model.modules())


def test_running_statistics_of_a_frozen_backbone_stay():
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=5)
    freeze(model, "backbone")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loss_fn = DiverseLoss(model, {}, frozen=frozen_modules(model, "backbone"))
    loss, _ = loss_fn.train()(images().float(), torch.tensor([0, 1]))
    loss.backward()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    DiverseLoss(model, {}).train()(images().float(), torch.tensor([0, 1]))
    assert not torch.equal(model.bn1.running_mean, before["bn1.running_mean"])


def test_nothing_is_kept_for_a_gradient_of_a_frozen_backbone():
    """But the features of the head, its weights, and the loss of a batch."""
    sizes = {}
    for what in ("none", "backbone"):
        model, kept = frozen("deit", what), []
        loss_fn = DiverseLoss(model, {}, frozen=frozen_modules(model, what)).train()
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            loss, _ = loss_fn(images(), torch.tensor([0, 1]))
        loss.backward()
        sizes[what] = sum(kept)
        assert {name for name, p in model.named_parameters() if p.grad is not None} == trained_names(model)
    assert sizes["backbone"] < 300 < sizes["none"] / 100


@pytest.mark.parametrize("what", ["backbone", "patch-embed"])
def test_which_terms_have_a_gradient(what):
    """All but patch mixing read the backbone alone; a term that reads the gradient at the tokens cannot be computed."""
    for name, term in REGULARIZERS.items():
        model = frozen("deit", what)
        loss_fn = DiverseLoss(model, {name: 1.0}, frozen=frozen_modules(model, what)).train()
        target = loss_fn.mixup(images(), torch.tensor([0, 1]), loss_fn.draw(images()))[1]
        if what == "backbone" and "grad" in term.reads:
            with pytest.raises(ValueError, match="is the backbone frozen"):
                loss_fn.objective.components(loss_fn.tapped(images()), target)
            continue
        _, raw, _ = loss_fn.objective.components(loss_fn.tapped(images()), target)
        assert raw[name].requires_grad == (what != "backbone"), name
    loss_fn = DiverseLoss(frozen("deit", what), {"mixing": 1.0}).train()
    norms = loss_fn.gradient_norms(images(), torch.tensor([0, 1]))
    assert norms["mixing"] > 0 and norms["cls_ce"] > 0


def test_gradient_norms_are_those_of_the_trained_parameters():
    model = frozen("deit")
    loss_fn = DiverseLoss(model, {}, frozen=frozen_modules(model, "backbone")).train()
    labels = torch.tensor([0, 1])
    features = model.forward_head(model.forward_features(images()), pre_logits=True)
    errors = (F.softmax(model.head(features), dim=1) - F.one_hot(labels, 5)) / 2
    expected = torch.cat([(errors.T @ features).flatten(), errors.sum(dim=0)]).norm()
    torch.testing.assert_close(loss_fn.gradient_norms(images(), labels)["cls_ce"], expected)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["backbone", "patch-embed"])
def test_a_compiled_step_is_the_same(what):
    results = []
    for compiled in (False, True):
        model = frozen("deit", what, depth=1, drop_path_rate=0.5 * (what == "backbone"))
        loss_fn = DiverseLoss(model, {"mixing": 1.0}, frozen=frozen_modules(model, what)).train()
        if compiled:
            loss_fn.compile_step(backend="aot_eager")
        loss, _ = loss_fn(images(), torch.tensor([0, 1]), loss_fn.draw(images()))
        loss.backward()
        assert (loss_fn.compiled is not None) == compiled
        results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys() == trained_names(model)
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("name", ["deit", "distilled", "swin"])
def test_a_head_is_drawn_with_its_standard_deviation(name):
    model = build(name, num_classes=400)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for std in (2e-5, 0.0, 0.01):
        init_head(model, std)
        for name, value in model.state_dict().items():
            if not name.startswith(HEADS):
                assert torch.equal(value, before[name])
            elif name.endswith("bias"):
                assert not value.any()
            else:
                assert value.std().item() == pytest.approx(std, rel=0.05) and abs(value.mean()) <= 0.1 * std


def test_the_log_counts_what_is_trained():
    model = frozen("deit")
    assert trained_line(model, "none") == ""
    assert trained_line(model, "backbone").startswith(f"--freeze backbone: {24 * 5 + 5:,} of 2")
