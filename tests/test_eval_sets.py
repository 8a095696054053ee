"""`main.py --eval --eval-sets`: several sets in their published layouts, against a loop over the files."""

import json
import math
import pathlib
import re
import shutil

import numpy as np
import pytest
import torch
from helpers import run_main
from published_sets import (
    MODEL,
    OUTPUTS_R,
    SYNSETS,
    SYNSETS_R,
    logits_of,
    make_corruptions,
    make_set,
    measures,
    vit,
    write_image,
)
from ranks import run_ranks

from utils import BadImageError

MAIN = pathlib.Path(__file__).parents[1] / "main.py"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A file of raw and averaged weights that does not name its classes, its models, and sets for the raw one."""
    root = tmp_path_factory.mktemp("published")
    models = {"raw": vit(0), "ema": vit(1)}
    torch.save({"model": models["raw"].state_dict(), "model_ema": models["ema"].state_dict()}, root / "published.pth")
    sets = {
        "imagenet": make_set(root / "val", models["raw"], SYNSETS.__getitem__),
        "imagenet-v2": make_set(root / "v2", models["raw"], str),
        "imagenet-r": make_set(root / "r", models["raw"], SYNSETS_R.__getitem__, OUTPUTS_R),
    }
    return root / "published.pth", models, sets


def evaluate(output, weights, *words):
    """The sets of evaluation.json."""
    run_main("--eval", *MODEL, "--resume", weights, "--output-dir", output, "--eval-sets", *words)
    return json.loads((output / "evaluation.json").read_text())["sets"]


def files(root):
    return sorted(root.glob("*/*"))


def labels_in(name, root):
    """The number of each image's class among the outputs that are compared, by the name of its folder."""
    number = {"imagenet-v2": int, "imagenet-r": SYNSETS_R.index}.get(name, SYNSETS.index)
    return [number(path.parent.name) for path in files(root)]


def test_each_set_has_the_accuracies_of_a_loop_over_its_files(published, tmp_path, capsys):
    weights, models, sets = published
    words = [f"{name}={path}" for name, path in sets.items()]
    records = evaluate(tmp_path, weights, *words, "--save-predictions")
    printed = capsys.readouterr().out
    page = (tmp_path / "evaluation.md").read_text()
    assert [line.removeprefix("## ") for line in page.splitlines() if line.startswith("## ")] == [*sets]
    assert [*records] == [*sets]
    for name, root in sets.items():
        outputs, labels = OUTPUTS_R if name == "imagenet-r" else slice(None), labels_in(name, root)
        arrays = dict(np.load(tmp_path / f"predictions_{name}.npz"))
        assert [name.split("/")[1] for name in arrays["path"]] == [path.name for path in files(root)]
        for kind, model in models.items():
            logits = logits_of(model, files(root))[:, outputs]
            record = records[name][kind]
            expected = measures(logits, labels)
            assert (record["acc1"], record["acc5"], record["loss"]) == pytest.approx(expected, rel=1e-3)
            assert record["images"] == 12 and (kind == "ema" or record["acc1"] == 50)
            classes = SYNSETS_R if name == "imagenet-r" else SYNSETS
            assert arrays["label"].tolist() == labels and arrays[kind].tolist() == logits.argmax(1).tolist()
            assert arrays["classes"].tolist() == classes
            [row] = [
                line.split()
                for line in printed.splitlines()
                if line.split()[:2] == [name, {"ema": "EMA"}.get(kind, kind)]
            ]
            assert row[-7] == f"{record['acc1']:.2f}"
            wrong = [
                (classes[label], classes[guess])
                for label, guess in zip(labels, logits.argmax(1).tolist(), strict=True)
                if label != guess
            ]
            assert {(pair["label"], pair["predicted"]) for pair in record["confusions"]} == {*wrong}
            of_class = [classes[label] for label in labels]
            assert {key: each["images"] for key, each in record["classes"].items()} == {
                key: of_class.count(key) for key in of_class
            }
    assert "so its outputs are taken for the 1000 synsets of ImageNet-1k" in printed
    assert f"\n{weights}:\nset " in printed
    assert "imagenet-r: only the 200 outputs for its classes are compared" in printed
    assert "warning: imagenet-v2: the folder has 12 images, and 10,000 are published" in printed


