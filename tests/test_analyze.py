"""analyze.py on every kind of RUN, and main.py --redundancy-every: the numbers, the files, one line for a mistake."""

import argparse
import json
import math
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import (
    BRIEF,
    CONVNET,
    TINY,
    data_options,
    few_digits,
    log_of,
    make_image_folder,
    one_line,
    parse,
    run_main,
    world,
)
from matplotlib import pyplot as plt
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import analyze
from datasets import build_data
from diversity import measure_redundancy
from diversity.measures import measures_of, summary_measures
from models import build_model
from pipeline.sources import Digits
from pipeline.transforms import build_transform
from reports import figures, redundancy, redundancy_figures, subjects
from training import checkpoint

PLAIN_VIT = (*BRIEF, "--patch-size", "8", "--model-kwargs", "depth=2", "embed_dim=24", "num_heads=3")
SWIN = (
    *(*BRIEF, "--model", "swin_tiny_patch4_window7_224", "--batch-size", "256", "--model-kwargs"),
    *("window_size=4", "embed_dim=12", "depths=[2,2]", "num_heads=[2,4]"),
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of finished runs: plain; watched, the same with --redundancy-every; other, with other weights."""
    folder = tmp_path_factory.mktemp("runs")
    flags = ("--batch-size", "64", "--epochs", "3")
    with few_digits(512):
        run_main(*TINY, *flags, "--output-dir", folder / "plain")
        run_main(*TINY, *flags, "--tensorboard", "--redundancy-every", "2", "--output-dir", folder / "watched")
    shutil.copytree(folder / "plain", folder / "other")
    content = torch.load(folder / "other" / checkpoint.LAST, weights_only=True)
    content["model"] = {key: value + 0.1 * value.roll(1, 0) for key, value in content["model"].items()}
    torch.save(content, folder / "other" / checkpoint.LAST)
    return folder


@pytest.fixture
def unsaved(monkeypatch):
    """Figures are drawn but not written, which takes most of the time; the list of their paths."""
    paths = []
    monkeypatch.setattr(figures, "save", lambda figure, path: paths.append(path) or plt.close(figure))
    return paths


@pytest.fixture
def undrawn(monkeypatch):
    """No figure is drawn; tests/reports/test_figures.py is about figures."""
    for name in ("redundancy_depth", "weight_depth", "weight_spectra", "variance", "attention_heads"):
        monkeypatch.setattr(redundancy_figures, name, lambda *args: None)
    monkeypatch.setattr(figures, "save", lambda figure, path: None)


def analyzed(tmp_path, *words):
    """`python analyze.py *words` in this process; returns the content of its redundancy.json."""
    analyze.main([str(word) for word in (*words, "--device", "cpu", "--output-dir", tmp_path / "out")])
    return json.loads((tmp_path / "out" / "redundancy.json").read_text())


def numbers(report):
    """A report without its origin."""
    return {name: value for name, value in report.items() if name not in ("run", "measured_on")}


def measured(model, num_images=256, flags=TINY):
    """`measure_redundancy` of a model on the first validation images of the digits."""
    data = build_data(data_options(*flags), world())
    samples = torch.cat([batch for batch, _ in data.val])[:num_images]
    return measure_redundancy(model, [samples])


def small_model(name="deit_tiny_patch16_224", weights=None, depth=2):
    """What `PLAIN_VIT` describes, with random weights or with `weights`."""
    torch.manual_seed(7)
    model = build_model(name, 10, 32, 8, depth=depth, embed_dim=24, num_heads=3)
    model.load_state_dict(weights or model.state_dict())
    return model


def loaded(path, key="model"):
    return torch.load(path, weights_only=True)[key]


# --- every kind of RUN


def test_a_run_folder(runs, tmp_path, capsys, unsaved):
    shutil.copytree(runs / "plain", tmp_path / "run")
    before = {path.name for path in (tmp_path / "run").iterdir()}
    analyze.main([str(tmp_path / "run"), "--num-images", "40", "--device", "cpu"])
    written = {path.name: path for path in (tmp_path / "run").iterdir() if path.name not in before}
    assert written.keys() == {"redundancy.json", "redundancy.md"}
    names = ("depth", "heads_run", "spectra", "variance", "weights")
    assert {*unsaved} == {tmp_path / "run" / name for name in names}
    report = json.loads(written["redundancy.json"].read_text())
    assert numbers(report) == measured(small_model(weights=loaded(runs / "plain" / checkpoint.LAST)), 40)
    origin = {"data_set": "DIGITS", "split": "validation", "input_size": 32, "images": 40, "weights": "raw", "epoch": 2}
    assert report["run"] == str(tmp_path / "run") and report["measured_on"] == origin
    out = capsys.readouterr().out
    assert written["redundancy.md"].read_text().startswith(out[: out.index("written to")].rstrip("\n"))


def test_the_averaged_weights(runs, tmp_path, undrawn):
    report = analyzed(tmp_path, runs / "other", "--ema", "--num-images", "20")
    assert numbers(report) == measured(small_model(weights=loaded(runs / "other" / checkpoint.LAST, "model_ema")), 20)
    assert report["measured_on"]["weights"] == "EMA"
    assert report != analyzed(tmp_path, runs / "other", "--num-images", "20")


def test_a_checkpoint_of_this_program_brings_its_flags(runs, tmp_path, undrawn):
    best = shutil.copy(runs / "plain" / "checkpoint_best.pth", tmp_path / "best.pth")
    report = analyzed(tmp_path, best, "--num-images", "20")
    assert numbers(report) == measured(small_model(weights=loaded(best)), 20)
    assert report["measured_on"]["epoch"] == torch.load(best, weights_only=True)["epoch"]
    assert {path.name for path in tmp_path.iterdir()} == {"best.pth", "out"}


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("deit_tiny_patch16_224", "plain.pth"),
        ("deit_tiny_patch16_224", "plain.safetensors"),
        ("deit_tiny_distilled_patch16_224", "plain.pth"),
        ("beit_base_patch16_224", "plain.pth"),
        ("eva02_tiny_patch14_224", "plain.pth"),
    ],
)
def test_a_state_dict_with_the_flags_of_its_model(name, file, tmp_path, undrawn):
    model = small_model(name)
    save = torch.save if file.endswith(".pth") else safetensors.torch.save_file
    save(model.state_dict(), tmp_path / file)
    report = analyzed(tmp_path, tmp_path / file, *PLAIN_VIT, "--model", name, "--num-images", "20")
    assert numbers(report) == measured(model, 20)
    assert report["measured_on"]["epoch"] is None


def test_a_swin_run(tmp_path, unsaved):
    run_main(*SWIN, "--output-dir", tmp_path / "swin")
    report = analyzed(tmp_path, tmp_path / "swin", "--num-images", "20", "--layer", "first")
    model = build_model("swin_tiny_patch4_window7_224", 10, 32, window_size=4, embed_dim=12, depths=(2, 2),
                        num_heads=(2, 4))  # fmt: skip
    model.load_state_dict(loaded(tmp_path / "swin" / checkpoint.LAST))
    assert numbers(report) == measured(model, 20)
    assert len(report["attention"]["row_std"]) == 4 and report["stages"] == [0, 2]
    assert tmp_path / "out" / "heads_swin" in unsaved


def published(tmp_path, model, **config):
    """Words by which timm finds a model's weights in a file, since these tests run offline."""
    torch.save(model.state_dict(), tmp_path / "published.pth")
    config = {"file": str(tmp_path / "published.pth"), "num_classes": 10} | config
    return (*PLAIN_VIT, f"pretrained_cfg_overlay={config}")


def test_a_timm_name_with_published_weights(tmp_path, undrawn):
    model = small_model()
    report = analyzed(tmp_path, "deit_tiny_patch16_224", *published(tmp_path, model), "--num-images", "20")
    assert report["run"] == "deit_tiny_patch16_224" and report["measured_on"]["epoch"] is None
    assert "deit_tiny_patch16_224, 20 images" in (tmp_path / "out" / "redundancy.md").read_text()
    data = build_data(
        data_options(*TINY), world(), subjects.find_subject("deit_tiny_patch16_224", [*PLAIN_VIT]).transform
    )
    samples = torch.cat([batch for batch, _ in data.val])[:20]
    assert numbers(report) == measure_redundancy(model, [samples])


@pytest.mark.parametrize(
    ("name", "flags", "size", "crop", "mean"),
    [
        ("deit_tiny_patch16_224", (), 224, 0.9, 0.485),
        ("eva02_tiny_patch14_336", (), 336, 1.0, 0.4815),
        ("vit_tiny_patch16_224", ("--input-size", "160"), 160, 0.9, 0.5),
    ],
)
def test_published_weights_see_the_images_they_were_trained_for(name, flags, size, crop, mean):
    subject = subjects.find_subject(name, ["--data-set", "FAKE", *flags])
    resize, centre, *_, normalise = subject.transform.transforms
    assert subject.args.input_size == size and tuple(centre.size) == (size, size)
    assert resize.size == math.floor(size / crop)
    assert normalise.mean[0].item() == pytest.approx(mean, abs=1e-4)
    assert subject.args.model_kwargs == {"pretrained": True}


@pytest.mark.parametrize("name", ["resnet18", "cait_xxs24_224"])
def test_a_model_that_cannot_be_measured_is_refused_before_its_weights_are_fetched(name, tmp_path, monkeypatch):
    monkeypatch.setattr(subjects, "build_model", no_download(subjects.build_model))
    assert refused(name, "--data-set", "FAKE", "--output-dir", tmp_path, named=("ViT",))


def no_download(build):
    def build_without(*args, pretrained, **kwargs):
        assert not pretrained
        return build(*args, pretrained=False, **kwargs)

    return build_without


@pytest.mark.parametrize("flag", ["--data-set", "--batch-size", "--model"])
def test_the_command_line_wins_over_what_a_run_brings(flag, runs):
    value = {"--data-set": "FAKE", "--batch-size": "4", "--model": "vit_tiny_patch16_224"}[flag]
    args = subjects.find_subject(str(runs / "plain"), [flag, value]).args
    assert str(getattr(args, flag[2:].replace("-", "_"))) == value
    assert args.input_size == 32 and args.model_kwargs == {"depth": 2, "embed_dim": 24, "num_heads": 3}


@pytest.mark.parametrize("num_images", [1, 16, 24, 40, 359, 360, 1000, 0])
@pytest.mark.parametrize("batch_size", [1, 16, 64])
def test_exactly_so_many_images_are_streamed(num_images, batch_size):
    words = ("--batch-size", batch_size, "--eval", "--resume", "none.pth")
    options = data_options(*words)
    subject = subjects.Subject("", parse(*words), None, None, None, build_transform(options, is_training=False))
    stream, num_classes = subjects.images(subject, world(), num_images)
    every = torch.cat([samples for samples, _ in build_data(options, world()).val])
    assert torch.equal(torch.cat([*stream]), every[: num_images or 360]) and num_classes == 10


# --- several runs


@pytest.fixture(scope="module")
def compared(runs, tmp_path_factory):
    """Plain, and two runs as the seeds of "mine", in one call: the folder of results and the reports."""
    folder = tmp_path_factory.mktemp("compared")
    three = (runs / "plain", runs / "other", runs / "watched")
    report = analyzed(folder, *three, "--num-images", "50", "--names", "plain", "mine", "mine")
    return folder / "out", report["cells"]


def rows_of(table):
    """{first text: the other texts} of each row of a Markdown table."""
    rows = [[text.strip() for text in line.strip("|").split("|")] for line in table.strip().splitlines()]
    return {first: others for first, *others in (rows[0], *rows[2:])}


def test_the_table_of_two_configurations_has_their_differences(compared):
    folder, configurations = compared
    assert [len(reports) for reports in configurations.values()] == [1, 2]
    rows = rows_of((folder / "redundancy.md").read_text().split("\n\n")[0])
    assert rows.pop("measure") == ["plain, n = 1", "mine, n = 2", "mine - plain"]
    ((first,), (second, third)) = ([report["summary"] for report in reports] for reports in configurations.values())
    assert list(rows) == [
        measure.label(place) for name, (measure, place) in summary_measures().items() if name in first
    ]
    for name, (measure, place) in summary_measures().items():
        if name in first:
            plain, mine, difference = rows[measure.label(place)]
            mean, std = map(float, mine.split(" ± "))
            assert float(plain) == pytest.approx(first[name], rel=1e-3)
            assert mean == pytest.approx((second[name] + third[name]) / 2, rel=1e-3)
            assert std == pytest.approx(abs(second[name] - third[name]) / math.sqrt(2), rel=0.06)
            assert difference[0] in "+-"
            assert float(difference) == pytest.approx((second[name] + third[name]) / 2 - first[name], rel=1e-3)
    assert sum(first[name] != second[name] for name in first) > 20


def test_every_layer_and_matrix_is_in_a_table(compared):
    folder, configurations = compared
    _, *parts = (folder / "redundancy.md").read_text().split("\n\n")
    assert parts[::4] == [
        "plain, 50 images: tokens by layer, attention by block",
        "mine, 50 images, mean of 2 runs: tokens by layer, attention by block",
    ]
    for layers, matrices, reports in zip(parts[1::4], parts[3::4], configurations.values(), strict=True):
        rows = rows_of(layers)
        columns = [measure for level in ("embedding", "attention") for measure in measures_of(level).values()]
        assert rows.pop("layer") == ["block before", *(measure.label() for measure in columns)]
        assert {layer: row[0] for layer, row in rows.items()} == {"0": "-", "1": "0", "2": "1"}
        for k, measure in enumerate(columns, 1):
            runs = [[None] * (measure.level == "attention") + r[measure.level][measure.key] for r in reports]
            assert [row[k] for row in rows.values()] == [mean_text(values) for values in zip(*runs, strict=True)]
        texts_of = [[text.strip() for text in line.strip("|").split("|")] for line in matrices.splitlines()]
        assert texts_of[0] == [
            "block",
            "matrix",
            *(measure.label() for measure in measures_of("weight").values()),
        ]
        assert [row[:2] for row in texts_of[2:]] == [
            [str(i), name] for i in range(2) for name in ("q", "k", "v", "proj", "fc1", "fc2")
        ]
        for i, name, *texts in texts_of[2:]:
            weight = [report["weight"][name] for report in reports]
            assert texts == [mean_text([of_run[m][int(i)] for of_run in weight]) for m in measures_of("weight")]


def mean_text(values):
    return "-" if None in values else f"{sum(values) / len(values):.4g}"


def test_several_runs_leave_figures_and_a_report_each(compared, runs):
    folder, configurations = compared
    names = ("depth", "heads_plain", "heads_mine", "spectra", "variance", "weights")
    drawn = {f"{name}.{kind}" for name in names for kind in ("png", "pdf")}
    assert {path.name for path in folder.iterdir()} == {"redundancy.json", "redundancy.md", *drawn}
    for name in drawn:
        start = b"\x89PNG" if name.endswith("png") else b"%PDF"
        assert (folder / name).read_bytes().startswith(start) and (folder / name).stat().st_size > 5000
    reports = [report for reports in configurations.values() for report in reports]
    for report, run in zip(reports, ("plain", "other", "watched"), strict=True):
        assert json.loads((runs / run / "redundancy.json").read_text()) == report
        assert numbers(report) == measured(small_model(weights=loaded(runs / run / checkpoint.LAST)), 50)


@pytest.mark.parametrize(
    ("runs", "names"),
    [
        (["out/plain/seed0"], ["plain"]),
        (["out/plain/seed0", "out/all/seed0", "out/plain/seed1"], ["plain", "all", "plain"]),
        (["one/plain-seed0", "two/plain-seed0"], ["one/plain", "two/plain"]),
        (["a.pth", "b/a.pth"], ["a.pth", "b/a.pth"]),
        (["seed0", "seed1"], ["here", "here"]),
    ],
)
def test_runs_that_differ_only_in_their_seed_are_one_configuration(runs, names, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    expected = ["here/a.pth", "b/a.pth"] if "a.pth" in runs else names
    assert subjects.configuration_names(runs) == expected


@pytest.mark.parametrize("layer", ["first", "last", "1"])
def test_the_heads_drawn_are_those_of_the_block_and_the_image(layer, runs, tmp_path, undrawn, monkeypatch):
    drawn = {}

    def draw(maps, picture, prefix_tokens, grid, title):
        drawn.update(maps=maps, picture=picture, prefix_tokens=prefix_tokens, grid=grid, title=title)

    monkeypatch.setattr(redundancy_figures, "attention_heads", draw)
    analyzed(tmp_path, runs / "plain", "--num-images", "8", "--layer", layer, "--image", "5")
    model = small_model(weights=loaded(runs / "plain" / checkpoint.LAST)).eval()
    attn = model.blocks[0 if layer == "first" else 1].attn
    attn.fused_attn, kept = False, []
    attn.attn_drop.register_forward_hook(lambda module, inputs, output: kept.append(inputs[0]))
    with torch.no_grad():
        model(next(iter(build_data(data_options(), world()).val))[0][5:6])
    torch.testing.assert_close(torch.from_numpy(drawn["maps"]), kept[0][0])
    assert drawn["maps"].shape == (3, 17, 17) and (drawn["prefix_tokens"], drawn["grid"]) == (["class token"], (4, 4))
    block = 0 if layer == "first" else 1
    assert drawn["title"] == f"plain, block {block} (blocks 0 to 1), validation image 5"
    scan = Digits(is_training=False)[5][0].convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)
    assert abs(drawn["picture"] - np.asarray(scan) / 255).max() < 0.01


# --- while training


def test_redundancy_is_logged_in_the_right_epochs(runs):
    records = log_of(runs / "watched")
    logged = [{name for name in record if name.startswith("redundancy_")} for record in records]
    every = {f"redundancy_{name}" for name in summary_measures()} - {"redundancy_attention_previous_cosine_first"}
    every |= {"redundancy_images"}
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
    for name in (name for name in records[1] if name.startswith("redundancy_")):
        points = [(event.step, event.value) for event in events.Scalars(f"epoch/{name}")]
        assert points == [(last[epoch], pytest.approx(records[epoch][name], rel=1e-6)) for epoch in (1, 2)]
    assert [event.step for event in events.Images("redundancy")] == [last[1], last[2]]
    assert len(events.Images("redundancy")[0].encoded_image_string) > 5000


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


# --- bad input


def refused(*words, named):
    """Each of `named` is in the one line that analyze.py ends in."""
    with pytest.raises(SystemExit) as caught:
        analyze.main([str(word) for word in (*words, "--device", "cpu")])
    assert caught.value.code != 0
    return one_line(caught, *named)


def test_a_folder_without_a_run_is_refused(runs, tmp_path):
    shutil.copy(runs / "plain" / "args.yaml", tmp_path)
    assert refused(tmp_path, named=(tmp_path, "checkpoint.pth"))


def test_an_unknown_name_is_refused(tmp_path):
    assert refused("deit_tinny", named=("deit_tinny", "timm"))
    assert refused(tmp_path / "missing.pth", named=("missing.pth",))


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "notes.pth").write_text("no checkpoint")
    assert refused(tmp_path / "notes.pth", *TINY, named=("notes.pth",))


