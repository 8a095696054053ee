"""How torch and a timm model compute: with less memory, fewer bytes or other kernels, and the same parameters."""

import os

import torch
from timm.layers import set_fused_attn
from torch import nn


def set_backends(fused_attn: bool, tf32: bool, deterministic: bool = False):
    """Configure how torch and timm compute.

    Args:
        fused_attn: whether timm uses scaled-dot-product attention.
        tf32: whether a GPU multiplies float32 matrices with 10 bits of mantissa.
        deterministic: whether a GPU repeats a run bit for bit, more slowly; an operation without a deterministic form
            raises. To be set before CUDA is used.
    """
    torch.backends.cudnn.benchmark = not deterministic
    set_fused_attn(fused_attn)
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def enable_grad_checkpointing(model: nn.Module):
    """Recompute the activations of the blocks in the backward pass.

    Raises:
        ValueError: the model does not support it.
    """
    try:
        model.set_grad_checkpointing()
    except (AttributeError, AssertionError):
        raise ValueError(f"{type(model).__name__} does not support gradient checkpointing") from None


class PatchProduct(nn.Conv2d):
    """A convolution of patches that do not overlap, [B, C, H, W] -> [B, D, rows, columns], as one matrix product."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        height, width = self.kernel_size
        if torch.is_autocast_enabled(images.device.type):  # before the patches are copied, not after
            images = images.to(torch.get_autocast_dtype(images.device.type))
        patches = images.unflatten(3, (-1, width)).unflatten(2, (-1, height))  # [B, C, rows, height, columns, width]
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)
        return nn.functional.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def embed_patches_by_product(model: nn.Module):
    """Compute the patch embedding as a `PatchProduct`; its parameters and their names stay.

    Raises:
        ValueError: the model has no convolution of patches that do not overlap.
    """
    proj = getattr(getattr(model, "patch_embed", None), "proj", None)
    is_plain = type(proj) is nn.Conv2d and (proj.padding, proj.dilation, proj.groups) == ((0, 0), (1, 1), 1)
    if not is_plain or proj.kernel_size != proj.stride:
        raise ValueError(f"{type(model).__name__} has no convolution of patches that do not overlap")
    proj.__class__ = PatchProduct


def keep_residual_in_bfloat16(model: nn.Module):
    """Pass tokens from block to block in bfloat16 instead of float32 where autocast computes in bfloat16.

    Raises:
        ValueError: the model has no list of blocks.
    """
    if not hasattr(model, "blocks"):
        raise ValueError(f"{type(model).__name__} has no list of blocks")
    for block in model.blocks:  # LayerScale's float32 weights would make them float32 again
        block.register_forward_pre_hook(_to_bfloat16)


def _to_bfloat16(block: nn.Module, inputs: tuple):
    device_type = inputs[0].device.type
    if torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type) == torch.bfloat16:
        return inputs[0].bfloat16(), *inputs[1:]
    return None
