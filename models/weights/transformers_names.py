"""The names of transformers: ViT, DeiT, BEiT, DINOv2 and Swin.

They are the names in its files. Since version 5 the state_dict of a model in memory has others, which are read too.
"""

from models.weights.names import Names, Table


def _qkv(start: str, last: str) -> tuple[str, ...]:
    return tuple(f"{start}.{name}.{last}" for name in ("query", "key", "value"))


EMBEDDINGS = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.*": "embeddings.patch_embeddings.projection.*",
}
ATTENTION = {
    "blocks.#.attn.qkv.weight": _qkv("encoder.layer.#.attention.attention", "weight"),
    "blocks.#.attn.qkv.bias": _qkv("encoder.layer.#.attention.attention", "bias"),
    "blocks.#.attn.proj.*": "encoder.layer.#.attention.output.dense.*",
}
BLOCK = {
    "blocks.#.norm1.*": "encoder.layer.#.layernorm_before.*",
    "blocks.#.norm2.*": "encoder.layer.#.layernorm_after.*",
    "blocks.#.mlp.fc1.*": "encoder.layer.#.intermediate.dense.*",
    "blocks.#.mlp.fc2.*": "encoder.layer.#.output.dense.*",
}
NORM = {"norm.*": "layernorm.*"}
CLASSIFIER = {"head.*": "classifier.*"}

VIT = EMBEDDINGS | ATTENTION | BLOCK | NORM | CLASSIFIER
DEIT = VIT | {
    "dist_token": "embeddings.distillation_token",
    "head.*": "cls_classifier.*",
    "head_dist.*": "distillation_classifier.*",
}
BEIT = VIT | {
    "blocks.#.attn.q_bias": "encoder.layer.#.attention.attention.query.bias",
    "blocks.#.attn.v_bias": "encoder.layer.#.attention.attention.value.bias",
    "blocks.#.attn.relative_position_bias_table": (
        "encoder.layer.#.attention.attention.relative_position_bias.relative_position_bias_table"
    ),
    "rel_pos_bias.relative_position_bias_table": "encoder.relative_position_bias.relative_position_bias_table",
    "blocks.#.gamma_1": "encoder.layer.#.lambda_1",
    "blocks.#.gamma_2": "encoder.layer.#.lambda_2",
    "fc_norm.*": "pooler.layernorm.*",
}
del BEIT["blocks.#.attn.qkv.bias"]
DINOV2 = (
    EMBEDDINGS
    | ATTENTION
    | {
        "blocks.#.norm1.*": "encoder.layer.#.norm1.*",
        "blocks.#.norm2.*": "encoder.layer.#.norm2.*",
        "blocks.#.ls1.gamma": "encoder.layer.#.layer_scale1.lambda1",
        "blocks.#.ls2.gamma": "encoder.layer.#.layer_scale2.lambda1",
    }
    | NORM
    | CLASSIFIER
)
DINOV2_GELU = DINOV2 | {f"blocks.#.mlp.{name}.*": f"encoder.layer.#.mlp.{name}.*" for name in ("fc1", "fc2")}
DINOV2_SWIGLU = DINOV2 | {
    "blocks.#.mlp.fc1.*": "encoder.layer.#.mlp.weights_in.*",
    "blocks.#.mlp.fc2.*": "encoder.layer.#.mlp.weights_out.*",
}
SWIN_BLOCK = "encoder.layers.#.blocks.#"
SWIN = {
    "patch_embed.proj.*": "embeddings.patch_embeddings.projection.*",
    "patch_embed.norm.*": "embeddings.norm.*",
    "layers.#.blocks.#.attn.qkv.weight": _qkv(f"{SWIN_BLOCK}.attention.self", "weight"),
    "layers.#.blocks.#.attn.qkv.bias": _qkv(f"{SWIN_BLOCK}.attention.self", "bias"),
    "layers.#.blocks.#.attn.relative_position_bias_table": f"{SWIN_BLOCK}.attention.self.relative_position_bias_table",
    "layers.#.blocks.#.attn.proj.*": f"{SWIN_BLOCK}.attention.output.dense.*",
    "layers.#.blocks.#.norm1.*": f"{SWIN_BLOCK}.layernorm_before.*",
    "layers.#.blocks.#.norm2.*": f"{SWIN_BLOCK}.layernorm_after.*",
    "layers.#.blocks.#.mlp.fc1.*": f"{SWIN_BLOCK}.intermediate.dense.*",
    "layers.#.blocks.#.mlp.fc2.*": f"{SWIN_BLOCK}.output.dense.*",
    "layers.#+1.downsample.norm.*": "encoder.layers.#.downsample.norm.*",
    "layers.#+1.downsample.reduction.*": "encoder.layers.#.downsample.reduction.*",
    "norm.*": "layernorm.*",
    "head.fc.*": "classifier.*",
}

IN_MEMORY = {
    "encoder.relative_position_bias.": "shared_position_bias.",
    "attention.attention.relative_position_bias": "relative_position_bias",
    "attention.self.relative_position_bias_table": "attention.relative_position_bias.relative_position_bias_table",
    **{f"attention.{kind}.{name}.": f"attention.{name[0]}_proj."
       for kind in ("attention", "self") for name in ("query", "key", "value")},
    "attention.output.dense.": "attention.o_proj.",
    "intermediate.dense.": "mlp.fc1.",
    "output.dense.": "mlp.fc2.",
    "mlp.weights_out.": "mlp.down_proj.",
}  # fmt: skip
"""{words in the names of files: words in the names of a state_dict since version 5}"""


def _in_memory(table: Table, blocks: str) -> Table:
    """A table with the names of a state_dict, in which the blocks are under `blocks`."""

    def respelled(name: str) -> str:
        name = name.replace("encoder.layer.#.", f"{blocks}.#.")
        for of_file, of_model in IN_MEMORY.items():
            name = name.replace(of_file, of_model)
        return name

    table = {
        ours: respelled(theirs) if isinstance(theirs, str) else tuple(map(respelled, theirs))
        for ours, theirs in table.items()
    }
    if table.get("blocks.#.mlp.fc1.*", "").endswith("mlp.weights_in.*"):
        table["blocks.#.mlp.fc1.*"] = tuple(f"{blocks}.#.mlp.{name}_proj.*" for name in ("gate", "up"))
    return table


def _names(table: Table, blocks: str = "layers") -> Names:
    return Names(table, _in_memory(table, blocks))


VIT_NAMES, DEIT_NAMES, BEIT_NAMES = map(_names, (VIT, DEIT, BEIT))
SWIN_NAMES = _names(SWIN)
GELU_NAMES, SWIGLU_NAMES = (_names(table, "encoder.layer") for table in (DINOV2_GELU, DINOV2_SWIGLU))
