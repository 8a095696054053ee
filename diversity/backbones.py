"""Where the taps find tokens, maps and weights in timm's vision transformers, and errors for models that lack them.

A new family is one more case in `Backbone.of`.
"""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from timm.layers import Attention, AttentionRope
from timm.models import VisionTransformer, beit, eva, swin_transformer, swin_transformer_v2
from torch import nn

WEIGHT_GROUPS = ("qkv", "proj", "fc1", "fc2")

ATTENTIONS = (
    Attention,
    AttentionRope,
    eva.EvaAttention,
    beit.Attention,
    swin_transformer.WindowAttention,
    swin_transformer_v2.WindowAttention,
)
"""The attention modules whose forward pass is known: weights head by head, and one softmax map for each head."""


class TapError(ValueError):
    """The model cannot give a tap that was asked for.

    Attributes:
        tap: the tap's name, or "patch_logits".
        argument: the argument of `TappedViT` that asked for too much, "model" where it can give no tap at all; None
            when the model cannot give the tap with any argument.
    """

    def __init__(self, tap: str, model: nn.Module, missing: str, argument: str | None = None):
        super().__init__(f"{type(model).__name__} cannot give {tap}: {missing}")
        self.tap = tap
        self.argument = argument


@dataclass(frozen=True)
class Backbone:
    """The modules of a timm model that the taps read.

    Attributes:
        model: the model.
        blocks: the blocks whose tokens and attention maps are tapped, in order; they share one grid and one width.
        all_blocks: every block of the model; their weights are tapped.
        stages: indices in `all_blocks` of the first block of each stage.
        blocks_are: words for `blocks`, for messages.
        grid: (rows, columns) of patch tokens in `blocks`.
        num_prefix_tokens: class, distillation and register tokens in front of the patch tokens.
        head: names of the modules that classify a normed token, in order; the last one is linear.
    """

    model: nn.Module
    blocks: Sequence[nn.Module]
    all_blocks: Sequence[nn.Module]
    stages: list[int]
    blocks_are: str
    grid: tuple[int, int]
    num_prefix_tokens: int
    head: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module) -> "Backbone | None":
        """The `Backbone` of a ViT, DeiT, BEiT, EVA or Swin of timm; None for any other model.

        Families that use the same attribute names for something else (CaiT, XCiT, TNT) are not among them.
        """
        if isinstance(model, (VisionTransformer, beit.Beit, eva.Eva)):
            grid, head = tuple(model.patch_embed.grid_size), ("fc_norm", "head_drop", "head")
            return cls(model, model.blocks, model.blocks, [0], "blocks", grid, model.num_prefix_tokens, head)
        if isinstance(model, (swin_transformer.SwinTransformer, swin_transformer_v2.SwinTransformerV2)):
            last_stage = model.layers[-1].blocks
            all_blocks = [block for stage in model.layers for block in stage.blocks]
            stages = [*itertools.accumulate((len(stage.blocks) for stage in model.layers[:-1]), initial=0)]
            grid, head = tuple(last_stage[0].input_resolution), ("head.drop", "head.fc")
            return cls(model, last_stage, all_blocks, stages, "blocks in its last stage", grid, 0, head)
        return None

    @classmethod
    def require(cls, model: nn.Module, tap: str) -> "Backbone":
        """`of`, or `TapError` for a model of another family."""
        backbone = cls.of(model)
        if backbone is None:
            raise TapError(tap, model, "it is not one of timm's ViT, DeiT, BEiT, EVA and Swin models", "model")
        return backbone

    def patch_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, N, D] or [B, rows, columns, D] -> [B, P, D], without prefix tokens."""
        return tokens.flatten(1, -2)[:, self.num_prefix_tokens :]

    def classify(self, tokens: torch.Tensor) -> torch.Tensor:
        """Normed tokens [B, P, D] -> [B, P, C]."""
        for name in self.head:
            tokens = self.model.get_submodule(name)(tokens)
        return tokens

    @property
    def classifies_class_token(self) -> bool:
        """Whether the model's logits are `classify` of its class token, the only prefix token it has."""
        return getattr(self.model, "global_pool", None) == "token" and self.num_prefix_tokens == 1

    @property
    def head_drops(self) -> bool:
        """Whether the head drops features at random, and so draws differently for other tokens."""
        return any(getattr(self.model.get_submodule(name), "p", 0) > 0 for name in self.head)

    def layer_indices(self, tap: str, argument: str, layers: str | Sequence[int]) -> tuple[int, ...]:
        """Indices of the chosen blocks.

        Raises:
            TapError: there is no such block.
        """
        depth = len(self.blocks)
        layers = parse_layers(layers)
        indices = {"first": (0,), "last": (depth - 1,), "all": tuple(range(depth))}.get(layers, layers)
        if max(indices) >= depth:
            blocks = f"{depth} {self.blocks_are}, 0 to {depth - 1}"
            raise TapError(tap, self.model, f"there is no block {max(indices)}; it has {blocks}", argument)
        return indices

    def weight_stacks(self, groups: Sequence[str]) -> tuple[torch.Tensor, ...]:
        """The matrices of some of `WEIGHT_GROUPS` in every block, [M, Dout, Din] for each shape as it appears.

        Raises:
            TapError: a block lacks the linear layers of a group.
        """
        stacks = {}
        for block in self.all_blocks:
            for group in groups:
                matrices = block_matrices(block, group)
                if matrices is None:
                    raise TapError("weights", self.model, f"its blocks have no linear layer {group!r}", "weight_groups")
                for stack in matrices:
                    stacks.setdefault(stack.shape[1:], []).append(stack)
        return tuple(torch.cat(of_one_shape) for of_one_shape in stacks.values())

    def require_patches(self, tap: str):
        """Raise `TapError` if there are no two patches to compare."""
        if math.prod(self.grid) < 2:
            raise TapError(tap, self.model, "it has a single patch, and terms on patch embeddings compare patches")

    def require_maps(self, tap: str, i: int, block: nn.Module):
        """Raise `TapError` if a block shows no attention maps."""
        if not isinstance(getattr(getattr(block, "attn", None), "attn_drop", None), nn.Module):
            raise TapError(tap, self.model, f"block {i} has no attention with an `attn_drop` to hook")

    def require_attention(self, tap: str, indices: Sequence[int]):
        """Raise `TapError` if a block shows no maps, those of a single head, or those of padding."""
        for i in indices:
            self.require_maps(tap, i, self.blocks[i])
            attn = self.blocks[i].attn
            if hasattr(attn, "lambda_init"):
                raise TapError(tap, self.model, "its differential attention has two maps for each head")
            if attn.num_heads < 2:
                raise TapError(tap, self.model, "it has a single head, and terms on attention compare heads")
            if has_padding(self.blocks[i]):
                windows = self.blocks[i].window_size
                missing = (
                    f"its windows of {windows} do not divide the grid of {self.grid}; padding would count as patches"
                )
                raise TapError(tap, self.model, missing)

    def require_two_comparable_blocks(self, tap: str):
        """Raise `TapError` if the maps of the first and the last block cannot be compared."""
        if len(self.blocks) < 2:
            raise TapError(tap, self.model, "it has a single block, and cross-layer terms compare two")
        if getattr(self.blocks[0], "shift_size", None) != getattr(self.blocks[-1], "shift_size", None):
            raise TapError(
                tap,
                self.model,
                "the windows of its first and last block hold different patches; "
                "a window as large as the grid (window_size) makes them one",
            )

    def require_head_on_tokens(self, tap: str):
        """Raise `TapError` if the head reads an attention pool and not the tokens."""
        if getattr(self.model, "attn_pool", None) is not None:
            raise TapError(tap, self.model, "its head reads an attention pool, not tokens")

    def require_patch_head(self):
        """Raise `TapError` if the head cannot classify every patch."""
        classifier = self.model.get_submodule(self.head[-1])
        if not isinstance(classifier, nn.Linear) or classifier.in_features != self.model.num_features:
            raise TapError("patch_logits", self.model, "it has no linear `head` to classify patch tokens with")
        self.require_head_on_tokens("patch_logits")
        if not isinstance(getattr(self.model, "patch_drop", None), nn.Identity | None):
            missing = "patches are dropped (patch_drop_rate), so their labels would not fit"
            raise TapError("patch_logits", self.model, missing)


