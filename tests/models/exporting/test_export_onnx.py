"""Exports for ONNX: onnxruntime computes the logits of the trained model, remedies included."""

import json

import pytest
import torch
from exporting import CLASSES, FLAGS, checkpoint, exported
from helpers import one_line

from models.exporting import onnx_file

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

REMEDIES = {"remedy": ["reattention", "attnscale"], "remedy_kwargs": {}}


@pytest.mark.parametrize(
    "flags", [pytest.param({}, marks=pytest.mark.slow, id="stock"), pytest.param(REMEDIES, id="remedies")]
)
def test_onnxruntime_computes_the_logits(tmp_path, flags, capsys):
    model = checkpoint(tmp_path / "file.pth", flags=FLAGS | flags, remedies=flags.get("remedy", ()))
    folder = exported(tmp_path / "file.pth", "onnx", tmp_path / "out")
    assert "outputs of onnxruntime differ from torch's by at most" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    for count in (1, 5):
        images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))
        (found,) = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), model(images), rtol=1e-4, atol=1e-5)
    properties = session.get_modelmeta().custom_metadata_map
    assert json.loads(properties["label_names"]) == CLASSES
    assert json.loads(properties["preprocessing"])["crop_mode"] == "squash"


@pytest.mark.slow
def test_a_file_with_other_outputs_is_refused(tmp_path, monkeypatch):
    checkpoint(tmp_path / "file.pth")
    monkeypatch.setattr(onnx_file, "TOLERANCE", 0.0)
    with pytest.raises(SystemExit) as caught:
        exported(tmp_path / "file.pth", "onnx", tmp_path / "out")
    one_line(caught, "--to onnx cannot hold the model: the outputs of onnxruntime differ from torch's by up to")
    assert [path.name for path in tmp_path.iterdir()] == ["file.pth"]
