"""Small models of transformers with the same weights in a model of timm; the names are written down here by hand."""

import timm.layers
import timm.models.beit
import timm.models.deit
import torch
from timm.models import VisionTransformer
from torch import nn

CLASSES, SIZE, PATCH, WIDTH, HEADS, DEPTH = 5, 32, 8, 24, 3, 3
SHAPE = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": WIDTH, "num_heads": HEADS, "depth": DEPTH}
CONFIG = {
    "image_size": SIZE,
    "patch_size": PATCH,
    "hidden_size": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "num_attention_heads": HEADS,
    "num_hidden_layers": DEPTH,
    "layer_norm_eps": 1e-6,
    "num_labels": CLASSES,
}


class TwoTokenViT(VisionTransformer):
    """A ViT of timm whose head reads what that of transformers' DINOv2 does: the class token and the mean patch."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.head = nn.Linear(2 * self.embed_dim, self.num_classes)

    def forward_head(self, x, pre_logits=False):
        return self.head(torch.cat([x[:, 0], x[:, self.num_prefix_tokens :].mean(dim=1)], dim=1))


def make_pair(family: str, transformers, **config):
    """A model of transformers and one of timm, float64, with the same random weights of size 0.3.

    Returns:
        Both models, and the function from weights or gradients with transformers' names to those with timm's.
    """
    theirs, timm_model, rename = FAMILIES[family](transformers, CONFIG | config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    theirs, timm_model = theirs.double(), timm_model.double()
    weights = rename({name: tensor.clone() for name, tensor in theirs.state_dict().items()})
    missing, unexpected = timm_model.load_state_dict(weights, strict=False)
    missing = [name for name in missing if not name.endswith(("_index", "k_bias"))]
    assert not unexpected and not missing, [unexpected, missing]
    return theirs, timm_model, rename


def _vit(transformers, config):
    theirs = transformers.ViTForImageClassification(transformers.ViTConfig(**config))
    return theirs, VisionTransformer(**SHAPE, num_classes=CLASSES), lambda w: _vit_names(w, "vit")


def _deit(transformers, config):
    theirs = transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**config))
    ours = timm.models.deit.VisionTransformerDistilled(**SHAPE, num_classes=CLASSES)
    return theirs, ours, lambda w: _vit_names(w, "deit")


def _dinov2(transformers, config):
    theirs = transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**_mlp_ratio(config)))
    ours = TwoTokenViT(**SHAPE, num_classes=CLASSES, init_values=1.0)
    return theirs, ours, lambda w: _vit_names(w, "dinov2")


def _dinov2_gated(transformers, config):
    theirs = transformers.Dinov2ForImageClassification(
        transformers.Dinov2Config(**_mlp_ratio(config), use_swiglu_ffn=True)
    )
    hidden = 64  # two thirds of 4 * WIDTH, rounded up to a multiple of 8
    gated = {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 2 * hidden / WIDTH}
    ours = TwoTokenViT(**SHAPE, num_classes=CLASSES, init_values=1.0, **gated)
    return theirs, ours, lambda w: _vit_names(w, "dinov2")


def _dinov2_registers(transformers, config):
    config = transformers.Dinov2WithRegistersConfig(**_mlp_ratio(config), num_register_tokens=2)
    theirs = transformers.Dinov2WithRegistersForImageClassification(config)
    ours = TwoTokenViT(**SHAPE, num_classes=CLASSES, init_values=1.0, reg_tokens=2, no_embed_class=True)

    def rename(weights):
        weights = _vit_names(weights, "dinov2_with_registers")
        of_class, weights["pos_embed"] = weights["pos_embed"].split([1, weights["pos_embed"].shape[1] - 1], dim=1)
        weights["cls_token"] = weights["cls_token"] + of_class
        return weights

    return theirs, ours, rename


def _beit(transformers, config):
    options = {"use_relative_position_bias": True, "layer_scale_init_value": 0.1, "drop_path_rate": 0.0}
    theirs = transformers.BeitForImageClassification(transformers.BeitConfig(**(options | config)))
    ours = timm.models.beit.Beit(
        **SHAPE, num_classes=CLASSES, init_values=0.1, use_abs_pos_emb=False, use_rel_pos_bias=True
    )
    return theirs, ours, lambda w: _vit_names(w, "beit")


FAMILIES = {
    "vit": _vit,
    "deit": _deit,
    "dinov2": _dinov2,
    "dinov2_gated": _dinov2_gated,
    "dinov2_with_registers": _dinov2_registers,
    "beit": _beit,
}

OF_BLOCK = {
    "attention.o_proj": "attn.proj",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "norm1": "norm1",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
OF_MODEL = {
    "embeddings.cls_token": "cls_token",
    "embeddings.distillation_token": "dist_token",
    "embeddings.register_tokens": "reg_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
    "pooler.layernorm.weight": "fc_norm.weight",
    "pooler.layernorm.bias": "fc_norm.bias",
}
LEFT_OUT = ("embeddings.mask_token",)


def _mlp_ratio(config: dict) -> dict:
    return {key: value for key, value in config.items() if key != "intermediate_size"} | {"mlp_ratio": 4}


def _vit_names(weights: dict[str, torch.Tensor], base: str) -> dict[str, torch.Tensor]:
    renamed = {}
    for old, new in (("classifier", "head"), ("cls_classifier", "head"), ("distillation_classifier", "head_dist")):
        for kind in ("weight", "bias"):
            tensor = weights.pop(f"{old}.{kind}", None)
            if tensor is not None:
                renamed[f"{new}.{kind}"] = tensor
    weights = {name.removeprefix(f"{base}."): tensor for name, tensor in weights.items()}
    for name in LEFT_OUT:
        weights.pop(name, None)
    for name, new in OF_MODEL.items():
        if name in weights:
            renamed[new] = weights.pop(name)
    start = "encoder.layer." if any(name.startswith("encoder.layer.") for name in weights) else "layers."
    for i in range(DEPTH):
        prefix = f"{start}{i}."
        block = {n.removeprefix(prefix): weights.pop(n) for n in [*weights] if n.startswith(prefix)}
        renamed |= {f"blocks.{i}.{name}": tensor for name, tensor in _block_names(block, base).items()}
    assert not weights, [*weights]
    return renamed


def _block_names(block: dict[str, torch.Tensor], base: str) -> dict[str, torch.Tensor]:
    renamed = {}
    parts = [block.pop(f"attention.{name}_proj.weight") for name in "qkv"]
    renamed["attn.qkv.weight"] = torch.cat(parts)
    biases = [block.pop(f"attention.{name}_proj.bias", None) for name in "qkv"]
    if base == "beit":
        renamed["attn.q_bias"], renamed["attn.v_bias"] = biases[0], biases[2]
        renamed["gamma_1"], renamed["gamma_2"] = block.pop("lambda_1"), block.pop("lambda_2")
        name = "relative_position_bias_table"
        renamed[f"attn.{name}"] = block.pop(f"relative_position_bias.{name}")
    else:
        renamed["attn.qkv.bias"] = torch.cat(biases)
    for kind in ("weight", "bias"):
        if f"mlp.gate_proj.{kind}" in block:
            renamed[f"mlp.fc1.{kind}"] = torch.cat([block.pop(f"mlp.{name}_proj.{kind}") for name in ("gate", "up")])
            renamed[f"mlp.fc2.{kind}"] = block.pop(f"mlp.down_proj.{kind}")
    for k in (1, 2):
        if f"layer_scale{k}.lambda1" in block:
            renamed[f"ls{k}.gamma"] = block.pop(f"layer_scale{k}.lambda1")
    for old, new in OF_BLOCK.items():
        for kind in ("weight", "bias"):
            if f"{old}.{kind}" in block:
                renamed[f"{new}.{kind}"] = block.pop(f"{old}.{kind}")
    assert not block, [*block]
    return renamed