def test_a_checkpoint_of_another_model_is_refused(runs, tmp_path):
    best = runs / "plain" / "checkpoint_best.pth"
    named = (best, "does not fit VisionTransformer")
    assert refused(
        best, "--model-kwargs", "depth=3", "embed_dim=24", "num_heads=3", "--output-dir", tmp_path, named=named
    )


def test_weights_without_an_average_are_refused(runs, tmp_path):
    best = runs / "plain" / "checkpoint_best.pth"
    assert refused(best, "--ema", "--output-dir", tmp_path, named=(best, "averaged"))


def test_wrong_flags_are_refused(runs, tmp_path):
    (tmp_path / "file").write_text("")
    assert refused(runs / "plain", "--output-dir", tmp_path / "file", named=("--output-dir", tmp_path / "file"))
    assert refused(runs / "plain", "--image", "99", "--output-dir", tmp_path, named=("--image 99", "first 96 images"))
    assert refused("deit_tiny_patch16_224", *BRIEF, "--ema", "--model-kwargs", "depth=1", named=("--ema",))


def test_an_empty_data_set_is_refused(runs, tmp_path):
    data = make_image_folder(tmp_path / "images", n=0)
    words = ("--data-set", "IMNET", "--data-path", data, "--output-dir", tmp_path)
    assert refused(runs / "plain", *words, named=(data,))


