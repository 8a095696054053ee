"""Terms, mixing and whole training steps against values of the authors' released code, in float64."""

import numpy as np
import pytest
import timm
import torch
from golden_inputs import draw, load, normals

import diversity
import models  # noqa: F401  (registers the paper's models)

RELATIVE = 1e-9
TERMS = load("terms")["regularizers"]
WITH_CLASS_TOKEN = ("emb_cos", "emb_contrast", "emb_abscos")


def test_every_golden_term_is_registered_and_every_wired_term_is_golden():
    golden = {case["name"] for case in TERMS}
    wired = {name for name, term in diversity.REGULARIZERS.items() if term.coef > 0}
    assert golden <= {*diversity.REGULARIZERS, *diversity.ALIASES}
    assert len(wired) == 4 and wired <= golden


@pytest.mark.parametrize("case", TERMS, ids=lambda case: case["name"])
def test_term_value_and_gradient_norm(case):
    term = diversity.REGULARIZERS[case["name"]]
    inputs = {name: draw(recipe).requires_grad_() for name, recipe in case["inputs"].items()}
    taps = list(inputs.values())
    if case["name"].startswith(WITH_CLASS_TOKEN):
        taps = [tap[:, 1:] for tap in taps]
    probes = torch.stack([draw(probe) for probe in case["probes"]]) if case["probes"] else None
    if term.level == "weight":
        taps = [tap[None] for tap in taps]
        probes = None if probes is None else probes[:, None]
    options = {} if probes is None else {"probes": probes}
    value = term(**dict(zip(term.reads, taps, strict=True)), **options)
    value.backward()
    # The released code adds 1e-8 inside the norms of these two.
    relative = 1e-6 if case["name"].endswith(("_mhs", "_mgd")) else RELATIVE
    assert value.item() == pytest.approx(case["value"], rel=relative)
    for name, norm in case["grad_norm"].items():
        assert inputs[name].grad.norm().item() == pytest.approx(norm, rel=relative)


def mixed_target(labels, lam, bbox, image_size, grid):
    batch = len(labels)
    kept = torch.full((grid[0] * grid[1],), lam, dtype=torch.float64)
    if bbox is not None:
        kept = diversity.patch_lam(bbox, image_size, grid)
    return diversity.MixedTarget(
        labels, labels.flip(0), torch.full((batch,), lam, dtype=torch.float64), kept.expand(batch, -1)
    )


@pytest.mark.parametrize("case", load("terms")["mixing"], ids=lambda case: f"{case['mode']}-{case['lam']:.3f}")
def test_mixing(case):
    batch, _, size, _ = case["image_shape"]
    labels = torch.from_numpy(np.random.RandomState(case["labels_seed"]).randint(0, case["num_classes"], batch))
    logits = normals(case["logits_seed"], *case["logits_shape"]).requires_grad_()
    target = mixed_target(labels, case["lam"], case["bbox_ylyhxlxh"], (size, size), (size // case["patch"],) * 2)
    objective = diversity.DiversityObjective({"mixing": 1.0}, smoothing=case["smoothing"])
    loss, terms = objective(diversity.TapOutput(logits[:, 0], patch_logits=logits[:, 1:]), target)
    loss.backward()
    assert terms["cls_ce"].item() == pytest.approx(case["cls_ce"], rel=RELATIVE)
    assert terms["mixing"].item() * 196 == pytest.approx(case["patch_ce_sum"], rel=RELATIVE)
    assert loss.item() == pytest.approx(case["total"], rel=RELATIVE)
    assert logits.grad.norm().item() == pytest.approx(case["grad_norm"], rel=RELATIVE)


@pytest.mark.parametrize("case", load("step"), ids=lambda case: case["mode"])
def test_training_step(case):
    model = timm.create_model(case["model"], num_classes=case["num_classes"]).double()
    for i, (name, parameter) in enumerate(sorted(model.state_dict().items())):
        value = normals(case["seed"] + i, *parameter.shape) * 0.02
        parameter.copy_(value + 1 if "norm" in name and name.endswith("weight") else value)
    generator = np.random.RandomState(case["seed"] + 5000)
    samples = torch.from_numpy(generator.standard_normal((case["batch"], 3, 224, 224)))
    labels = torch.from_numpy(generator.randint(0, case["num_classes"], case["batch"]))

    model.eval()
    first_row = model(samples)[0, :5].tolist()
    assert first_row == pytest.approx(case["eval_logits_first_row"], rel=RELATIVE)

    lam, bbox = case["lam"], case["bbox_ylyhxlxh"]
    if bbox is None:
        samples = lam * samples + (1 - lam) * samples.flip(0)
    else:
        yl, yh, xl, xh = bbox
        samples[:, :, yl:yh, xl:xh] = samples.flip(0)[:, :, yl:yh, xl:xh]
    coefs = {name.removesuffix("_coef"): coef for name, coef in case["coefs"].items()}
    objective = diversity.DiversityObjective(coefs, smoothing=case["smoothing"])
    tapped = diversity.TappedViT(model, reads=objective.reads, patch_logits=objective.patch_logits).train()
    probes = [
        torch.stack(
            [
                torch.from_numpy(np.random.RandomState(case["seed"] + 9000 + 2 * k + j).random_sample((192, 1)))
                for k in range(36)
            ]
        )
        for j in range(2)
    ]
    output = tapped(samples)
    target = mixed_target(labels, lam, bbox, (224, 224), (14, 14))
    loss, terms = objective(output, target, probes={"weight_mha_cond_orth": torch.stack(probes)})
    loss.backward()

    for name, value in case["terms"].items():
        assert (loss if name == "loss" else terms[name]).item() == pytest.approx(value, rel=RELATIVE), name
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, norm in case["grad_norm"].items():
        assert grads[name].norm().item() == pytest.approx(norm, rel=RELATIVE), name
    total = torch.stack([grad.norm() for grad in grads.values()]).norm().item()
    assert total == pytest.approx(case["total_grad_norm"], rel=RELATIVE)
