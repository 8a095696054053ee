"""Exported weights are used as the checkpoint that they are from: their preprocessing, the names of their classes."""

import pytest
import torch
from exporting import CLASSES, FLAGS, checkpoint, exported
from helpers import make_image_folder, model_of, run_main

from models import weights

OTHER = {"mean": [0.25, 0.5, 0.75], "std": [0.3, 0.2, 0.1], "interpolation": "bilinear", "crop_mode": None}
MODEL = (
    *("--model", "deit_tiny_patch16_224", "--patch-size", 8, "--input-size", 32),
    *("--model-kwargs", "depth=2", "embed_dim=24", "num_heads=3"),
)


@pytest.fixture
def trained(tmp_path):
    """A checkpoint whose classes are not in the order of their names."""
    path = tmp_path / "checkpoint.pth"
    checkpoint(path, flags=FLAGS | OTHER)
    stored = torch.load(path)
    stored["data"]["classes"] = CLASSES[::-1]
    torch.save(stored, path)
    return path


@pytest.mark.parametrize("to", ["timm", "safetensors"])
def test_an_evaluation_gives_the_numbers_of_the_checkpoint(trained, tmp_path, capsys, to):
    """Also where the data has only some of the classes; averaged weights are called so."""
    file = exported(trained, to, tmp_path / "out", "--ema") / "model.safetensors"
    data = make_image_folder(tmp_path / "data", classes=CLASSES[1:5])
    printed = []
    for words in (("--finetune", trained, "--checkpoint-key", "model_ema"), ("--finetune", file, *MODEL)):
        capsys.readouterr()
        run_main("--eval", "--device", "cpu", "--num-workers", 0, "--data-set", "IMNET", "--data-path", data, *words)
        out = capsys.readouterr().out
        assert "16 images, 4 of 7 classes" in out
        printed.append([line for line in out.splitlines() if line.startswith(("images of 32 px", "EMA", "test acc"))])
    assert len(printed[0]) == 3 and printed[0] == printed[1]


@pytest.mark.parametrize("to", ["timm", "safetensors"])
def test_a_head_is_loaded_by_the_names_of_the_classes(trained, tmp_path, to):
    file = exported(trained, to, tmp_path / "out") / "model.safetensors"
    model = model_of(9)
    notes = weights.load_weights(model, str(file), classes=CLASSES)
    assert torch.equal(model.head.weight, torch.load(trained)["model"]["head.weight"].flip(0))
    assert any("loaded by the names of the classes" in note for note in notes)
    again = exported(file, to, tmp_path / "again", *MODEL) / "model.safetensors"
    assert weights.describe(str(again)) == weights.describe(str(file))
    assert weights.describe(str(again)).classes == CLASSES[::-1]


@pytest.mark.parametrize("to", ["timm", "safetensors"])
def test_weights_without_their_remedy_are_refused(tmp_path, to):
    """Their logits would be others."""
    file = tmp_path / "checkpoint.pth"
    trained = checkpoint(file, flags=FLAGS | {"remedy": ["xsa"]}, remedies=["xsa"])
    file = exported(file, to, tmp_path / "out") / "model.safetensors"
    with pytest.raises(ValueError, match="was trained with --remedy xsa, which the model does not have"):
        weights.load_weights(model_of(), str(file))
    model = model_of(remedies=["xsa"])
    assert not [note for note in weights.load_weights(model, str(file), new_head=False) if "remedy" in note]
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.eval()(images), trained(images))


def test_another_file_in_the_folder_is_not_described(trained, tmp_path):
    folder = exported(trained, "timm", tmp_path / "out")
    torch.save(model_of().state_dict(), folder / "other.pth")
    assert weights.describe(str(folder / "other.pth")) == ([], {}, {}, False)
    (folder / "config.json").write_text("no JSON")
    assert weights.describe(str(folder / "model.safetensors")) == ([], {}, {}, False)
