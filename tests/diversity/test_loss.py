"""DiverseLoss in the training loops of other people: plain, accumulating, distributed, compiled, with a teacher."""

import json

import numpy as np
import pytest
import timm
import torch
from ranks import run_ranks

from diversity import DiverseLoss, DiversityObjective, PatchMixup, TapError, TappedViT
from diversity.distillation import DistillationLoss

COEFS = {"mixing": 1.0, "emb_cos_within": 0.5, "emb_contrast_cross": 0.5, "attn_cos_within": 0.1}
PROBED = {"weight_mha_cond_orth": 0.01}


def small_vit(name="deit_tiny_patch16_224", **kwargs):
    torch.manual_seed(0)
    size = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 3, "num_classes": 5}
    return timm.create_model(name, **size | kwargs).double()


def batch(count=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 32, 32, generator=generator, dtype=torch.float64)
    return images, torch.randint(5, (count,), generator=generator)


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_near(actual, expected, **tolerance):
    torch.testing.assert_close(actual, expected, **{"rtol": 1e-9, "atol": 1e-12} | tolerance)


def test_a_plain_loop_takes_the_steps_of_tapped_model_and_objective():
    models = small_vit(), small_vit()
    loss_fn = DiverseLoss(models[0], COEFS | PROBED, mixup=PatchMixup(), smoothing=0.1, cond_orth_steps=2)
    objective = DiversityObjective(COEFS | PROBED, smoothing=0.1, cond_orth_steps=2)
    tapped = TappedViT(models[1], objective.reads, objective.patch_logits).train()
    mixup = PatchMixup(grid=(4, 4))

    def step_by_hand(images, labels):
        samples, target = mixup(images, labels)
        loss, terms = objective(tapped(samples), target)
        return loss, {"loss": loss.detach()} | terms

    results = []
    for model, step in zip(models, (loss_fn, step_by_hand), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        np.random.seed(0), torch.manual_seed(0)
        for seed in range(3):
            loss, terms = step(*batch(seed=seed))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append((terms, model.state_dict()))
    assert [*results[0][0]] == ["loss", *objective.names] == [*loss_fn.names]
    assert all(value.dim() == 0 and not value.requires_grad for value in results[0][0].values())
    assert_near(results[0], results[1], rtol=0, atol=0)


def test_eval_mode_gives_the_logits_of_the_stock_model_and_its_weights_have_timms_names():
    model, (images, labels) = small_vit(), batch()
    loss_fn = DiverseLoss(model, COEFS)
    assert torch.equal(loss_fn.eval()(images), model(images))
    assert torch.equal(loss_fn(images, labels), model(images))
    assert loss_fn.model is model and loss_fn.model.state_dict().keys() == small_vit().state_dict().keys()


def test_batches_add_up_to_the_gradient_of_a_large_one():
    """Without mixing of images, whose partners another division of the batch would change."""
    images, labels = batch(8)
    found = []
    for count in (1, 4):
        loss_fn = DiverseLoss(small_vit(), COEFS, smoothing=0.1)
        for part in zip(images.chunk(count), labels.chunk(count), strict=True):
            loss, _ = loss_fn(*part)
            (loss / count).backward()
        found.append(gradients(loss_fn.model))
    assert_near(found[1], found[0])


def test_draws_can_be_given_and_follow_numpys_generator_otherwise():
    images, labels = batch()
    loss_fn = DiverseLoss(small_vit(), COEFS, mixup=PatchMixup(mode="elem"))
    losses = []
    for seed in (0, 0, 1):
        np.random.seed(seed)
        losses.append(loss_fn(images, labels)[0].item())
    np.random.seed(0)
    losses.append(loss_fn(images, labels, PatchMixup(mode="elem").draw(4, (32, 32)))[0].item())
    assert losses[0] == losses[1] == losses[3] != losses[2]


def test_the_patch_grid_of_the_model_completes_the_mixup_and_leaves_the_callers_object():
    mixup = PatchMixup(mixup_alpha=0.8, cutmix_alpha=1.0)
    assert DiverseLoss(small_vit(), COEFS, mixup=mixup).mixup.grid == (4, 4)
    assert DiverseLoss(small_vit(patch_size=16), COEFS, mixup=mixup).mixup.grid == (2, 2)
    assert DiverseLoss(small_vit(), {"emb_cos_within": 1.0}, mixup=mixup).mixup.grid is None
    assert mixup.grid is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((batch(3)), "its size must be even; got 3"),
        ((batch(4)[0],), "as many integer labels in train mode; got none"),
        ((batch(4)[0], batch(2)[1]), r"a batch of 4 images .* got torch.int64 of shape \[2\]"),
        ((batch(4)[0], torch.rand(4)), "got torch.float32 of shape"),
    ],
)
def test_a_batch_that_cannot_be_trained_on_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DiverseLoss(small_vit(), COEFS, mixup=PatchMixup())(*arguments)


def test_a_model_that_lacks_a_tap_is_refused_with_the_terms_that_read_it():
    with pytest.raises(TapError) as caught:
        DiverseLoss(small_vit(num_heads=1), COEFS)
    assert caught.value.terms == ["attn_cos_within"]
    with pytest.raises(TapError) as caught:
        DiverseLoss(timm.create_model("test_convnext"), COEFS)
    assert caught.value.terms == [*COEFS]


@pytest.mark.parametrize(
    ("way", "coefs"),
    [
        ("compile_step", COEFS | PROBED),
        pytest.param("torch.compile", COEFS | PROBED, marks=pytest.mark.slow),
        ("compile_step", {}),
        pytest.param("torch.compile", {}, marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)} terms",
)
def test_compiled_equals_eager(way, coefs):
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        loss_fn = called = DiverseLoss(small_vit(depth=1), coefs, mixup=PatchMixup(), smoothing=0.1)
        if compiled and way == "torch.compile":
            called = torch.compile(loss_fn, backend="aot_eager")
        elif compiled:
            loss_fn.compile_step(backend="aot_eager")
        np.random.seed(0), torch.manual_seed(0)
        loss, terms = called(*batch())
        loss.backward()
        results.append((terms, gradients(loss_fn.model)))
        assert called.eval()(batch()[0]).shape == (4, 5)
    assert_near(results[1], results[0])


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_a_teacher_stays_as_it_is_and_teaches_the_distillation_head(kind):
    student, teacher = small_vit("deit_tiny_distilled_patch16_224"), small_vit(depth=1)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    loss_fn = DiverseLoss(student, COEFS, PatchMixup(), distillation=DistillationLoss(teacher, kind, 0.5, 3.0))
    loss, terms = loss_fn.train()(*batch())
    loss.backward()
    assert not teacher.training and all(parameter.grad is None for parameter in teacher.parameters())
    assert_near(teacher.state_dict(), before, rtol=0, atol=0)
    assert terms["distillation"] > 0 and student.head_dist.weight.grad.abs().sum() > 0


def test_without_a_teacher_a_distilled_model_trains_the_mean_of_its_heads():
    model, (images, labels) = small_vit("deit_tiny_distilled_patch16_224"), batch()
    model.set_distilled_training(True)
    loss, _ = DiverseLoss(model, {})(images, labels)
    assert_near(loss, torch.nn.functional.cross_entropy(model.train()(images), labels))


def test_two_ranks_take_the_steps_of_one_process():
    result = run_ranks(2, "tests/ddp_diverse_loss.py")
    assert result.returncode == 0, result.stderr
    (differences,) = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert [*differences] == ["loss", "weights"]
    assert max(differences.values()) < 1e-12
