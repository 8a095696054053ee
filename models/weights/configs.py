"""What the config.json beside a file of weights says about the model, and its tensors do not show."""

import json
from pathlib import Path

from torch import nn

from models.weights.layouts import Layout
from models.weights.structure import activation, is_gelu, norm_eps, num_heads

GELU = ("gelu", "gelu_python")
"""transformers' words for the GELU without approximation."""


def compare_with_config(model: nn.Module, path: str, layout: Layout | None) -> list[str]:
    """Compare a model with the config.json beside a file, or with what transformers' models have without one.

    Args:
        path: of the file of weights.
        layout: of its names; None = timm's.

    Returns:
        One line for each number or function in which the model differs.

    Raises:
        ValueError: the numbers of heads differ, so that the weights would compute something else.
    """
    file = Path(path).with_name("config.json")
    config = _read(file)
    if layout is None:
        return _compare_architectures(model, file, config)
    if layout.layer_norm_eps is None:
        return []
    heads, own = _heads(config), num_heads(model)
    if heads and own and {*heads} != {*own}:
        theirs, ours = (" ".join(map(str, dict.fromkeys(numbers))) for numbers in (heads, own))
        raise ValueError(f"{path} does not fit {type(model).__name__}: {file} has {theirs} heads, and the model {ours}")
    notes, eps = [], config.get("layer_norm_eps", layout.layer_norm_eps)
    says = f"{file} has" if "layer_norm_eps" in config else "without a config.json beside it the file is taken to have"
    if norm_eps(model) not in (None, eps):
        notes.append(f"{says} the epsilon {eps:g} in its layer norms, and the model {norm_eps(model):g}")
    words, act = config.get("hidden_act", GELU[0]), activation(model)
    if act is not None and is_gelu(act) != (words in GELU) and type(act).__name__ != "SiLU":
        notes.append(f"{file} has the activation {words}, and the model {type(act).__name__}")
    return notes


def _compare_architectures(model: nn.Module, file: Path, config: dict) -> list[str]:
    """A line if timm's config.json names another model."""
    theirs, ours = config.get("architecture"), (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    is_other = isinstance(theirs, str) and ours and theirs.partition(".")[0] != ours.removesuffix("_diverse")
    return [f"{file} has the architecture {theirs}, and the model is {ours}"] if is_other else []


def _read(file: Path) -> dict:
    """The content of a config.json of transformers or timm; {} for no such file, or another program's."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) and ("model_type" in config or "architecture" in config) else {}


def _heads(config: dict) -> list[int]:
    heads = config.get("num_attention_heads", config.get("num_heads"))
    return heads if isinstance(heads, list) else [heads] if isinstance(heads, int) else []
