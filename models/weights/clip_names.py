"""The layouts of CLIP's image towers, which timm's own function converts: here are only the notes about them."""

from torch import nn

from models.weights.layouts import Layout, enter
from models.weights.names import Tensors
from models.weights.structure import activation


def _openai_to_timm(weights: Tensors, model: nn.Module) -> tuple[Tensors, list[str]]:
    act = type(activation(model)).__name__
    note = (
        f"OpenAI's CLIP and some of open_clip's models have QuickGELU as activation, which the file does not say; the "
        f"model has {act}; timm's names of models with QuickGELU contain clip_quickgelu"
    )
    return weights, [note]


def _timm_tower(weights: Tensors, model: nn.Module) -> tuple[Tensors, list[str]]:
    """SigLIP's tower pools with `attn_pool`, which the models of timm whose names contain gap do not have."""
    prefix = "visual.trunk.attn_pool."
    names = [name for name in weights if name.startswith(prefix)]
    if not names or getattr(model, "attn_pool", None) is not None or getattr(model, "global_pool", None) == "map":
        return weights, []
    kept = {name: tensor for name, tensor in weights.items() if name not in names}
    return kept, [f"left out: {prefix} ({len(names)} tensors), since the model pools with {model.global_pool}"]


enter(
    Layout(
        "open_clip with a tower of timm",
        "CLIP, SigLIP and others of open_clip, behind `visual.trunk.`, as timm converts them.",
        "visual.trunk.patch_embed.proj.weight",
        lambda names: True,
        _timm_tower,
    )
)
enter(
    Layout(
        "CLIP of OpenAI and open_clip",
        "The image tower behind `visual.`, as timm converts it; its projection becomes the classifier.",
        "visual.conv1.weight",
        lambda names: "visual.class_embedding" in names,
        _openai_to_timm,
    )
)
