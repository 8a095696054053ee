"""The remedies of an exported model: their parameters in a file, and the lines that apply them to the stock model."""

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import nn

from diversity import apply_remedy
from models.exporting.trained import Trained
from models.remedies import PREFIX

FILE = "remedies.safetensors"


def write_remedies(trained: Trained, folder: Path) -> tuple[str, list[str]]:
    """Write the parameters of the remedies to `FILE`, with their names in `model.remedies`.

    Returns:
        Lines of Python that apply the remedies to the stock model, and one sentence for the reader; empty for a model
        without remedies.
    """
    if not trained.remedies:
        return "", []
    tensors = {k: v.contiguous() for k, v in trained.model.get_submodule(PREFIX).state_dict().items()}
    lines = ["import diversity  # of this repository"]
    for name, settings in trained.remedies.items():
        arguments = "".join(f", {setting}={value!r}" for setting, value in settings.items())
        lines.append(f'diversity.apply_remedy(model, "{name}"{arguments})')
    if tensors:
        safetensors.torch.save_file(tensors, folder / FILE)
        lines.append(f'model.remedies.load_state_dict(safetensors.torch.load_file("DIR/{FILE}"))')
        lines.insert(0, "import safetensors.torch")
    names = ", ".join(trained.remedies)
    what = f"the parameters are in {FILE}" if tensors else "without parameters"
    return "\n".join(lines), [
        f"The model was trained with the remedies {names} ({what}), which plain timm cannot express. Without the lines "
        "that apply them it computes other logits, and has another accuracy."
    ]


def read_remedies(model: nn.Module, remedies: Mapping[str, Mapping[str, object]], folder: Path):
    """Apply remedies to a stock model, with the parameters that `write_remedies` wrote."""
    for name, settings in remedies.items():
        apply_remedy(model, name, **settings)
    if (folder / FILE).exists():
        model.get_submodule(PREFIX).load_state_dict(safetensors.torch.load_file(folder / FILE))
