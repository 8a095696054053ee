"""main.py --redundancy-every: what is logged, when, and that it changes nothing else."""

import pytest
import torch
from analyzing import analyzed, loaded
from helpers import BRIEF, CONVNET, TINY, log_of, make_image_folder, one_line, run_main
from matplotlib import pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diversity.measures import summary_measures
from training import checkpoint


def test_redundancy_is_logged_in_the_right_epochs(runs):
    records = log_of(runs / "watched")
    logged = [{name for name in record if name.startswith("redundancy_")} for record in records]
    missing = {"attention_previous_cosine_first"}  # there is no block before, and there are 16 patches
    missing |= {
        f"embedding_{key}{suffix}" for key in ("effective_rank", "high_norm_tokens") for suffix in ("", "_last")
    }
    every = {f"redundancy_{name}" for name in {*summary_measures()} - missing} | {"redundancy_images"}
    assert logged == [set(), every, every]  # every second epoch, and the last
    assert not any(name.startswith("redundancy_") for record in log_of(runs / "plain") for name in record)


def test_measuring_while_training_changes_no_loss(runs):
    plain, watched = (
        [[record[name] for name in ("train_loss", "test_loss", "test_loss_ema")] for record in log_of(runs / run)]
        for run in ("plain", "watched")
    )
    assert plain == watched
    first, second = (loaded(runs / run / checkpoint.LAST) for run in ("plain", "watched"))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_tensorboard_has_the_measures_and_the_figure(runs):
    events = EventAccumulator(str(runs / "watched")).Reload()
    records = log_of(runs / "watched")
    steps = 409 // 256 * 256 // 64
    last = [(epoch + 1) * steps - 1 for epoch in range(3)]
    for name in (name for name in records[1] if name.startswith("redundancy_") and name != "redundancy_images"):
        points = [(event.step, event.value) for event in events.Scalars(name.replace("redundancy_", "redundancy/"))]
        assert points == [(last[epoch], pytest.approx(records[epoch][name], rel=1e-6)) for epoch in (1, 2)]
    assert [event.step for event in events.Images("redundancy/by_depth")] == [last[1], last[2]]
    assert len(events.Images("redundancy/by_depth")[0].encoded_image_string) > 5000


@pytest.mark.parametrize("batch_size", [64, 8])
def test_what_is_logged_last_is_what_analyze_finds_on_64_images(batch_size, tmp_path, undrawn):
    flags = ("--batch-size", batch_size, "--redundancy-every", "1", "--data-set", "IMNET", "--no-repeated-aug")
    data = make_image_folder(tmp_path / "images", n=40)
    run_main(*TINY, *flags, "--data-path", data, "--output-dir", tmp_path / "run")
    logged = {n.removeprefix("redundancy_"): v for n, v in log_of(tmp_path / "run")[-1].items() if "redundancy" in n}
    report = analyzed(tmp_path, tmp_path / "run", "--num-images", "64")
    assert report["images"] == 64
    assert logged.pop("images") == 64
    assert logged == pytest.approx(report["summary"], rel=1e-9)


def test_figures_are_closed_without_tensorboard(tmp_path, few_digits):
    before = plt.get_fignums()
    run_main(*TINY, "--redundancy-every", "1", "--output-dir", tmp_path / "run")
    assert plt.get_fignums() == before


def test_watching_a_convolutional_net_is_refused(tmp_path):
    words = (*BRIEF, *CONVNET, "--mixing_coef", "0", "--redundancy-every", "1", "--output-dir", tmp_path / "run")
    with pytest.raises(SystemExit) as caught:
        run_main(*words)
    one_line(caught, "--redundancy-every", "--model resnet10t")
