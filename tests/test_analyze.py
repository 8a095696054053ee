"""analyze.py on every kind of RUN, and on several runs: the numbers, the files, the tables."""

import json
import math
import shutil

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from analyzing import PLAIN_VIT, analyzed, loaded, measured, numbers, small_model
from helpers import BRIEF, TINY, data_options, run_main, world
from matplotlib import pyplot as plt
from PIL import Image

import analyze
from datasets import build_data
from diversity.measures import measures_of, summary_measures
from models import build_model
from pipeline.sources import Digits
from pipeline.transforms import build_transform
from reports import figures, map_figures, subjects
from training import checkpoint, provenance

SWIN = (
    *(*BRIEF, "--model", "swin_tiny_patch4_window7_224", "--batch-size", "256", "--model-kwargs"),
    *("window_size=4", "embed_dim=12", "depths=[2,2]", "num_heads=[2,4]"),
)


@pytest.fixture
def unsaved(monkeypatch):
    """Figures are drawn but not written, which takes most of the time; the list of their paths."""
    paths = []
    monkeypatch.setattr(figures, "save", lambda figure, path: paths.append(path) or plt.close(figure))
    return paths


# --- every kind of RUN


def test_a_run_folder(runs, tmp_path, capsys, unsaved):
    shutil.copytree(runs / "plain", tmp_path / "run", ignore=shutil.ignore_patterns("redundancy.*"))
    before = {path.name for path in (tmp_path / "run").iterdir()}
    analyze.main([str(tmp_path / "run"), "--num-images", "40", "--device", "cpu"])
    written = {path.name: path for path in (tmp_path / "run").iterdir() if path.name not in before}
    assert written.keys() == {"redundancy.json", "redundancy.md"}
    names = ("circuits", "cka", "depth", "heads_run", "spectra", "variance", "weights")
    assert {*unsaved} == {tmp_path / "run" / name for name in names}
    report = json.loads(written["redundancy.json"].read_text())
    assert numbers(report) == measured(small_model(weights=loaded(runs / "plain" / checkpoint.LAST)), 40)
    origin = {"data_set": "DIGITS", "split": "validation", "input_size": 32, "images": 40, "weights": "raw", "epoch": 2}
    origin["files"] = provenance.fingerprint(build_data(data_options(), world()), "DIGITS", "")["val_digest"]
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
    config = timm.get_pretrained_cfg(name)
    normalisation = ("--mean", *config.mean, "--std", *config.std)
    assert numbers(report) == measured(model, 20, (*TINY, *normalisation))
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
    assert numbers(report) == measured(model, 20)


def test_published_weights_of_other_classes_have_no_random_classifier(tmp_path, undrawn, capsys):
    model = small_model()
    words = published(tmp_path, model, num_classes=7)
    report = analyzed(tmp_path, "deit_tiny_patch16_224", *words, "--num-images", "20")
    assert "measured without a classifier, as its weights have none of 10 classes" in capsys.readouterr().out
    assert numbers(report) == measured(model, 20)


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
    resize, centre, *_, normalise = build_transform(subject.data, is_training=False).transforms
    assert subject.model["input_size"] == subject.data.input_size == size and tuple(centre.size) == (size, size)
    assert resize.size == math.floor(size / crop)
    assert normalise.mean[0].item() == pytest.approx(mean, abs=1e-4)


OVER = ("--mean", "0.1", "0.2", "0.3", "--crop-pct", "0.5", "--crop-mode", "border")


def test_flags_win_over_the_preprocessing_of_published_weights():
    options = subjects.find_subject("vit_tiny_patch16_224", ["--data-set", "FAKE", *OVER]).data
    assert (options.mean, options.eval_crop_ratio, options.crop_mode) == ([0.1, 0.2, 0.3], 0.5, "border")
    assert options.std == [0.5, 0.5, 0.5]


def test_a_checkpoint_of_this_program_is_measured_as_it_was_trained(runs, tmp_path, undrawn):
    """Not as timm's published weights of its model, of which it is one here, nor as those that it was tuned from."""
    content = torch.load(runs / "plain" / checkpoint.LAST, weights_only=True)
    for name, flags in (("plain", {}), ("tuned", {"mean": [0.1, 0.2, 0.3], "std": [0.5] * 3})):
        stored = content["args"] | {"model": "vit_tiny_patch16_224", "finetune": "others.pth"} | flags
        torch.save(content | {"args": stored}, tmp_path / f"{name}.pth")
        report = analyzed(tmp_path, tmp_path / f"{name}.pth", "--num-images", "20")
        words = ("--mean", 0.1, 0.2, 0.3, "--std", 0.5, 0.5, 0.5) if flags else ()
        assert numbers(report) == measured(small_model(weights=content["model"]), 20, (*TINY, *words))


