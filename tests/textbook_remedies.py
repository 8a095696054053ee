"""The forward passes of timm's ViT, DeiT-III, BEiT, EVA and Swin with remedies, written out in float64.

Dense maps, and loops over images, heads and tokens where a remedy has a formula for one of them. Remedies of maps are
here applied to the map, not to its product with the values.
"""

import itertools

import torch
from unrolled import class_and_relative_bias, embedded, queries_keys_values, relative_bias, rotated, scale, windows

from diversity import REMEDIES


class Textbook:
    """A stock model and the remedies that change its forward pass.

    Args:
        name: its name in `FAMILIES`.
        model: the stock model.
        settings: {remedy: {setting: value}}.
        parameters: {key of the state_dict of `model.remedies`: tensor}.
    """

    def __init__(self, name, model, settings, parameters):
        self.name, self.model, self.parameters = name, model, parameters
        self.settings = {remedy: REMEDIES[remedy].settings | given for remedy, given in settings.items()}
        self.first = None

    def logits(self, samples):
        model, i = self.model, itertools.count()
        if "swin" in self.name:
            x = model.patch_embed(samples)
            for stage in model.layers:
                x = stage.downsample(x)
                for block in stage.blocks:
                    x = self.swin_block(next(i), block, x)
        else:
            x, context = embedded(self.name, model, samples)
            for block in model.blocks:
                x = self.vit_block(next(i), block, x, **context)
        return model.forward_head(model.norm(x))

    def vit_block(self, i, block, x, rope=None, bias=None):
        if getattr(block.attn, "relative_position_bias_table", None) is not None:
            bias = class_and_relative_bias(block.attn.relative_position_bias_table, block.attn.window_size)
        normed = block.norm1(self.before_norm(x, "norm1"))
        x = self.add(x, block.drop_path1(scale(block, 1) * self.attention(i, block.attn, normed, rope, bias)))
        normed = block.norm2(self.before_norm(x, "norm2"))
        return self.add(x, block.drop_path2(scale(block, 2) * block.mlp(normed)))

    def swin_block(self, i, block, x):
        batch, rows, columns, dim = x.shape
        places, allowed = windows(rows, columns, block.window_size, block.shift_size)
        bias = relative_bias(block.attn.relative_position_bias_table, block.window_size)
        bias = bias.masked_fill(~allowed.repeat(batch, 1, 1)[:, None], -torch.inf)
        x = x.reshape(batch, rows * columns, dim)
        normed = block.norm1(self.before_norm(x, "norm1"))
        output = self.attention(i, block.attn, normed[:, places].flatten(0, 1), None, bias)
        update = torch.empty_like(normed)
        update[:, places] = output.unflatten(0, (batch, -1))
        x = self.add(x, block.drop_path1(update))
        x = self.add(x, block.drop_path2(block.mlp(block.norm2(self.before_norm(x, "norm2")))))
        return x.reshape(batch, rows, columns, dim)

    def attention(self, i, attn, x, rope=None, bias=None):
        """[B, N, D] -> [B, N, D]: the output of an attention module."""
        q, k, v = queries_keys_values(attn, x)
        if hasattr(attn, "q_norm"):
            q, k = attn.q_norm(q), attn.k_norm(k)
        if rope is not None:
            q, k = (rotated(heads, rope, attn.num_prefix_tokens, attn.rotate_half) for heads in (q, k))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        softmax = torch.softmax(scores if bias is None else scores + bias, dim=-1)
        self.first = v if i == 0 else self.first
        v = self.values(i, v)
        y = self.heads(i, self.maps(i, softmax) @ v, v)
        merged = y.transpose(1, 2).flatten(2)
        return self.feat_scale(i, attn.proj(attn.norm(merged) if hasattr(attn, "norm") else merged))

    def values(self, i, v):
        if "value_residual" not in self.settings or i == 0:
            return v
        chosen = self.settings["value_residual"]
        weights = chosen["value_residual_first"], chosen["value_residual_own"]
        if chosen["value_residual_learnable"]:
            weights = self.parameters[f"value_residual.weights.{i}"]
        return weights[0] * self.first + weights[1] * v

    def maps(self, i, softmax):
        """The map of all remedies that replace it, in the order of the registry."""
        maps, heads, tokens = softmax, softmax.shape[1], softmax.shape[-1]
        uniform = torch.full((tokens, tokens), 1 / tokens, dtype=softmax.dtype)
        if "reattention" in self.settings:
            maps = self.reattention(i, softmax)
        if "gfsa" in self.settings:
            order = self.settings["gfsa"]["gfsa_order"]
            power = [maps[:, h] + (order - 1) * (softmax[:, h] @ maps[:, h] - maps[:, h]) for h in range(heads)]
            weights = self.parameters[f"gfsa.strength.{i}"]
            maps = torch.stack([maps[:, h] + weights[h] * power[h] for h in range(heads)], dim=1)
        if "attnscale" in self.settings:
            weights = self.parameters[f"attnscale.strength.{i}"]
            scaled = [uniform + (1 + weights[h]) * (maps[:, h] - uniform) for h in range(heads)]
            maps = torch.stack(scaled, dim=1)
        if "centered" in self.settings:
            maps = maps - uniform
        if "laplacian" in self.settings:
            k = self.settings["laplacian"]["laplacian_heads"] or -(-heads // 2)
            identity = torch.eye(tokens, dtype=softmax.dtype)
            maps = torch.stack([identity - maps[:, h] if h < k else maps[:, h] for h in range(heads)], dim=1)
        return maps

    def reattention(self, i, softmax):
        """Batch normalisation in train mode; the statistics of a head are over images and both axes of the map."""
        heads, parameters = softmax.shape[1], self.parameters
        theta = parameters[f"reattention.mixing.{i}"].reshape(heads, heads)
        result = []
        for g in range(heads):
            mixed = sum(theta[g, h] * softmax[:, h] for h in range(heads))
            mean = mixed.mean()
            normal = (mixed - mean) / ((mixed - mean) ** 2).mean().add(1e-5).sqrt()
            key = f"reattention.norms.{i}"
            result.append(parameters[f"{key}.weight"][g] * normal + parameters[f"{key}.bias"][g])
        return torch.stack(result, dim=1)

    def heads(self, i, y, v):
        if "neutreno" in self.settings and i > 0:
            y = y + self.settings["neutreno"]["neutreno_strength"] * (self.first - v)
        if "xsa" in self.settings:
            y = stacked_pairs(lambda *images: stacked_pairs(exclusive, *images), y, v)
        return y

    def feat_scale(self, i, output):
        if "featscale" not in self.settings:
            return output
        times = 2 if self.settings["featscale"]["featscale_twice"] else 1
        a, b = (times * self.parameters[f"featscale.{part}.{i}"] for part in ("mean", "rest"))
        uniform = torch.full((output.shape[1],) * 2, 1 / output.shape[1], dtype=output.dtype)
        return torch.stack([(1 + a) * (uniform @ o) + (1 + b) * (o - uniform @ o) for o in output])

    def before_norm(self, x, norm):
        """ContraNorm of tokens [B, N, D]."""
        chosen = self.settings.get("contranorm")
        if chosen is None or chosen["contranorm_where"] not in (norm, "both"):
            return x
        return torch.stack([contra_norm(tokens, chosen) for tokens in x])

    def add(self, x, update):
        """The sum of the residual and a branch."""
        if "ortho_residual" not in self.settings:
            return x + update
        shape = x.shape
        if self.settings["ortho_residual"]["ortho_flattened"]:
            x, update = (tensor.reshape(shape[0], 1, -1) for tensor in (x, update))
        else:
            x, update = (tensor.reshape(shape[0], -1, shape[-1]) for tensor in (x, update))
        return stacked_pairs(lambda *images: stacked_pairs(orthogonal_sum, *images), x, update).reshape(shape)


def stacked_pairs(function, *tensors):
    """A function of the pairs along the first axis, stacked."""
    return torch.stack([function(*pair) for pair in zip(*tensors, strict=True)])


def orthogonal_sum(x, f):
    """Vectors x and f [D]: x and the part of f that is orthogonal to it."""
    return x + f - (x @ f) / (x @ x + 1e-6) * x


def exclusive(y, v):
    """The outputs of a head [N, head_dim] without the part along the token's own value."""
    return stacked_pairs(lambda row, own: row - (row @ own) / (own @ own) * own, y, v)


def contra_norm(tokens, chosen):
    """Tokens [N, D] of an image."""
    lengths = (tokens**2).sum(dim=1).sqrt()
    weights = (tokens @ tokens.T / torch.outer(lengths, lengths) / chosen["contranorm_temperature"]).exp()
    weights = weights / weights.sum(dim=1, keepdim=True)
    return tokens - chosen["contranorm_scale"] * weights @ tokens