def test_models_that_do_not_compare_are_refused(runs, tmp_path, undrawn):
    deeper = tmp_path / "deeper.pth"
    args = vars(parse("--model-kwargs", "depth=3", "embed_dim=24", "num_heads=3"))
    torch.save({"model": small_model(depth=3).state_dict(), "args": args}, deeper)
    words = ("--num-images", "4", "--output-dir", tmp_path / "out")
    assert refused(runs / "plain", deeper, *words, named=("plain", "deeper", "2 blocks", "3 blocks"))


def test_runs_measured_on_different_images_are_refused(runs, tmp_path, undrawn):
    args = vars(parse("--data-set", "FAKE", "--num-classes", "10", *PLAIN_VIT[-4:]))
    torch.save({"model": small_model().state_dict(), "args": args}, tmp_path / "fake.pth")
    words = (runs / "plain", tmp_path / "fake.pth", "--num-images", "4", "--output-dir", tmp_path / "out")
    assert refused(*words, named=("fake.pth", "measured on DIGITS", "measured on FAKE"))
    analyzed(tmp_path, *words[:4], "--data-set", "DIGITS")


def test_a_run_named_twice_is_refused(runs, tmp_path):
    assert refused(runs / "plain", runs / "other" / ".." / "plain", "--output-dir", tmp_path, named=("twice",))