def test_imagenet_v2_numbers_are_not_in_the_order_of_the_alphabet(published, tmp_path):
    weights = published[0]
    known = {0: "n01440764", 2: "n01484850", 10: "n01530575", 207: "n02099601"}  # white shark, brambling, golden ...
    for number in known:
        write_image(tmp_path / "v2" / str(number) / "a.jpeg", number)
    record = evaluate(tmp_path / "out", weights, f"imagenet-v2={tmp_path / 'v2'}", "--save-predictions")["imagenet-v2"]
    arrays = np.load(tmp_path / "out" / "predictions_imagenet-v2.npz")
    assert dict(zip(arrays["path"].tolist(), arrays["label"].tolist(), strict=True)) == {
        f"{number}/a.jpeg": number for number in known
    }
    assert {*record["raw"]["classes"]} == {*known.values()}
    assert record["raw"]["classes"]["n01440764"]["description"] == "tench, Tinca tinca"


def test_corruptions_are_not_cropped_and_have_their_errors(published, tmp_path, capsys):
    weights, models, _ = published
    names = "gaussian_noise shot_noise impulse_noise defocus_blur glass_blur motion_blur zoom_blur snow frost fog"
    names = [*names.split(), "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression"]
    parts = make_corruptions(tmp_path / "c", models["raw"], names)
    record = evaluate(tmp_path / "out", weights, f"imagenet-c={tmp_path / 'c'}")["imagenet-c"]["raw"]
    guesses = logits_of(models["raw"], parts.values(), crop=False).argmax(1).tolist()
    is_wrong = (SYNSETS[guess] != path.parent.name for guess, path in zip(guesses, parts.values(), strict=True))
    errors = dict(zip(parts, (100.0 * wrong for wrong in is_wrong), strict=True))
    found = {
        f"{name}/{number}": value
        for name, of in record["corruptions"].items()
        for number, value in of["errors"].items()
    }
    assert found == errors and len({*errors.values()}) > 1
    assert record["acc1"] == pytest.approx(100 - np.mean([*errors.values()]))
    fog = np.mean([errors[f"fog/{severity}"] for severity in range(1, 6)])
    assert record["corruptions"]["fog"]["ce"] == pytest.approx(100 * fog / 81.9324)
    assert record["mce"] == pytest.approx(np.mean([of["ce"] for of in record["corruptions"].values()]))
    printed = capsys.readouterr().out
    assert f"mean corruption error, raw: {record['mce']:.2f} %\n" in printed
    assert "imagenet-c: images are not cropped" in printed


def test_real_labels_replace_the_class_of_the_folder(tmp_path, capsys):
    # ReaL has no label for the first validation image, 970 and 795 for the second, and 809 for the fourth.
    for number, name in enumerate(("00000001", "00000002", "00000004")):
        write_image(tmp_path / "val" / SYNSETS[3] / f"ILSVRC2012_val_{name}.JPEG", number)
    model = vit()
    torch.nn.init.zeros_(model.head.weight)
    model.head.bias.data = 8.0 * torch.eye(1000)[795]
    torch.save(model.state_dict(), tmp_path / "constant.pth")
    words = ("--finetune", tmp_path / "constant.pth", "--output-dir", tmp_path)
    run_main("--eval", *MODEL, *words, "--eval-sets", f"imagenet-real={tmp_path / 'val'}")
    record = json.loads((tmp_path / "evaluation.json").read_text())["sets"]["imagenet-real"]["raw"]
    confidence = math.exp(8) / (math.exp(8) + 999)
    assert record == {"images": 2, "acc1": 50, "ece": pytest.approx(100 * (confidence - 0.5), rel=1e-4)}
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("imagenet-real  "))
    assert row.split()[1:] == ["raw", "2", "1", "of", "1000", "50.00", "%", "-", f"{record['ece']:.2f}", "%", "-"]


