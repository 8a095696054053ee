"""Every family of backbones: TappedViT against a forward pass unrolled by hand, and a training step on it."""

import copy
import math
from typing import NamedTuple

import numpy as np
import pytest
import timm
import torch
from golden_inputs import normals
from timm.layers import Attention
from torch.nn import functional as F

from diversity import (
    LEVELS,
    REGULARIZERS,
    TAPS,
    WEIGHT_GROUPS,
    DiversityObjective,
    PatchMixup,
    TappedViT,
)

CLASSES = 5
VIT = dict(img_size=32, patch_size=8, depth=3, embed_dim=24, num_heads=3)
SWIN = dict(img_size=32, patch_size=4, window_size=4, embed_dim=12, depths=(2, 2), num_heads=(2, 4), drop_path_rate=0)


class Family(NamedTuple):
    """A kind of model. `comparable`: whether the maps of its first and its last tapped block can be compared."""

    timm_name: str
    options: dict
    num_prefix_tokens: int = 1
    weight_groups: tuple = WEIGHT_GROUPS
    comparable: bool = True


FAMILIES = {
    "vit": Family("vit_tiny_patch16_224", {}),
    "deit": Family("deit_tiny_patch16_224", {}),
    "average": Family("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}, 0),
    "registers": Family("vit_tiny_patch16_224", {"reg_tokens": 4}, 5),
    "distilled": Family("deit_tiny_distilled_patch16_224", {}, 2),
    "deit3": Family("deit3_small_patch16_224", {}),  # LayerScale
    "beit": Family("beit_base_patch16_224", {}),
    "beit_shared": Family(
        "beit_base_patch16_224",
        dict(use_rel_pos_bias=False, use_shared_rel_pos_bias=True, use_abs_pos_emb=True, global_pool="token"),
    ),
    "eva": Family("eva_giant_patch14_224", {}),
    "eva02": Family("eva02_tiny_patch14_224", {"qkv_fused": False}),  # rotary embedding, packed SwiGLU
    "eva02_clip": Family("eva02_base_patch16_clip_224", {}, 1, ("qkv", "proj", "fc2")),  # SwiGLU, norm within attention
    "dinov3": Family("vit_small_patch16_dinov3", {}, 5),
    "rope": Family("vit_small_patch16_rope_224", {}),
    "swin": Family("swin_tiny_patch4_window7_224", {}, 0),  # its last stage is a single window
    "swin_windows": Family("swin_tiny_patch4_window7_224", {"patch_size": 2}, 0, comparable=False),
    "swinv2": Family("swinv2_tiny_window8_256", {"patch_size": 2}, 0, comparable=False),
}


def build(name="deit", **options):
    """A small timm model in float64 with lively weights, in training mode."""
    family = FAMILIES[name]
    size = SWIN if "swin" in name else VIT
    torch.manual_seed(0)
    model = timm.create_model(
        family.timm_name, **{**size, "num_classes": CLASSES, **family.options, **options}
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.train()


def images(batch=2):
    return normals(1, batch, 3, 32, 32)


def taps_of(family):
    return [tap for tap in TAPS if family.comparable or tap not in ("attention_first", "attention_last")]


def hooks(model):
    return [hook for module in model.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]


def attentions(model):
    """The modules that have a fused form."""
    return [module for module in model.modules() if hasattr(module, "fused_attn")]


def fused(model):
    return [attn.fused_attn for attn in attentions(model)]


# --- the unrolled forward


def unrolled(name, model, samples, emb_layers=(-1,), attn_layers=(0,), groups=("qkv",)):
    """All taps, patch logits and logits, written out from the weights; layers are indices of the tapped blocks."""
    if "swin" in name:
        *earlier, stage = model.layers
        x = stage.downsample(torch.nn.Sequential(*earlier)(model.patch_embed(samples)))
        blocks, forward = stage.blocks, swin_block
        all_blocks = [block for stage in model.layers for block in stage.blocks]
    else:
        x, context = embedded(name, model, samples)
        all_blocks = blocks = model.blocks

        def forward(block, x):
            return vit_block(block, x, **context)

    taps, outputs, maps = {"first": patches(name, x)}, [], []
    for block in blocks:
        x, block_maps = forward(block, x)
        outputs.append(patches(name, x))
        maps.append(block_maps)
    logits, patch_logits = classified(name, model, x)
    return taps | {
        "last": stacked(outputs, emb_layers),
        "tokens": x,
        "attention": stacked(maps, attn_layers),
        "attention_first": maps[0],
        "attention_last": maps[-1],
        "weights": weight_stacks(all_blocks, groups),
        "patch_logits": patch_logits,
        "logits": logits,
    }


def patches(name, tokens):
    """[B, P, D], without prefix tokens."""
    return tokens.reshape(len(tokens), -1, tokens.shape[-1])[:, FAMILIES[name].num_prefix_tokens :]


def classified(name, model, tokens):
    """Logits (of both heads, in distilled training) and patch logits from the output of the last block."""
    normed = model.norm(tokens)
    logits = model.forward_head(normed)
    if "swin" in name:
        return logits, model.head.fc(patches(name, normed))
    return logits, model.head(model.fc_norm(patches(name, normed)))


def stacked(values, layers):
    return values[layers[0]] if len(layers) == 1 else torch.stack([values[i] for i in layers])


def embedded(name, model, samples):
    """Input of the first block, and what else its blocks are given: rotary angles or a shared bias."""
    x = model.patch_embed(samples)
    if name.startswith("beit"):
        x = torch.cat((model.cls_token.expand(len(x), -1, -1), x), dim=1)
        x = x if model.pos_embed is None else x + model.pos_embed
        table = None if model.rel_pos_bias is None else model.rel_pos_bias.relative_position_bias_table
        return x, {"bias": class_and_relative_bias(table, model.patch_embed.grid_size)}
    x = model._pos_embed(x)
    return (x[0], {"rope": x[1]}) if isinstance(x, tuple) else (x, {})


def vit_block(block, x, rope=None, bias=None):
    """The output and the attention maps of a ViT, BEiT or EVA block."""
    attn = block.attn
    q, k, v = queries_keys_values(attn, block.norm1(x))
    if rope is not None:
        q, k = (rotated(heads, rope, attn.num_prefix_tokens, attn.rotate_half) for heads in (q, k))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if getattr(attn, "relative_position_bias_table", None) is not None:
        bias = class_and_relative_bias(attn.relative_position_bias_table, attn.window_size)
    maps = torch.softmax(scores if bias is None else scores + bias, dim=-1)
    merged = (maps @ v).transpose(1, 2).flatten(2)
    x = x + scale(block, 1) * attn.proj(attn.norm(merged) if hasattr(attn, "norm") else merged)
    return x + scale(block, 2) * block.mlp(block.norm2(x)), maps


def scale(block, branch):
    """LayerScale of the attention (1) or the MLP (2) branch, 1 without."""
    gamma = getattr(getattr(block, f"ls{branch}", None), "gamma", None)
    gamma = getattr(block, f"gamma_{branch}", None) if gamma is None else gamma
    return 1 if gamma is None else gamma


def queries_keys_values(attn, x):
    """Three [B, H, N, head_dim], by hand from the weights and biases."""
    heads = []
    for k, weight in enumerate(qkv_weights(attn)):
        if getattr(attn, "qkv", None) is None:
            bias = (attn.q_proj, attn.k_proj, attn.v_proj)[k].bias
        elif attn.qkv.bias is not None:
            bias = attn.qkv.bias[k * len(weight) : (k + 1) * len(weight)]
        else:
            bias = (attn.q_bias, None, attn.v_bias)[k]
        values = x @ weight.T + (0 if bias is None else bias)
        heads.append(values.reshape(*x.shape[:2], attn.num_heads, -1).transpose(1, 2))
    return heads


def qkv_weights(attn):
    """The matrices of queries, keys and values."""
    if getattr(attn, "qkv", None) is None:
        return [attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight]
    rows = len(attn.qkv.weight) // 3
    return [attn.qkv.weight[k * rows : (k + 1) * rows] for k in range(3)]


def rotated(heads, rope, prefix, halves):
    """Patch tokens turned by their angles: pairs of neighbours, or of the two halves, as complex numbers."""
    dim = heads.shape[-1]
    even, odd = (slice(dim // 2), slice(dim // 2, dim)) if halves else (slice(0, dim, 2), slice(1, dim, 2))
    sine, cosine = rope.to(heads).chunk(2, dim=-1)
    tokens = heads[:, :, prefix:]
    turned = torch.complex(tokens[..., even], tokens[..., odd]) * torch.complex(cosine[..., even], sine[..., even])
    result = torch.empty_like(tokens)
    result[..., even], result[..., odd] = turned.real, turned.imag
    return torch.cat((heads[:, :, :prefix], result), dim=2)


def relative_bias(table, window):
    """[H, A, A] from [offsets, H]: token i looks at token j through the offset of their places in the window."""
    y, x = torch.meshgrid(torch.arange(window[0]), torch.arange(window[1]), indexing="ij")
    down, right = (place.flatten()[:, None] - place.flatten() for place in (y, x))
    return table[(down + window[0] - 1) * (2 * window[1] - 1) + right + window[1] - 1].permute(2, 0, 1)


def class_and_relative_bias(table, window):
    """[H, 1 + A, 1 + A] with the class token, whose offsets are the last three: to tokens, from tokens, to itself."""
    if table is None:
        return None
    bias = F.pad(relative_bias(table, window), (1, 0, 1, 0))
    bias[:, 0, :], bias[:, :, 0], bias[:, 0, 0] = table[-3, :, None], table[-2, :, None], table[-1]
    return bias


def swin_block(block, x):
    """The output [B, R, C, D] and the maps of a Swin block of either version, window by window."""
    attn, second = block.attn, hasattr(block.attn, "cpb_mlp")
    batch, rows, columns, dim = x.shape
    places, allowed = windows(rows, columns, block.window_size, block.shift_size)
    tokens = (x if second else block.norm1(x)).reshape(batch, rows * columns, dim)
    q, k, v = queries_keys_values(attn, tokens[:, places].flatten(0, 1))
    if second:
        cosines = F.cosine_similarity(q[..., :, None, :], k[..., None, :, :], dim=-1)
        scores = cosines * attn.logit_scale.clamp(max=math.log(100)).exp()
        table = 16 * torch.sigmoid(attn.cpb_mlp(attn.relative_coords_table).reshape(-1, attn.num_heads))
    else:
        scores = q @ k.mT / q.shape[-1] ** 0.5
        table = attn.relative_position_bias_table
    scores = scores + relative_bias(table, block.window_size)
    maps = scores.masked_fill(~allowed.repeat(batch, 1, 1)[:, None], -torch.inf).softmax(dim=-1)
    merged = attn.proj((maps @ v).transpose(1, 2).flatten(2)).unflatten(0, (batch, -1))
    branch = torch.empty_like(tokens)
    branch[:, places] = merged
    branch = branch.reshape(x.shape)
    x = x + (block.norm1(branch) if second else branch)
    return x + (block.norm2(block.mlp(x)) if second else block.mlp(block.norm2(x))), maps


def windows(rows, columns, size, shift):
    """Places of each window's tokens in the grid, [windows, A], and which pairs did not meet by wrapping around."""
    places, sides = [], []
    for top in range(0, rows, size[0]):
        for left in range(0, columns, size[1]):
            window = [
                (y + shift[0], x + shift[1]) for y in range(top, top + size[0]) for x in range(left, left + size[1])
            ]
            places.append([(y % rows) * columns + x % columns for y, x in window])
            sides.append([2 * (y >= rows) + (x >= columns) for y, x in window])
    sides = torch.tensor(sides)
    return torch.tensor(places), sides[:, :, None] == sides[:, None, :]


def weight_stacks(blocks, groups):
    """The matrices in order, grouped by shape: one stack, or a tuple of several."""
    matrices = []
    for block in blocks:
        further = {"proj": block.attn.proj, "fc1": getattr(block.mlp, "fc1", None), "fc2": block.mlp.fc2}
        matrices += qkv_weights(block.attn) if "qkv" in groups else []
        matrices += [layer.weight for group, layer in further.items() if group in groups]
    shapes = list(dict.fromkeys(matrix.shape for matrix in matrices))
    stacks = tuple(torch.stack([matrix for matrix in matrices if matrix.shape == shape]) for shape in shapes)
    return stacks[0] if len(stacks) == 1 else stacks


# --- values


@pytest.mark.parametrize("layers", ["default", "all"])
@pytest.mark.parametrize("name", FAMILIES)
def test_taps_equal_an_unrolled_forward(name, layers):
    family, model, samples = FAMILIES[name], build(name), images()
    stock = copy.deepcopy(model)
    chosen, indices = {}, {}
    if layers == "all":
        every = range(2 if "swin" in name else 3)
        chosen = dict(emb_layers="all", attn_layers="all", weight_groups=family.weight_groups)
        indices = dict(emb_layers=every, attn_layers=every, groups=family.weight_groups)
    output = TappedViT(model, reads=taps_of(family), patch_logits=True, **chosen)(samples)
    expected = unrolled(name, stock, samples, **indices)
    for tap in (*taps_of(family), "patch_logits", "logits"):
        value = getattr(output, tap)
        torch.testing.assert_close(value, expected[tap], rtol=1e-9, atol=1e-10, msg=lambda m, t=tap: f"{t}: {m}")
    torch.testing.assert_close(output.logits, stock(samples), rtol=1e-9, atol=1e-10)
    assert output.dist_logits is None


@pytest.mark.parametrize("name", FAMILIES)
def test_eval_returns_the_logits_of_the_untouched_fused_model(name):
    stock = build(name).eval()
    tapped = TappedViT(copy.deepcopy(stock), taps_of(FAMILIES[name]), True, emb_layers="all", attn_layers="all").eval()
    for attn in attentions(stock):
        attn.fused_attn = True
    logits = tapped(images())
    assert type(logits) is torch.Tensor
    torch.testing.assert_close(logits, stock(images()), rtol=0, atol=1e-6)
    assert not tapped._captured


def test_weights_come_block_by_block_and_then_by_group():
    blocks = build().blocks
    qkv, proj = ([getattr(block.attn, group).weight for block in blocks] for group in ("qkv", "proj"))
    fc1 = [block.mlp.fc1.weight for block in blocks]

    def weights(groups):
        return TappedViT(build(), ["weights"], weight_groups=groups)(images()).weights

    assert torch.equal(weights("qkv"), torch.stack([rows for matrix in qkv for rows in matrix.split(24)]))
    assert torch.equal(weights("fc1"), torch.stack(fc1))
    square = [rows for i in range(3) for rows in (*qkv[i].split(24), proj[i])]
    assert torch.equal(weights("proj,qkv"), torch.stack(square))
    for stacks in (weights("fc1,proj,qkv"), weights(("qkv", "proj", "fc1"))):
        assert type(stacks) is tuple and len(stacks) == 2
        assert torch.equal(stacks[0], torch.stack(square)) and torch.equal(stacks[1], torch.stack(fc1))


# --- hooks


@pytest.mark.parametrize("name", FAMILIES)
def test_close_restores_the_model_whose_keys_are_timms(name):
    model = build(name)
    keys = list(model.state_dict())
    for attn in attentions(model):
        attn.fused_attn = True
    tapped = TappedViT(model, taps_of(FAMILIES[name]), patch_logits=True, emb_layers="all", attn_layers="all")
    tapped_blocks = model.layers[-1].blocks if "swin" in name else model.blocks
    assert list(tapped.model.state_dict()) == keys
    assert list(tapped.state_dict()) == [f"model.{key}" for key in keys]
    compiled = sum(type(block.attn) is Attention for block in tapped_blocks)  # their maps have a second hook
    assert len(hooks(model)) == 1 + 2 * len(tapped_blocks) + compiled + 1  # first, last and attention of each, norm
    assert fused(model).count(False) == sum(hasattr(block.attn, "fused_attn") for block in tapped_blocks)
    tapped.close()
    assert hooks(model) == [] and all(fused(model))


# --- training


def step(tapped, objective):
    """The output, the loss and the gradients of one training step."""
    samples, labels = images(4), torch.tensor([0, 3, 1, 4])
    np.random.seed(0)
    samples, target = PatchMixup(grid=tapped.grid)(samples.to(next(tapped.parameters()).dtype), labels)
    torch.manual_seed(0)
    output = tapped(samples)
    loss, terms = objective(output, target)
    loss.backward()
    gradients = {name: p.grad for name, p in tapped.model.named_parameters() if p.grad is not None}
    return output, loss.detach(), terms, gradients


def objective_of(family, levels=LEVELS):
    terms = [term for term in REGULARIZERS.values() if term.level in levels]
    return DiversityObjective(
        {"mixing": 1.0}
        | {term.name: 0.01 for term in terms if family.comparable or "attention_first" not in term.reads}
    )


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_training_step_with_all_terms_of_a_level(name, level):
    family, model = FAMILIES[name], build(name).float()
    objective = objective_of(family, [level])
    tapped = TappedViT(model, objective.reads, objective.patch_logits, weight_groups=family.weight_groups)
    _, loss, terms, gradients = step(tapped, objective)
    model.zero_grad()
    model(images().float()).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} <= gradients.keys()
    assert loss.isfinite() and all(value.isfinite() for value in terms.values())
    assert [name for name, gradient in gradients.items() if not gradient.isfinite().all()] == []
    assert set(objective.coefs) <= terms.keys() and len(objective.coefs) > 4


@pytest.mark.parametrize("name", ["deit", "beit", "eva02", "swin"])
def test_checkpointing_changes_neither_taps_nor_gradients(name):
    results = []
    for checkpointing in (False, True):
        model = build(name)
        model.set_grad_checkpointing(checkpointing)
        objective = objective_of(FAMILIES[name])
        tapped = TappedViT(model, TAPS, patch_logits=True, emb_layers="all", attn_layers="all")
        results.append(step(tapped, objective))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10)
