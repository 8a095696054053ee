"""The lines of the console."""

import torch
from helpers import world
from steps import make_state, small_vit

from training.log import RunLog, accuracy_line, epoch_line, terms_table
from training.progress import Progress

RECORD = {
    "epoch": 299,
    "train_loss": 1.2345e-5,
    "train_images_per_s": 12345.6,
    "train_data_wait": 0.123,
    "test_acc1": 79.914,
    "test_acc1_ema": 100.0,
    "train_mixing": 6.9,
    "train_emb_cos_within": 0.125,
    "train_mixing_share": 0.75,
    "train_emb_cos_within_share": 0.25,
}


def test_an_epochs_line_fits_100_columns():
    line = epoch_line(RECORD, 300)
    assert line == (
        "epoch 299 of 300: loss 1.234e-05, accuracy raw 79.91 %, EMA 100.00 %, 12346 images/s, data wait 12 %"
    )
    assert len(line) <= 100
    without_average = {name: value for name, value in RECORD.items() if name != "test_acc1_ema"}
    assert "raw 79.91 %, 12346" in epoch_line(without_average, 300)
    assert accuracy_line({"acc1": 79.914, "acc1_ema": 80.0}) == "test accuracy: raw 79.91 %, EMA 80.00 %"


def test_the_terms_are_an_aligned_table():
    assert terms_table(RECORD).splitlines() == [
        "term                               value   of the loss",
        "mixing                               6.9       75.00 %",
        "emb_cos_within                     0.125       25.00 %",
    ]
    norms = {"gradnorm_classification": 0.5, "gradnorm_mixing": 0.48, "gradnorm_emb_cos_within": 1.25e-7}
    table = terms_table(RECORD | norms).splitlines()
    assert table == [
        "term                               value   of the loss   gradient norm   of classification",
        "mixing                               6.9       75.00 %            0.48              96.0 %",
        "emb_cos_within                     0.125       25.00 %        1.25e-07          2.50e-05 %",
    ]
    assert max(map(len, table)) <= 100
    assert terms_table(RECORD | norms | {"gradnorm_mixing": 0.5}).splitlines()[1].endswith("  100 %")
    assert terms_table(RECORD | norms | {"gradnorm_classification": 0.0}) == terms_table(RECORD)
    del norms["gradnorm_mixing"]  # it was not finite
    assert terms_table(RECORD | norms).splitlines()[1].split()[-3:] == ["nan", "nan", "%"]
    assert terms_table({"epoch": 0}) == ""  # an epoch without a step


def test_a_steps_line_fits_100_columns():
    state, lines, points = make_state(small_vit()), [], {}
    log = RunLog(None, world(), tensorboard=False)
    log.print, log.scalars = lines.append, lambda values, step: points.update({step: values})
    state.optimizer.param_groups[0]["lr"] = 4.5678e-4
    state.epoch, state.step = 299, 1200
    progress = Progress(state, 1251, log, world(), log_interval=50)
    for _ in progress.batches(range(2)):
        progress.count_images(1024)
        names = ["loss", "emb_cos_within", "grad_norm", "emb_cos_within_share"]
        state.totals.add(names, torch.tensor([6.91234, 0.5, 12.3456, 0.1]), torch.tensor(True), 0)
        state.step += 1
        progress.clock -= 0.08 if lines else 0.1
        progress.end_step()
    state.step = 1251
    progress.end_epoch()
    assert [line[:20] for line in lines] == ["epoch 299 1200/1251 ", "epoch 299 1250/1251 "]
    for line in lines:
        assert "  loss 6.912  grad 12.3  lr 0.000457  " in line
        assert len(line) <= 100, line
    assert "eta unknown" in lines[0] and "eta 0:00:00" in lines[1]
    first, last = points[299 * 1251 + 1200], points[299 * 1251 + 1250]
    assert first["fractions/emb_cos_within"] == last["fractions/emb_cos_within"]
    assert first.keys() == {
        "train/lr",
        "train/loss",
        "train/grad_norm",
        "terms/emb_cos_within",
        "fractions/emb_cos_within",
    }