def test_classes_of_a_checkpoint_are_matched_by_their_names(tmp_path, capsys):
    model, names = vit(num_classes=3), [SYNSETS[9], "cat", SYNSETS[2]]
    root = make_set(tmp_path / "a", model, names.__getitem__)
    stored = {"model": model.state_dict(), "args": {}, "data": {"classes": names}, "epoch": 4, "is_average": True}
    torch.save(stored, tmp_path / "run.pth")
    write_image(tmp_path / "v2" / "2" / "a.jpeg", 0)
    write_image(tmp_path / "v2" / "3" / "b.jpeg", 1)
    records = evaluate(tmp_path, tmp_path / "run.pth", f"folder={root}", f"imagenet-v2={tmp_path / 'v2'}")
    labels = [names.index(path.parent.name) for path in files(root)]
    expected = measures(logits_of(model, files(root)), labels)
    folder = records["folder"]["ema"]  # the file has averaged weights
    assert (folder["acc1"], folder["acc5"], folder["loss"]) == pytest.approx(expected, rel=1e-3)
    assert folder["acc1"] == 50 and "raw" not in records["folder"]
    guess = names[logits_of(model, [tmp_path / "v2" / "2" / "a.jpeg"]).argmax()]
    assert records["imagenet-v2"]["ema"]["acc1"] == (100 if guess == SYNSETS[2] else 0)
    printed = capsys.readouterr().out
    assert "warning: imagenet-v2: 1 images of 1 classes that the model does not have are left out" in printed
    assert re.search(r"imagenet-v2 +EMA +1 +1 of 3 ", printed)


