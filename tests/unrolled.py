"""The forward pass of every family of backbones, unrolled: its taps and logits, written out from the weights."""

import math

import torch
from families import FAMILIES
from torch.nn import functional as F


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
        "circuits": circuit_stacks(all_blocks),
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
    parts = vit_parts(block, x, rope, bias)
    return parts["output"], parts["maps"]


def vit_parts(block, x, rope=None, bias=None):
    """What a ViT, BEiT or EVA block computes: its maps, the input of the projection and of the MLP, and its output."""
    attn = block.attn
    q, k, v = queries_keys_values(attn, block.norm1(x))
    if rope is not None:
        q, k = (rotated(heads, rope, attn.num_prefix_tokens, attn.rotate_half) for heads in (q, k))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if getattr(attn, "relative_position_bias_table", None) is not None:
        bias = class_and_relative_bias(attn.relative_position_bias_table, attn.window_size)
    maps = torch.softmax(scores if bias is None else scores + bias, dim=-1)
    merged = (maps @ v).transpose(1, 2).flatten(2)
    merged = attn.norm(merged) if hasattr(attn, "norm") else merged
    x = x + scale(block, 1) * attn.proj(merged)
    to_mlp = block.norm2(x)
    return {"maps": maps, "heads": merged, "to_mlp": to_mlp, "output": x + scale(block, 2) * block.mlp(to_mlp)}


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
    parts = swin_parts(block, x)
    return parts["output"], parts["maps"]


def swin_parts(block, x):
    """What a Swin block computes, as `vit_parts`."""
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
    merged = (maps @ v).transpose(1, 2).flatten(2)
    branch = torch.empty_like(tokens)
    branch[:, places] = attn.proj(merged).unflatten(0, (batch, -1))
    branch = branch.reshape(x.shape)
    x = x + (block.norm1(branch) if second else branch)
    to_mlp = x if second else block.norm2(x)
    output = x + (block.norm2(block.mlp(x)) if second else block.mlp(to_mlp))
    return {"maps": maps, "heads": merged, "to_mlp": to_mlp, "output": output}


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
    return by_shape(matrices)


def circuit_stacks(blocks):
    """[2, hd, D] of every head: queries and keys of the block's heads, then columns of the projection and values."""
    circuits = []
    for block in blocks:
        q, k, v = qkv_weights(block.attn)
        for left, right in ((q, k), (block.attn.proj.weight.T, v)):
            heads = zip(left.chunk(block.attn.num_heads), right.chunk(block.attn.num_heads), strict=True)
            circuits.append(torch.stack([torch.stack(pair) for pair in heads]))
    return by_shape(circuits)


def by_shape(matrices):
    """One stack of the matrices, or one for each shape."""
    shapes = list(dict.fromkeys(matrix.shape for matrix in matrices))
    stacks = tuple(torch.stack([matrix for matrix in matrices if matrix.shape == shape]) for shape in shapes)
    return stacks[0] if len(stacks) == 1 else stacks