def test_several_processes_are_refused(runs, tmp_path, monkeypatch):
    options = argparse.Namespace(runs=[str(runs / "plain")])
    with pytest.raises(SystemExit, match="without torchrun"):
        redundancy.analyze(options, [], world(0, 2))


def test_another_family_is_refused(tmp_path):
    kwargs = {"channels": [8, 8, 8, 8], "stem_width": 8}
    torch.save(build_model("resnet10t", 10, 32, **kwargs).state_dict(), tmp_path / "conv.pth")
    words = (*BRIEF, *CONVNET, "--output-dir", tmp_path)
    assert refused(tmp_path / "conv.pth", *words, named=("ResNet", "ViT"))


@pytest.mark.parametrize("layer", ["9", "-1", "middle", "0,1", "all"])
def test_a_bad_layer_is_refused(layer, runs, tmp_path, undrawn, capsys):
    words = [str(runs / "plain"), f"--layer={layer}", "--num-images", "4", "--output-dir", str(tmp_path)]
    with pytest.raises(SystemExit) as caught:
        analyze.main([*words, "--device", "cpu"])
    line = caught.value.code if isinstance(caught.value.code, str) else capsys.readouterr().err
    assert line.startswith("error: ") and layer in line and line.count("\n") <= 1


@pytest.mark.parametrize("names", [["one"], ["a/b", "a_b"], ["one", "two", "three"]])
def test_names_must_be_one_for_each_run(names, runs, tmp_path):
    assert refused(
        runs / "plain", runs / "other", "--output-dir", tmp_path, "--names", *names, named=("--names", "2", *names)
    )


@pytest.mark.parametrize(
    "words", ["--num-images -1", "--num-images x", "--image x", "--no-such-flag", "--batch-size 0", "--device tpu"]
)
def test_bad_flags_are_refused(words, runs, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        analyze.main([str(runs / "plain"), "--device", "cpu", "--output-dir", str(tmp_path), *words.split()])
    line = caught.value.code if isinstance(caught.value.code, str) else capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") <= 1
    assert words.split()[0] in line and (tmp_path / "redundancy.json").exists() is False


def test_watching_a_convolutional_net_is_refused(tmp_path):
    words = (*BRIEF, *CONVNET, "--mixing_coef", "0", "--redundancy-every", "1", "--output-dir", tmp_path / "run")
    with pytest.raises(SystemExit) as caught:
        run_main(*words)
    one_line(caught, "--redundancy-every", "--model resnet10t")
