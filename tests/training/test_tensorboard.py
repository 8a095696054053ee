"""What a run shows in TensorBoard: groups of scalars, texts, and its row in the table of runs."""

import pytest
from helpers import TINY, log_of, run_main
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from training.log import by_group

MEAN = {"images_per_s", "data_wait", "skipped_steps", "overflows", "bad_images"}


@pytest.mark.parametrize("interval", [5, 0])
def test_scalars_have_groups_and_short_titles(interval, tmp_path, few_digits):
    terms = ("--mixing_coef", "1", "--emb_cos_within_coef", "0.5", "--redundancy-every", "1")
    run_main(*TINY, *terms, "--tensorboard", "--log-interval", interval, "--output-dir", tmp_path)
    events = EventAccumulator(str(tmp_path)).Reload()
    groups = {}
    for tag in events.Tags()["scalars"]:
        group, title = tag.split("/")
        groups.setdefault(group, set()).add(title)
    (record,) = log_of(tmp_path)
    shares = {name.removeprefix("train_").removesuffix("_share") for name in record if name.endswith("_share")}
    assert {"emb_cos_within"} < shares and groups["terms"] == groups["fractions"] == shares
    assert groups["test"] == {"acc1", "acc5", "loss", "ece", "acc1_ema", "acc5_ema", "loss_ema", "ece_ema"}
    assert groups["epoch"] == {"loss", "classification", "lr", "grad_norm"} == groups.get("train", groups["epoch"])
    assert groups["redundancy"] == {n.removeprefix("redundancy_") for n in record if n.startswith("redundancy_")} - {
        "images"
    }
    assert groups["system"] == MEAN and groups.keys() <= {
        *("train", "epoch", "terms", "fractions", "test", "redundancy", "system")
    }
    points = events.Scalars("terms/emb_cos_within")
    assert len({point.step for point in points}) == len(points) == (1 if interval == 0 else 2)

    metadata = events.summary_metadata
    assert {"flags/text_summary", "objective/text_summary"} <= metadata.keys()
    (text,) = events.Tensors("flags/text_summary")[0].tensor_proto.string_val
    assert b"emb_cos_within_coef: 0.5\n" in text
    (text,) = events.Tensors("objective/text_summary")[0].tensor_proto.string_val
    assert b"emb_cos_within" in text
    start = metadata["_hparams_/session_start_info"].plugin_data.content
    flags = plugin_data_pb2.HParamsPluginData.FromString(start).session_start_info.hparams
    assert flags["emb_cos_within_coef"].number_value == 0.5 and flags["opt"].string_value == "adamw"
    experiment = metadata["_hparams_/experiment"].plugin_data.content
    metrics = plugin_data_pb2.HParamsPluginData.FromString(experiment).experiment.metric_infos
    assert {metric.name.tag for metric in metrics} >= {"test/acc1", "test/acc1_ema"}


def test_a_number_that_is_not_a_term_is_of_the_system():
    record = {"epoch": 1, "n_parameters": 5, "train_loss": 1.0, "train_new": 2.0, "train_a": 3.0, "train_a_share": 0.5}
    assert by_group(record, "epoch") == {"epoch/loss": 1, "system/new": 2, "terms/a": 3, "fractions/a": 0.5}