def test_the_validation_images_of_a_run_are_a_set_too(tmp_path, few_digits, capsys):
    words = ("--data-set", "DIGITS", "--input-size", 16, "--patch-size", 8, "--no-repeated-aug", "--epochs", 1)
    run_main(*MODEL, *words, "--batch-size", 16, "--output-dir", tmp_path / "run", "--save-predictions")
    last = np.load(tmp_path / "run" / "predictions.npz")
    words = ("--resume", "auto", "--output-dir", tmp_path / "run", "--eval-sets", "val", "--save-predictions")
    run_main("--eval", "--device", "cpu", "--num-workers", 0, *words)
    arrays = np.load(tmp_path / "run" / "predictions_val.npz")
    for name in ("image", "label", "raw", "ema"):
        assert arrays[name].tolist() == last[name].tolist()
    assert arrays["path"][3] == "number 3" and arrays["classes"].tolist() == [str(digit) for digit in range(10)]
    record = json.loads((tmp_path / "run" / "evaluation.json").read_text())["sets"]["val"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [record[kind]["acc1"] for kind in ("raw", "ema")] == [summary["test_acc1"], summary["test_acc1_ema"]]
    assert "val: 26 validation images, 10 of 10 compared classes\n" in capsys.readouterr().out


def test_weights_of_unnamed_other_classes_are_refused(tmp_path, refused):
    torch.save(vit(num_classes=3).state_dict(), tmp_path / "other.pth")
    make_set(tmp_path / "a", vit(), SYNSETS.__getitem__, count=2)
    words = ("--eval", *MODEL, "--finetune", tmp_path / "other.pth", "--eval-sets", f"folder={tmp_path / 'a' / 'set'}")
    line = refused(*words, base=())
    assert "[3] in the file and [1000] in the model" in line and line.endswith(
        "so its outputs are taken for the 1000 synsets of ImageNet-1k, in their order"
    )
    assert "does not name its 3 classes" in refused(*words, "--num-classes", 3, base=())


def test_without_a_folder_nothing_is_written(published, tmp_path, monkeypatch):
    weights, _, sets = published
    monkeypatch.chdir(tmp_path)
    run_main("--eval", *MODEL, "--resume", weights, "--eval-sets", f"imagenet={sets['imagenet']}")
    assert not [*tmp_path.iterdir()]


def test_a_folder_that_cannot_be_written_is_refused_before_the_evaluation(published, tmp_path, refused, capsys):
    weights, _, sets = published
    (tmp_path / "file").touch()
    words = ("--eval", *MODEL, "--resume", weights, "--eval-sets", f"imagenet={sets['imagenet']}")
    line = refused(*words, "--output-dir", tmp_path / "file" / "out", base=())
    assert f"--output-dir {tmp_path / 'file' / 'out'} cannot be written: {tmp_path / 'file'} is no folder" in line


def test_an_unreadable_image_stops_before_anything_is_written(published, tmp_path):
    weights, _, sets = published
    write_image(tmp_path / "v2" / "0" / "a.jpeg", 0)
    (tmp_path / "v2" / "0" / "b.jpeg").write_bytes(b"no image")
    words = f"imagenet={sets['imagenet']}", f"imagenet-v2={tmp_path / 'v2'}"
    with pytest.raises((SystemExit, BadImageError), match=r"unreadable image .*b\.jpeg"):
        evaluate(tmp_path / "out", weights, *words)
    assert not (tmp_path / "out").exists()


def test_a_missing_severity_leaves_the_mean_corruption_error_out(published, tmp_path, capsys):
    weights, models, _ = published
    parts = make_corruptions(tmp_path / "c", models["raw"], ["fog", "snow"])
    shutil.rmtree(parts["snow/3"].parents[1])
    record = evaluate(tmp_path, weights, f"imagenet-c={tmp_path / 'c'}")["imagenet-c"]["raw"]
    assert "mce" not in record and "ce" not in record["corruptions"]["snow"] and record["corruptions"]["fog"]["ce"] > 0
    printed = capsys.readouterr().out
    assert "imagenet-c: 66 of 75 severities are missing" in printed
    assert "mean corruption error, raw: none, it is of 15 corruptions with 5 severities each\n" in printed


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--eval-sets", "folder=x"], "--eval-sets belongs to an evaluation; add --eval"),
        (["--eval", "--eval-sets", "imagenet-v3=x"], "imagenet-v3 is unknown; did you mean imagenet-v2"),
        (["--eval", "--eval-sets", "folder="], "needs NAME=PATH"),
        (["--eval", "--eval-sets", "val=x"], "val has no PATH"),
        (["--eval", "--eval-sets", "folder=x", "folder=x"], "folder=x is given twice"),
        (["--eval", "--eval-sets", "folder=x", "--save-predictions"], "--save-predictions needs --output-dir"),
        (["--eval", "--eval-sets", "folder=/none"], "--eval-sets folder=/none: /none is not a folder"),
    ],
)
def test_a_wrong_command_line_ends_in_one_line(published, refused, words, line):
    assert line in refused(*MODEL, *words, *["--resume", published[0]] * ("--eval" in words), base=())


def test_two_ranks_have_the_results_of_one(published, tmp_path):
    weights, _, sets = published
    words = ("--eval", *MODEL, "--resume", weights, "--save-predictions", "--eval-sets")
    write_image(tmp_path / "v2" / "7" / "a.jpeg", 0)  # one rank has no image of it
    words += (*(f"{name}={path}" for name, path in sets.items()), f"imagenet-v2={tmp_path / 'v2'}")
    outputs = tmp_path / "one", tmp_path / "two"
    run_main(*words, "--output-dir", outputs[0])
    finished = run_ranks(2, MAIN, *words, "--output-dir", outputs[1], "--prefetcher")  # the path of a GPU
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("imagenet-v2 is evaluated") == 1
    assert finished.stdout.count("imagenet-v2-2 is evaluated") == 1
    one, two = (json.loads((output / "evaluation.json").read_text())["sets"] for output in outputs)
    for name in (*sets, "imagenet-v2-2"):
        one_file, two_file = (np.load(output / f"predictions_{name}.npz") for output in outputs)
        for key in one_file.files:
            if one_file[key].dtype.kind == "f":
                np.testing.assert_allclose(one_file[key], two_file[key], rtol=1e-4)
            else:
                assert one_file[key].tolist() == two_file[key].tolist()
        for kind in ("raw", "ema"):
            assert two[name][kind]["loss"] == pytest.approx(one[name][kind]["loss"], rel=1e-5)
            assert two[name][kind]["acc1"] == one[name][kind]["acc1"]
