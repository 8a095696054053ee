"""Where the taps find tokens, maps and weights in vision transformers, and errors for models that lack them.

A new family of timm is one more case in `Backbone.of`, one of transformers an entry in transformers_models.py.
"""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from timm.models import VisionTransformer, beit, eva, swin_transformer, swin_transformer_v2
from torch import nn

from .block_parts import attention_of, block_matrices, has_padding, shows_maps
from .transformers_models import NAMES, backbone_fields, is_from_transformers, reason_against

WEIGHT_GROUPS = ("qkv", "proj", "fc1", "fc2")


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
    """The modules of a model of timm or transformers that the taps read.

    Attributes:
        model: the model.
        blocks: the blocks whose tokens and attention maps are tapped, in order; they share one grid and one width.
        all_blocks: every block of the model; their weights are tapped.
        stages: indices in `all_blocks` of the first block of each stage.
        blocks_are: words for `blocks`, for messages.
        grid: (rows, columns) of patch tokens in `blocks`, for images of the size that the model was built for.
        num_prefix_tokens: class, distillation and register tokens in front of the patch tokens.
        head: names of the modules that classify a normed token, in order; the last one is linear.
        norm: name of the final norm.
        num_features: width of a normed token.
        num_classes: number of the model's classes, 0 without a classifier.
        patch_size: (height, width) of a patch of a model that takes images of any size; None for models of one size.
    """

    model: nn.Module
    blocks: Sequence[nn.Module]
    all_blocks: Sequence[nn.Module]
    stages: list[int]
    blocks_are: str
    grid: tuple[int, int]
    num_prefix_tokens: int
    head: tuple[str, ...]
    norm: str
    num_features: int
    num_classes: int
    patch_size: tuple[int, int] | None = None

    @classmethod
    def of(cls, model: nn.Module) -> "Backbone | None":
        """The `Backbone` of timm's ViT, DeiT, BEiT, EVA and Swin or transformers' ViT, DeiT, DINOv2 and BEiT; or None.

        Families that use the same attribute names for something else (CaiT, XCiT, TNT) are not among them.
        """
        if fields := backbone_fields(model):
            return cls(model, stages=[0], blocks_are="blocks", **fields)
        if isinstance(model, (VisionTransformer, beit.Beit, eva.Eva)):
            blocks, stages, blocks_are, all_blocks = model.blocks, [0], "blocks", model.blocks
            grid, prefix, head = model.patch_embed.grid_size, model.num_prefix_tokens, ("fc_norm", "head_drop", "head")
        elif isinstance(model, (swin_transformer.SwinTransformer, swin_transformer_v2.SwinTransformerV2)):
            blocks, blocks_are = model.layers[-1].blocks, "blocks in its last stage"
            all_blocks = [block for stage in model.layers for block in stage.blocks]
            stages = [*itertools.accumulate((len(stage.blocks) for stage in model.layers[:-1]), initial=0)]
            grid, prefix, head = blocks[0].input_resolution, 0, ("head.drop", "head.fc")
        else:
            return None
        sizes = {"num_features": model.num_features, "num_classes": model.num_classes}
        return cls(model, blocks, all_blocks, stages, blocks_are, tuple(grid), prefix, head, "norm", **sizes)

    @classmethod
    def require(cls, model: nn.Module, tap: str) -> "Backbone":
        """`of`, or `TapError` for a model of another family."""
        backbone = cls.of(model)
        if backbone is None:
            missing = f"it is not one of timm's ViT, DeiT, BEiT, EVA and Swin models, or transformers' {NAMES} models"
            raise TapError(tap, model, reason_against(model) if is_from_transformers(model) else missing, "model")
        return backbone

    @property
    def is_timm(self) -> bool:
        """Whether the model is one of timm."""
        return not is_from_transformers(self.model)

    def grid_of(self, images: torch.Tensor) -> tuple[int, int]:
        """(rows, columns) of the patches of images [B, 3, H, W]."""
        if self.patch_size is None:
            return self.grid
        return tuple(side // patch for side, patch in zip(images.shape[-2:], self.patch_size, strict=True))

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
        if not shows_maps(attention_of(block)):
            raise TapError(tap, self.model, f"block {i} has no attention with an `attn_drop` to hook")

    def require_attention(self, tap: str, indices: Sequence[int]):
        """Raise `TapError` if a block shows no maps, those of a single head, or those of padding."""
        for i in indices:
            self.require_maps(tap, i, self.blocks[i])
            attn = attention_of(self.blocks[i])
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
        classifier = self.model.get_submodule(self.head[-1]) if self.head else None
        if not isinstance(classifier, nn.Linear):
            raise TapError("patch_logits", self.model, "it has no linear `head` to classify patch tokens with")
        if classifier.in_features != self.num_features:
            features = f"reads {classifier.in_features} features, and a patch token has {self.num_features}"
            raise TapError("patch_logits", self.model, f"its linear `{self.head[-1]}` {features}")
        self.require_head_on_tokens("patch_logits")
        if not isinstance(getattr(self.model, "patch_drop", None), nn.Identity | None):
            missing = "patches are dropped (patch_drop_rate), so their labels would not fit"
            raise TapError("patch_logits", self.model, missing)


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
