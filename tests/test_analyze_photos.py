"""analyze.py on weights of another program and on photographs without labels, end to end on made files."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from analyzing import numbers
from helpers import make_image_folder, model_of, one_line, photo, run_main
from PIL import Image
from transformers_names import made_dinov2

import analyze
from diversity import measure_redundancy
from models import build_model, weights
from pipeline.image_folder import UnlabelledFolder
from reports import redundancy, subjects

NAME = "vit_small_patch14_dinov2.lvd142m"
SMALL = {"depth": 2, "embed_dim": 24, "num_heads": 3}
MODEL = ("--model", NAME, "--input-size", "70", "--model-kwargs", *(f"{key}={value}" for key, value in SMALL.items()))
ORDER = ["a.png", "b.png", "c.JPEG", "d.png", "e.png", "f.png", "more/a.png"]
WITHOUT_HEAD = "measured without a classifier, as its weights have none of 2 classes"


@pytest.fixture
def photos(tmp_path):
    """A folder of seven photographs of two sizes, one of them in a folder, with files that are none."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for number, name in enumerate(reversed(ORDER)):
        photo(number, size=80 + 10 * (number % 2)).save(folder / name)
    (folder / "list.txt").write_text("a.png\n")
    (folder / "._a.png").write_bytes(b"hidden")
    return folder


@pytest.fixture
def file(tmp_path):
    """Weights in float16 with the names of transformers."""
    path = tmp_path / "dinov2.safetensors"
    safetensors.torch.save_file({name: tensor.half() for name, tensor in made_dinov2().items()}, path)
    return path


def analyzed(out, *words):
    """The content of redundancy.json after `python analyze.py *words`."""
    analyze.main([*map(str, words), "--num-workers", "0", "--device", "cpu", "--output-dir", str(out)])
    return json.loads((out / "redundancy.json").read_text())


def samples_of(folder):
    """The photographs as DINOv2 needs them: 70 px without a crop, ImageNet's mean and deviation."""
    images = []
    for name in ORDER:
        pixels = np.asarray(Image.open(folder / name).convert("RGB").resize((70, 70), Image.Resampling.BICUBIC))
        images.append((pixels / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225))
    return torch.tensor(np.stack(images)).float().permute(0, 3, 1, 2)


@pytest.mark.usefixtures("undrawn")
def test_weights_of_transformers_on_photographs(file, photos, tmp_path, capsys):
    """As a user would; the random weights beside them see the same pixels."""
    flags = (*MODEL, "--data-set", "UNLABELLED", "--data-path", photos, "--names", "DINOv2", "random")
    configurations = analyzed(tmp_path / "out", file, "random", *flags)["cells"]
    trained, initial = build_model(NAME, 0, 70, **SMALL), build_initial()
    weights.load_weights(trained, str(file))
    for name, model in (("DINOv2", trained), ("random", initial)):
        (report,) = configurations[name]
        of_images = measure_redundancy(model, [samples_of(photos)])
        for level in ("embedding", "attention"):
            for measure, values in of_images[level].items():
                pairs = zip(report[level][measure], values, strict=True)
                of_layers = [(value, exact) for value, exact in pairs if exact is not None]
                assert all(value == pytest.approx(exact, rel=1e-4) for value, exact in of_layers), (name, measure)
        assert report["weight"] == of_images["weight"]
        for measure in ("within_class", "between_class"):
            assert {*report["embedding"][measure]} == {None} and f"embedding_{measure}" not in report["summary"]
        on = {"data_set": "photos", "split": "without labels", "input_size": 70, "images": 7}
        assert on.items() <= report["measured_on"].items()
    printed = capsys.readouterr().out
    notes = (tmp_path / "out" / "redundancy.md").read_text().split("\n\n")[1].splitlines()
    assert notes[0].startswith("- measured on photos without labels at 70 px, files ")
    assert notes[0].endswith("the first 7 images")
    assert notes[-1] == "- images of 70 px: mean 0.485 0.456 0.406, std 0.229 0.224 0.225, bicubic, center crop 1"
    assert f"{file}: pos_embed" not in printed and "embeddings.mask_token left out" in printed
    assert "classifier" not in printed and "head" not in printed.replace("head cosine", "").replace("heads", "")


