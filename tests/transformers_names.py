"""DINOv2 with the names of transformers' Dinov2Model: made weights, and the model written by hand from these names."""

import torch
from torch.nn import functional as F


def made_dinov2(depth=2, width=24, grid=5, patch=14, gated=False) -> dict[str, torch.Tensor]:
    """Random weights of a small model, with a mask token as in the published files."""
    torch.manual_seed(11)
    linear = {f"attention.attention.{name}": (width, width) for name in ("query", "key", "value")}
    linear |= {"attention.output.dense": (width, width)}
    if gated:
        linear |= {"mlp.weights_in": (2 * 40, width), "mlp.weights_out": (width, 40)}
    else:
        linear |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    shapes = {"embeddings.cls_token": (1, 1, width), "embeddings.mask_token": (1, width)}
    shapes |= {"embeddings.position_embeddings": (1, 1 + grid**2, width)}
    shapes |= {"embeddings.patch_embeddings.projection.weight": (width, 3, patch, patch)}
    shapes |= {"embeddings.patch_embeddings.projection.bias": (width,)}
    for i in range(depth):
        for name, shape in linear.items():
            shapes |= {f"encoder.layer.{i}.{name}.weight": shape, f"encoder.layer.{i}.{name}.bias": shape[:1]}
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            shapes[f"encoder.layer.{i}.{name}"] = (width,)
        shapes |= {f"encoder.layer.{i}.layer_scale{k}.lambda1": (width,) for k in (1, 2)}
    shapes |= {"layernorm.weight": (width,), "layernorm.bias": (width,)}
    return {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}


def dinov2_by_hand(weights: dict[str, torch.Tensor], images: torch.Tensor, heads: int) -> torch.Tensor:
    """All tokens [B, 1 + P, D] after the last norm, in float64; positions are resampled as timm does."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    projection = w["embeddings.patch_embeddings.projection.weight"]
    bias = w["embeddings.patch_embeddings.projection.bias"]
    patches = F.conv2d(images.double(), projection, bias, stride=projection.shape[-1])
    positions = w["embeddings.position_embeddings"]
    side = round((positions.shape[1] - 1) ** 0.5)
    of_patches = positions[:, 1:].transpose(1, 2).unflatten(2, (side, side))
    if of_patches.shape[2:] != patches.shape[2:]:
        of_patches = F.interpolate(of_patches, size=patches.shape[2:], mode="bicubic", antialias=True)
    patches = (patches + of_patches).flatten(2).transpose(1, 2)
    first = (w["embeddings.cls_token"] + positions[:, :1]).expand(len(images), -1, -1)
    x = torch.cat([first, patches], dim=1)
    depth = len({name.split(".")[2] for name in w if name.startswith("encoder.layer.")})
    for i in range(depth):
        x = _block(x, {name.removeprefix(f"encoder.layer.{i}."): tensor for name, tensor in w.items()}, heads)
    return _norm(x, w, "layernorm")


def _block(x: torch.Tensor, w: dict[str, torch.Tensor], heads: int) -> torch.Tensor:
    y, outputs = _norm(x, w, "norm1"), []
    q, k, v = (_linear(y, w, f"attention.attention.{name}") for name in ("query", "key", "value"))
    size = x.shape[-1] // heads
    for h in range(heads):
        of_head = slice(h * size, (h + 1) * size)
        attention = (q[..., of_head] @ k[..., of_head].mT / size**0.5).softmax(dim=-1)
        outputs.append(attention @ v[..., of_head])
    x = x + w["layer_scale1.lambda1"] * _linear(torch.cat(outputs, dim=-1), w, "attention.output.dense")
    y = _norm(x, w, "norm2")
    if "mlp.fc1.weight" in w:
        y = _linear(F.gelu(_linear(y, w, "mlp.fc1")), w, "mlp.fc2")
    else:
        gate, value = _linear(y, w, "mlp.weights_in").chunk(2, dim=-1)
        y = _linear(F.silu(gate) * value, w, "mlp.weights_out")
    return x + w["layer_scale2.lambda1"] * y


def _linear(x: torch.Tensor, w: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    return x @ w[f"{name}.weight"].mT + w[f"{name}.bias"]


def _norm(x: torch.Tensor, w: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)