@pytest.mark.parametrize("flag", ["--data-set", "--batch-size", "--model"])
def test_the_command_line_wins_over_what_a_run_brings(flag, runs):
    value = {"--data-set": "FAKE", "--batch-size": "4", "--model": "vit_tiny_patch16_224"}[flag]
    subject = subjects.find_subject(str(runs / "plain"), [flag, value])
    assert value in (subject.data.data_set, str(subject.data.batch_size), subject.model["name"])
    shape = {"input_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 3}
    assert subject.model.items() >= shape.items() and subject.data.input_size == 32


@pytest.mark.parametrize("num_images", [1, 16, 24, 40, 359, 360, 1000, 0])
@pytest.mark.parametrize("batch_size", [1, 16, 64])
def test_exactly_so_many_images_are_streamed(num_images, batch_size):
    options = data_options("--batch-size", batch_size, "--eval", "--resume", "none.pth")
    subject = subjects.Subject("", None, None, None, {}, options, [])
    stream, num_classes, measured_on = subjects.images(subject, world(), num_images)
    every = [torch.cat(parts) for parts in zip(*build_data(options, world()).val, strict=True)]
    streamed = [torch.cat(parts) for parts in zip(*stream, strict=True)]
    assert all(map(torch.equal, streamed, (part[: num_images or 360] for part in every))) and num_classes == 10
    assert measured_on["images"] == min(num_images or 360, 360)


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
    return {first: others for first, *others in lines_of(table)}


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
    _, _, *parts = (folder / "redundancy.md").read_text().split("\n\n")
    headings, tables = parts[::2], [lines_of(table) for table in parts[1::2]]
    assert headings == [
        "plain, 50 images: tokens by layer",
        "plain: attention and MLPs by block",
        "plain: weights by block and matrix",
        "plain: circuits of heads by block",
        "mine, 50 images, mean of 2 runs: tokens by layer",
        "mine, mean of 2 runs: attention and MLPs by block",
        "mine, mean of 2 runs: weights by block and matrix",
        "mine, mean of 2 runs: circuits of heads by block",
    ]
    for of_one, reports in zip((tables[:4], tables[4:]), configurations.values(), strict=True):
        (layers, blocks, matrices, circuits), first = of_one, reports[0]
        tokens = [measure for key, measure in measures_of("embedding").items() if key in first["embedding"]]
        others = [*measures_of("attention").values(), *measures_of("mlp").values()]
        assert layers[0] == ["layer", "block before", *(measure.label() for measure in tokens)]
        assert [row[:2] for row in layers[1:]] == [["0", "-"], ["1", "0"], ["2", "1"]]
        assert blocks[0] == ["block", *(measure.label() for measure in others)]
        assert [row[0] for row in blocks[1:]] == ["0", "1"]
        for table, measures, start in ((layers, tokens, 2), (blocks, others, 1)):
            for k, measure in enumerate(measures, start):
                runs = [report[measure.level][measure.key] for report in reports]
                assert [row[k] for row in table[1:]] == [mean_text(values) for values in zip(*runs, strict=True)]
        for table, level, names in (
            (matrices, "weight", ("q", "k", "v", "proj", "fc1", "fc2")),
            (circuits, "circuit", ("qk", "ov")),
        ):
            kind = {"weight": "matrix"}.get(level, level)
            assert table[0] == ["block", kind, *(measure.label() for measure in measures_of(level).values())]
            assert [row[:2] for row in table[1:]] == [[str(i), name] for i in range(2) for name in names]
            for i, name, *texts in table[1:]:
                values = [report[level][name] for report in reports]
                assert texts == [mean_text([of_run[m][int(i)] for of_run in values]) for m in measures_of(level)]


def lines_of(table):
    """The texts of a Markdown table, line by line, without the line below the headings."""
    lines = [[text.strip() for text in line.strip("|").split("|")] for line in table.strip().splitlines()]
    return [lines[0], *lines[2:]]


def mean_text(values):
    return "-" if None in values else f"{sum(values) / len(values):.4g}"


def test_several_runs_leave_figures_and_a_report_each(compared, runs):
    folder, configurations = compared
    names = ("circuits", "cka", "depth", "heads_plain", "heads_mine", "spectra", "variance", "weights")
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

    monkeypatch.setattr(map_figures, "attention_heads", draw)
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
