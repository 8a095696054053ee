"""A file of ONNX, compared with torch by onnxruntime."""

import contextlib
import io
import logging
import warnings
from pathlib import Path

import torch

from models.exporting.registry import Written, export_format
from models.exporting.trained import Trained, metadata

FILE = "model.onnx"

TOLERANCE = 1e-4
"""The largest difference to torch's outputs that is not refused, relative to their largest absolute value."""


@export_format("onnx", extra="onnx", packages=("onnx", "onnxscript", "onnxruntime"))
def to_onnx(trained: Trained, folder: Path) -> Written:
    """model.onnx, remedies included: images [B, 3, S, S], preprocessed as its metadata say, to logits [B, C]; any
    number of images.

    Raises:
        ValueError: torch cannot export the model, or onnxruntime computes other outputs.
    """
    path = folder / FILE
    images = trained.images()
    batch = torch.export.Dim("batch", min=1)
    try:
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                trained.model, (images,), dynamo=True, dynamic_shapes=({0: batch},), verbose=False,
                input_names=["images"], output_names=["logits"],
            )  # fmt: skip
    except Exception as error:  # torch raises many types for what it cannot export
        raise ValueError(f"cannot hold the model: torch does not export it ({_first_line(error)})") from None
    program.model.metadata_props.update(metadata(trained))
    with _quiet():
        program.save(path)
    check = _compare(trained, path)
    usage = f"""import onnxruntime

session = onnxruntime.InferenceSession("DIR/{FILE}")
(output,) = session.run(None, {{"images": images}})  # float32 [B, 3, {images.shape[-1]}, {images.shape[-1]}]"""
    return Written(usage, "onnx", check)


def _compare(trained: Trained, path: Path) -> str:
    """One line about the largest difference between onnxruntime and torch, for one and for three images.

    Raises:
        ValueError: it is above `TOLERANCE`.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    difference, largest = 0.0, 0.0
    for count in (1, 3):
        images = trained.images(count)
        expected = trained.logits(images)
        (found,) = session.run(None, {"images": images.numpy()})
        difference = max(difference, (torch.from_numpy(found) - expected).abs().max().item())
        largest = max(largest, expected.abs().max().item())
    if not difference <= TOLERANCE * max(largest, 1e-6):
        raise ValueError(
            f"cannot hold the model: the outputs of onnxruntime differ from torch's by up to {difference:.1e}"
        )
    return f"outputs of onnxruntime differ from torch's by at most {difference:.1e} (largest output {largest:.3g})"


@contextlib.contextmanager
def _quiet():
    """Drop what torch prints and logs about its progress."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
