"""What a run with --grad-norms-every and a schedule of the coefficients logs; test_resume.py tests what it trains."""

from unittest import mock

import pytest
import torch
from helpers import TINY, few_digits, log_of, run_main
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diversity import DiverseLoss

RUN = (
    *(*TINY, "--preset", "released", "--mixing-where", "cutmix", "--epochs", "4", "--drop", "0.1"),
    *("--diversity-warmup", "2", "--diversity-until", "3", "--accum-steps", "2"),
    *("--tensorboard", "--log-interval", "0"),
)
STEPS = 128 * 4 // 5 // 32


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with few_digits():
        run_main(*RUN, "--grad-norms-every", "2", "--output-dir", folder)
    return folder


def test_norms_are_logged_in_the_right_epochs(run):
    records = log_of(run)
    parts = [name.removesuffix("_share") for name in records[0] if name.endswith("_share")]
    names = {"gradnorm_classification"} | {name.replace("train_", "gradnorm_") for name in parts}
    logged = [{name for name in record if name.startswith("gradnorm_")} for record in records]
    assert logged == [names, set(), names, names] and len(names) == 7  # the first, every second, and the last
    off = names - {"gradnorm_classification", "gradnorm_cls_ce"}
    assert all(record[name] == 0 for record in (records[0], records[3]) for name in off)
    assert all(records[2][name] > 0 for name in off - {"gradnorm_mixing"})  # mixing: if the batch is cut


def test_the_factor_of_the_schedule_is_logged(run):
    records = log_of(run)
    assert [record["train_diversity_factor"] for record in records] == [0, 0.5, 1, 0]
    for record in (records[0], records[3]):  # the terms are computed, and are no part of the loss
        assert record["train_emb_cos_within"] > 0 == record["train_emb_cos_within_share"]
        assert record["train_loss"] == record["train_classification"] == record["train_cls_ce"]
    table = (run / "objective.txt").read_text()
    assert "mixing_where=cutmix" in table and "coefficients 0 from epoch 3 on" in table


def test_tensorboard_has_norms_and_factor(run):
    events = EventAccumulator(str(run)).Reload()
    records = log_of(run)
    for name in (name for name in records[0] if name.startswith("gradnorm_")):
        points = [(event.step, event.value) for event in events.Scalars(name.replace("_", "/", 1))]
        expected = [((epoch + 1) * STEPS - 1, pytest.approx(records[epoch][name], rel=1e-6)) for epoch in (0, 2, 3)]
        assert points == expected
    assert [event.value for event in events.Scalars("epoch/diversity_factor")] == [0, 0.5, 1, 0]


def test_the_last_table_compares_norms_with_that_of_the_classification(tmp_path, few_digits, capsys):
    run_main(*TINY, "--attn_cos_within_coef", "1e-4", "--grad-norms-every", "5", "--output-dir", tmp_path)
    (record,) = log_of(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    *_, row = [line.split() for line in lines if line.startswith("attn_cos_within") and line.endswith(" %")]
    assert row[2:4] == ["0.00", "%"]
    ratio = record["gradnorm_attn_cos_within"] / record["gradnorm_classification"]
    assert float(row[-2]) == pytest.approx(100 * ratio, rel=1e-2) and ratio > 0


def test_norms_that_are_not_finite_are_reported_and_left_out(few_digits, capsys):
    words = ("--emb_mgd_coef", "1e38", "--emb_cos_within_coef", "1", "--grad-norms-every", "1", "--log-interval", "0")
    with pytest.raises(SystemExit, match="no step of epoch 0 was taken"):
        run_main(*TINY, *words, "--dry-run")
    lines = capsys.readouterr().out.splitlines()
    assert "epoch 0: gradient norms that are not finite are not logged: emb_mgd" in lines


def test_too_little_memory_for_norms_does_not_stop_a_run(few_digits, capsys):
    with mock.patch.object(DiverseLoss, "gradient_norms", side_effect=torch.OutOfMemoryError):
        run_main(*TINY, "--emb_cos_within_coef", "1", "--grad-norms-every", "1", "--log-interval", "0", "--dry-run")
    lines = capsys.readouterr().out.splitlines()
    assert "epoch 0: gradient norms are not measured: the memory does not suffice" in lines
    assert any(line.startswith("emb_cos_within") and line.endswith(" %") for line in lines)
