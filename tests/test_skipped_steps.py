"""Steps that are skipped in a run: what is named, an epoch without a step, weights that are not finite at the start."""

import math

import pytest
import torch
from helpers import TINY, log_of, model_of, one_line, run_main, world

from training.guard import FiniteGuard, not_finite

TERMS = ("--mixing_coef", 1, "--emb_cos_within_coef", 0.5)


def test_an_epoch_without_a_step_fails_and_leaves_no_summary(tmp_path, capsys, few_digits):
    flags = ("--lr", 1e30, "--unscale-lr", "--warmup-epochs", 0, "--opt", "sgd", "--max-nonfinite-steps", 999)
    run = (*TINY, *TERMS, *flags, "--epochs", 2, "--output-dir", tmp_path / "run", "--resume", "auto")
    for _ in range(2):  # the second continues from the end of epoch 0
        with pytest.raises(SystemExit) as caught:
            run_main(*run)
        one_line(caught, "no step of epoch 1 was taken", "the first quantity that was not finite: cls_ce")
        assert "no step taken" in capsys.readouterr().out
        assert [record["epoch"] for record in log_of(tmp_path / "run")] == [0]
        assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize(
    ("coef", "first"), [("1e30", "gradient of the loss"), ("1e39", "loss inf")], ids=["gradient", "loss"]
)
def test_a_coefficient_that_is_too_large_is_named(coef, first, tmp_path, capsys, few_digits):
    with pytest.raises(SystemExit) as caught:
        run_main(*TINY, *TERMS, "--emb_cos_within_coef", coef, "--output-dir", tmp_path / "run")
    assert "which is mostly emb_cos_within; " in one_line(caught, "no step of epoch 0 was taken", f"finite: {first}")
    lines = (tmp_path / "run" / "skipped_steps.txt").read_text().splitlines()
    assert len(lines) == capsys.readouterr().out.count("images: see skipped_steps.txt") > 0
    assert "mostly emb_cos_within" in lines[0] and "; images number " in lines[0]
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize("flags", [("--finetune",), ("--resume",), ("--eval", "--resume"), ("--eval", "--finetune")])
def test_weights_that_are_not_finite_are_refused_by_name(flags, tmp_path, refused, few_digits):
    weights = model_of(num_classes=10).state_dict()
    weights["blocks.1.mlp.fc1.weight"][3, 5] = math.nan
    state = {"model": weights, "optimizer": {}, "lr_scheduler": {}, "scaler": {}, "epoch": 0}
    torch.save(state, tmp_path / "poisoned.pth")
    line = refused(*flags, tmp_path / "poisoned.pth", "--output-dir", tmp_path / "run")
    assert line.startswith(f"error: {flags[-1]}") and "poisoned.pth: blocks.1.mlp.fc1.weight is not finite" in line
    assert not (tmp_path / "run" / "args.yaml").exists()


NAN, INF = math.nan, math.inf
LOGITS = "cls_ce, computed from the logits"


@pytest.mark.parametrize(
    ("values", "first", "others"),
    [
        ([2.0, 1.5, 1.5, 0.5, 0.3, 0.75, 0.25], None, []),
        (
            [NAN, NAN, NAN, 0.5, NAN, NAN, NAN],
            "cls_ce, computed from the logits",
            ["classification", "loss", "grad_norm"],
        ),
        ([NAN, 1.5, 1.5, INF, NAN, 0.0, NAN], "emb_cos_within", ["loss", "grad_norm"]),
        ([INF, 1.5, 1.5, 0.5, 0.3, 0.0, NAN], "loss inf, which is mostly emb_cos_within", []),
        ([1e30, 1.5, 1.5, 0.5, INF, 0.0, 1.0], "gradient of the loss 1e+30, which is mostly emb_cos_within", []),
        ([2.0, 1.5, 1.5, 0.5, NAN, 0.75, 0.25], "gradient of the loss 2, which is mostly cls_ce", []),
    ],
)
def test_the_first_quantity_that_is_not_finite_is_named_first(values, first, others):
    names = ("loss", "classification", "cls_ce", "emb_cos_within", "grad_norm", "cls_ce_share", "emb_cos_within_share")
    assert not_finite(dict(zip(names, values, strict=True))) == ([first] if first else []) + others


def test_weights_that_became_infinite_are_named_before_what_they_lead_to(capsys):
    model = model_of()
    guard = FiniteGuard(0, world(), model)
    guard.check(["loss", "cls_ce", "grad_norm"], torch.tensor([NAN, NAN, NAN]), 0, 5)
    model.blocks[1].attn.qkv.weight.data[0, 0] = INF
    with pytest.raises(SystemExit) as caught:
        guard.report_pending()
    first = one_line(caught, "more than --max-nonfinite-steps 0").split("not finite: ")[1]
    assert first.startswith("weights (blocks.1.attn.qkv.weight); ")
    assert "weights (blocks.1.attn.qkv.weight) (then cls_ce" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("stats", "is_last", "fails"),
    [
        ({"skipped_steps": 0, "overflows": 4}, False, False),  # fp16's scale may still fall
        ({"skipped_steps": 0, "overflows": 4}, True, True),
        ({"skipped_steps": 1, "overflows": 3}, False, True),
        ({"skipped_steps": 3, "overflows": 0, "loss": 1.0}, True, False),
    ],
)
def test_an_epoch_needs_a_step_unless_fp16_is_looking_for_its_scale(stats, is_last, fails):
    guard = FiniteGuard(9, world())
    if not fails:
        return guard.require_step(stats, 7, is_last)
    with pytest.raises(SystemExit) as caught:
        guard.require_step(stats, 7, is_last)
    one_line(caught, "no step of epoch 7 was taken")


def test_images_are_in_the_console_line_where_the_file_cannot_be_written(tmp_path):
    lines = []
    guard = FiniteGuard(
        1, world(), images=lambda step: f"images of {step}", report=lines.append, folder=tmp_path / "no"
    )
    guard.check(["loss"], torch.tensor([NAN]), 0, 5)
    guard.report_pending()
    assert lines == ["epoch 0 step 5: step skipped, not finite on rank 0: loss; images of 5"]
