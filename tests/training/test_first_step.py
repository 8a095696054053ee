"""The table of the terms at the first step: the values of the weights that a run starts from, and nothing else."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from helpers import TINY, log_of, model_of, run_main, train_epoch
from steps import CPU, NO_MIX, images, make_state, small_vit

from diversity import DiverseLoss, DiversityObjective
from pipeline.batch_augmentation import BatchAugmentation
from training.first_step import FirstStep
from training.log import RunLog
from training.meters import EpochTotals

COEFS = {"mixing": 1.0, "emb_cos_within": 0.5, "weight_mha_so": 1e-3}
HEADING = "at step 0, before any update: loss "
SO = ("--weight_mha_so_coef", "1e-3")


def orthogonality_of(weights):
    """weight_mha_so of a state_dict by its formula, in float64 and with loops."""
    total = 0.0
    for name, value in weights.items():
        if name.endswith("attn.qkv.weight"):
            for matrix in value.double().chunk(3):
                gap = matrix @ matrix.T - torch.eye(len(matrix), dtype=torch.float64)
                total += (gap**2).sum().item()
    return total


def printed_table(text):
    """{name: [the words after it]} of the only table of a first step in a text."""
    (block,) = re.findall(rf"^{HEADING}.*\n((?:(?!epoch).+\n)*)", text, flags=re.MULTILINE)
    return {line.split()[0]: line.split()[1:] for line in block.splitlines()}


def first_step_of(coefs=COEFS, batches=None, accum_steps=1, **settings):
    """The lines and the kept values of a training whose first step starts from `small_vit`, and its loss before it."""
    model, lines = small_vit(), []
    loss_fn = DiverseLoss(model, coefs, BatchAugmentation(NO_MIX), **settings)
    untouched = DiverseLoss(small_vit(), coefs, BatchAugmentation(NO_MIX), **settings)
    untouched.set_epoch(0)
    log = RunLog(None, CPU, tensorboard=False)
    log.print = lines.append
    state = make_state(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.5))
    batches = batches or [images(4, seed) for seed in range(2 * accum_steps)]
    options = {"budget": 9, "log": log, "accum_steps": accum_steps}
    train_epoch(loss_fn, batches, state, world=CPU, first_step=FirstStep(loss_fn.objective, True), **options)
    draws = [untouched.mixup.draw(batch[0], 0, 0, 0, number) for number, batch in enumerate(batches)]
    before = [untouched(*batch, drawn)[1] for batch, drawn in zip(batches, draws, strict=True)]
    return lines, state.totals.first_step, before[:accum_steps]


@pytest.mark.parametrize("accum_steps", [1, 2])
def test_the_values_are_those_before_the_update_over_all_accumulated_batches(accum_steps):
    lines, kept, before = first_step_of(accum_steps=accum_steps)
    expected = {name: sum(terms[name].item() for terms in before) / accum_steps for name in before[0]}
    assert {name: kept[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    tables = [line for line in lines if line.startswith(HEADING)]
    assert len(tables) == 1 and lines.index(tables[0]) == 0  # before the line of the step
    rows = [line.split() for line in tables[0].splitlines()[2:]]
    assert [row[0] for row in rows] == ["cls_ce", *COEFS]
    assert [row[1] for row in rows[1:]] == ["1", "0.5", "0.001"] and len(rows[0]) == 4  # the class token has none
    for name, *_, value, percent, _ in rows:
        assert float(value) == pytest.approx(expected[name], rel=1e-3)
        assert float(percent) == pytest.approx(100 * expected[f"{name}_share"], abs=0.006)
    assert sum(float(row[-2]) for row in rows) == pytest.approx(100, abs=0.03)


def test_under_a_warmup_the_raw_values_stay_and_the_factor_is_named():
    lines, kept, _ = first_step_of(diversity_warmup=4)
    _, full, _ = first_step_of()
    for name in COEFS:
        assert kept[name] == pytest.approx(full[name]) and kept[f"{name}_share"] == 0 != full[f"{name}_share"]
    assert lines[0].splitlines()[-1] == "the coefficients are multiplied by 0 in this epoch"
    assert lines[0].splitlines()[3].split() == ["mixing", "1", f"{full['mixing']:.4g}", "0.00", "%"]


def test_a_first_step_that_is_skipped_has_its_values_too():
    bad = images(4)
    bad[0][0, 0, 0, 0] = float("nan")
    lines, kept, _ = first_step_of(batches=[bad, images(4, 2)])
    assert lines[0].startswith(f"{HEADING}nan")
    assert kept["weight_mha_so"] == pytest.approx(orthogonality_of(small_vit().state_dict()), rel=1e-5)
    assert "loss" not in kept  # JSON has no NaN
    json.dumps(kept, allow_nan=False)


def test_the_values_are_means_over_the_processes_and_the_steps_sums_stay():
    objective = DiversityObjective({"emb_cos_within": 0.5})
    names = ["loss", *objective.names]
    mine, others = torch.full((len(names),), 1.0, dtype=torch.float64), 3.0
    totals = EpochTotals()
    totals.add(names, mine, torch.tensor(True), 0)
    world = SimpleNamespace(size=2, sum=lambda values: values.add_(others))
    table = FirstStep(objective, True).report(totals, world)
    assert {*totals.first_step.values()} == {2.0} and table.startswith(f"{HEADING}2\n")
    assert mine.eq(1).all()  # the sum is in place


def test_without_any_term_there_is_no_table():
    lines, kept, _ = first_step_of(coefs={})
    assert not any(HEADING in line for line in lines)
    assert kept["loss"] == kept["cls_ce"]


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_a_fine_tuned_run_starts_from_the_values_of_the_file(amp, tmp_path, few_digits, capsys):
    weights = model_of(seed=3, num_classes=10).state_dict()
    weights = {name: 3 * value if "qkv.weight" in name else value for name, value in weights.items()}
    torch.save(weights, tmp_path / "weights.pth")
    flags = ("--amp", amp, "--finetune", tmp_path / "weights.pth", "--lr", "1", "--warmup-epochs", 0)
    run_main(*TINY, *SO, *flags, "--output-dir", tmp_path / "run")
    table = printed_table(capsys.readouterr().out)
    expected = orthogonality_of(weights)
    assert table["weight_mha_so"][:2] == ["0.001", f"{expected:.4g}"]
    (record,) = log_of(tmp_path / "run")
    assert record["step0"]["weight_mha_so"] == pytest.approx(expected, rel=1e-5)
    assert record["train_weight_mha_so"] != pytest.approx(expected, rel=1e-3)  # the mean of the epoch has moved


def test_a_resumed_run_prints_no_table_and_keeps_the_values(tmp_path, few_digits, capsys):
    run = (*TINY, *SO, "--output-dir", tmp_path / "run", "--resume", "auto", "--resume-with-changes")
    run_main(*run)
    assert printed_table(capsys.readouterr().out)
    run_main(*run, "--epochs", 2)
    assert HEADING not in capsys.readouterr().out
    first, second = log_of(tmp_path / "run")
    assert first["step0"]["loss"] > 0 and "step0" not in second


def test_a_dry_run_and_a_later_first_epoch_have_the_table(few_digits, capsys):
    run_main(*TINY, *SO, "--dry-run")
    first = printed_table(capsys.readouterr().out)
    run_main(*TINY, *SO, "--dry-run", "--start-epoch", 2, "--epochs", 3)
    assert printed_table(capsys.readouterr().out)["weight_mha_so"][:2] == first["weight_mha_so"][:2]


@pytest.mark.slow
def test_the_compiled_step_has_the_same_table(few_digits, capsys):
    tables = []
    for flags in ([], ["--compile"]):
        run_main(*TINY, *SO, "--dry-run", *flags)
        tables.append(printed_table(capsys.readouterr().out))
    assert tables[0] == tables[1]