def has_padding(block: nn.Module) -> bool:
    """Whether a Swin block's windows reach beyond its grid, so that their maps contain padding."""
    sizes = getattr(block, "input_resolution", ()), getattr(block, "window_size", ())
    return any(side % window for side, window in zip(*sizes, strict=True))


def parse_layers(layers: str | Sequence[int]) -> str | tuple[int, ...]:
    """The words first, last and all as they are; "0,5,11" or a sequence of indices as sorted integers, each once.

    Raises:
        ValueError: anything else.
    """
    text = ",".join(map(str, layers)) if isinstance(layers, Sequence) and not isinstance(layers, str) else str(layers)
    if text in ("first", "last", "all"):
        return text
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise ValueError(f"layers are first, last, all or block indices such as 0,5,11; got {text!r}")
    return tuple(sorted({int(index) for index in text.split(",")}))


def parse_weight_groups(groups: str | Sequence[str]) -> tuple[str, ...]:
    """A list such as "qkv,proj", or a sequence of names, in the order of `WEIGHT_GROUPS`.

    Raises:
        ValueError: an unknown group, or none.
    """
    names = groups.split(",") if isinstance(groups, str) else list(groups)
    unknown = [name for name in names if name not in WEIGHT_GROUPS]
    if unknown or not names:
        raise ValueError(f"unknown weight group {''.join(unknown[:1])!r}; there are {', '.join(WEIGHT_GROUPS)}")
    return tuple(group for group in WEIGHT_GROUPS if group in names)


def block_matrices(block: nn.Module, group: str) -> list[torch.Tensor] | None:
    """One group's matrices in a block as stacks [k, Dout, Din]; None where the block has no such linear layer."""
    part = getattr(block, "attn" if group in ("qkv", "proj") else "mlp", None)
    joint = getattr(part, group, None)
    if group == "qkv" and joint is None:
        layers, rows = [getattr(part, name, None) for name in ("q_proj", "k_proj", "v_proj")], 1
    else:
        layers, rows = [joint], 3 if group == "qkv" else 1
    if any(getattr(layer, "weight", None) is None or layer.weight.dim() != 2 for layer in layers):
        return None
    return [layer.weight.unflatten(0, (rows, -1)) for layer in layers]