def build_initial():
    subjects.random_seed(0)
    return build_model(NAME, 0, 70, **SMALL)


@pytest.mark.usefixtures("undrawn")
def test_preprocessing_that_differs_is_noted(file, photos, tmp_path):
    """A model of this program on the photographs, beside one that was trained with another crop."""
    path = tmp_path / "cropped.pth"
    flags = {"model": NAME, "input_size": 70, "model_kwargs": SMALL, "eval_crop_ratio": 0.875}
    torch.save({"model": build_initial().state_dict(), "args": flags}, path)
    analyzed(tmp_path / "out", file, path, *MODEL, "--data-set", "UNLABELLED", "--data-path", photos)
    note = (tmp_path / "out" / "redundancy.md").read_text().split("\n\n")[1].splitlines()[-1]
    assert note.startswith("- preprocessing differs: images of 70 px: mean 0.485 ")
    assert "crop 1 in dinov2.safetensors; " in note and note.endswith("crop 0.875 in cropped.pth")


@pytest.mark.usefixtures("undrawn")
def test_a_backbone_on_labelled_images_has_no_random_classifier(file, tmp_path, monkeypatch, capsys):
    models, load = [], subjects.load_model
    monkeypatch.setattr(redundancy, "load_model", lambda *args: models.append(load(*args)) or models[0])
    folder = make_image_folder(tmp_path / "images", size=80)
    flags = ("--data-set", "IMNET", "--data-path", folder)
    report = analyzed(tmp_path / "out", file, *MODEL, *flags)
    printed = capsys.readouterr().out
    assert f"{file}: {WITHOUT_HEAD}" in printed and "initial values" not in printed
    assert models[0].num_classes == 0 and [*models[0].head.parameters()] == []
    assert report["measured_on"]["split"] == "validation"
    assert all(value > 0 for value in report["embedding"]["between_class"])


@pytest.mark.usefixtures("undrawn")
def test_a_classifier_is_not_needed_without_labels(photos, tmp_path, capsys):
    """A file with a classifier, into a model that has none as the data has no classes."""
    path = tmp_path / "weights.pth"
    torch.save(model_of(1).state_dict(), path)
    model = ("--model", "deit_tiny_patch16_224_diverse", "--patch-size", "8", *("--input-size", "32"), *MODEL[4:])
    flags = (*model, "--data-set", "UNLABELLED", "--data-path", photos)
    without = analyzed(tmp_path / "a", path, *flags)
    assert "head.weight dropped: the model has no classifier" in capsys.readouterr().out
    with_head = analyzed(tmp_path / "b", path, *flags, "--num-classes", "7")
    assert "head" not in capsys.readouterr().out.partition("written to")[2].replace("heads", "")
    assert numbers(without) == numbers(with_head)


def test_images_without_labels(photos):
    folder = UnlabelledFolder(photos)
    assert [path for path, _ in folder.samples] == [str(photos / name) for name in ORDER]
    assert folder.note == f"files left out for their extension in {photos}: 1 (.txt 1)"


def test_a_folder_without_images_is_refused(file, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.heic").touch()
    with pytest.raises(SystemExit) as caught:
        analyzed(tmp_path / "out", file, *MODEL, "--data-set", "UNLABELLED", "--data-path", tmp_path / "empty")
    one_line(caught, "UNLABELLED", tmp_path / "empty", "there is no image in it", "1 (.heic 1)")


@pytest.mark.parametrize("flags", [(), ("--check-data",), ("--num-classes", "5"), ("--eval", "--finetune")])
def test_main_refuses_images_without_labels(flags, file, photos, tmp_path):
    flags = (*flags, file) if "--finetune" in flags else flags
    with pytest.raises(SystemExit) as caught:
        run_main("--data-set", "UNLABELLED", "--data-path", photos, "--num-workers", "0", "--device", "cpu", *flags)
    one_line(caught, "UNLABELLED has no labels", "analyze.py")


def test_the_other_folders_name_it_for_a_flat_folder(photos):
    with pytest.raises(SystemExit) as caught:
        run_main("--data-path", photos, "--device", "cpu")
    one_line(caught, "no folder 'train' (found: more)", "see --data-set UNLABELLED")
