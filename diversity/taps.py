"""The registry of taps: the tensors that a `TappedViT` can return beside the logits, one entry each.

A tap is one decorated function that checks a model and returns what hooks have to keep. "The blocks" are all blocks of
a ViT, and those of the last stage of a Swin, whose patches are that stage's grid.
"""

import inspect
from collections import namedtuple
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .backbones import Backbone
from .circuits import circuit_stacks, require_circuits

Source = tuple[str, int]
"""A tensor that a hook keeps: "input", "output" or "maps", and the index of its block."""


@dataclass(frozen=True)
class TapSettings:
    """The layers and matrices that the taps cover; see `TappedViT`."""

    emb_layers: str | Sequence[int]
    attn_layers: str | Sequence[int]
    weight_groups: Sequence[str]


@dataclass(frozen=True)
class Tap:
    """A tensor of the forward pass, or of the weights.

    Attributes:
        name: the argument name of the terms that read it, and its field of `TapOutput`.
        shape: its shape in words.
        doc: what it is.
        patches_only: whether prefix tokens are dropped from what the hooks keep.
        sources: (backbone, settings) -> what the hooks have to keep, one entry for each layer; raises `TapError` where
            the model lacks it.
        from_weights: None, or (backbone, settings) -> the value of a tap that needs no hook.
        covers: settings -> the matrices of a tap that needs no hook, in words.
    """

    name: str
    shape: str
    doc: str
    patches_only: bool
    sources: Callable[[Backbone, TapSettings], list[Source]]
    from_weights: Callable[[Backbone, TapSettings], torch.Tensor | tuple[torch.Tensor, ...]] | None
    covers: Callable[[TapSettings], str] | None


TAPS: dict[str, Tap] = {}


def tap(shape: str, patches_only: bool = False, from_weights: Callable | None = None, covers: Callable | None = None):
    """Enter the decorated function into `TAPS` as the `sources` of a tap of its name; see `Tap`."""

    def enter(sources: Callable[[Backbone, TapSettings], list[Source]]) -> Tap:
        name = sources.__name__
        TAPS[name] = Tap(name, shape, inspect.getdoc(sources), patches_only, sources, from_weights, covers)
        return TAPS[name]

    return enter


@tap("[B, P, D]", patches_only=True)
def first(backbone: Backbone, settings: TapSettings) -> list[Source]:
    """Input of the first block (patch + position embedding, after dropout), patch tokens only."""
    backbone.require_patches("first")
    return [("input", 0)]


@tap("[B, P, D]; [layers, B, P, D] with several emb_layers", patches_only=True)
def last(backbone: Backbone, settings: TapSettings) -> list[Source]:
    """Output of the last block before the final norm, patch tokens only; with `emb_layers`, of those blocks."""
    backbone.require_patches("last")
    return [("output", i) for i in backbone.layer_indices("last", "emb_layers", settings.emb_layers)]


@tap("[B, N, D], or [B, rows, columns, D] where the model keeps a grid")
def tokens(backbone: Backbone, settings: TapSettings) -> list[Source]:
    """Output of the last block before the final norm, prefix tokens included."""
    backbone.require_head_on_tokens("tokens")
    return [("output", len(backbone.blocks) - 1)]


@tap("[B, H, N, N]; [layers, B, H, N, N] with several attn_layers")
def attention(backbone: Backbone, settings: TapSettings) -> list[Source]:
    """Softmax maps of the first block before dropout, prefix tokens included; with `attn_layers`, of those blocks.

    A Swin's windows count as images.
    """
    return _maps(backbone, "attention", backbone.layer_indices("attention", "attn_layers", settings.attn_layers))


@tap("[B, H, N, N]")
def attention_first(backbone: Backbone, settings: TapSettings) -> list[Source]:
    """Softmax maps of the first block, as `attention`, to be compared with those of the last."""
    backbone.require_two_comparable_blocks("attention_first")
    return _maps(backbone, "attention_first", [0])


@tap("[B, H, N, N]")
def attention_last(backbone: Backbone, settings: TapSettings) -> list[Source]:
    """Softmax maps of the last block, as `attention`, to be compared with those of the first."""
    backbone.require_two_comparable_blocks("attention_last")
    return _maps(backbone, "attention_last", [len(backbone.blocks) - 1])


def _weight_stacks(backbone: Backbone, settings: TapSettings) -> torch.Tensor | tuple[torch.Tensor, ...]:
    return _one_or_all(backbone.weight_stacks(settings.weight_groups))


@tap(
    "[M, Dout, Din]; a tuple of such stacks where shapes differ",
    from_weights=_weight_stacks,
    covers=lambda settings: ", ".join(settings.weight_groups),
)
def weights(backbone: Backbone, settings: TapSettings) -> list[Source]:
    """The matrices of `weight_groups` in all blocks of the model, in the order of the blocks."""
    backbone.weight_stacks(settings.weight_groups)
    return []


def _circuit_stacks(backbone: Backbone, settings: TapSettings) -> torch.Tensor | tuple[torch.Tensor, ...]:
    return _one_or_all(circuit_stacks(backbone))


@tap(
    "[M, H, 2, hd, D]; a tuple of such stacks where shapes differ",
    from_weights=_circuit_stacks,
    covers=lambda settings: "QK and OV circuits",
)
def circuits(backbone: Backbone, settings: TapSettings) -> list[Source]:
    """The two factors of the circuits W_Q^T W_K and W_O W_V of all heads in all blocks, in the order of the blocks."""
    require_circuits(backbone)
    return []


def _one_or_all(stacks: tuple[torch.Tensor, ...]) -> torch.Tensor | tuple[torch.Tensor, ...]:
    return stacks[0] if len(stacks) == 1 else stacks


def _maps(backbone: Backbone, name: str, indices: Sequence[int]) -> list[Source]:
    backbone.require_attention(name, indices)
    return [("maps", i) for i in indices]


_fields = ["logits", "dist_logits", "patch_logits", *TAPS, "token_logits", "with_prefix", "num_prefix_tokens"]
TapOutput = namedtuple("TapOutput", _fields, defaults=[None] * (len(_fields) - 1))


NO_LOGITS = (
    "a TappedViT in train mode returns a TapOutput; its class logits are the attribute `logits`, and after `.eval()` "
    "the model returns them alone"
)


def _no_attribute(self, name: str):
    raise AttributeError(f"no attribute {name!r}: {NO_LOGITS}")


def _no_tensor(cls, function, types, args=(), kwargs=None):
    raise TypeError(f"{function.__name__} needs a tensor: {NO_LOGITS}")


TapOutput.__getattr__ = _no_attribute
TapOutput.__torch_function__ = classmethod(_no_tensor)
TapOutput.__doc__ = """What a `TappedViT` returns in train mode; a field that was not asked for is None.

Beside the attributes below it has one for every entry of `TAPS`.

Attributes:
    logits: [B, C], the class logits.
    dist_logits: [B, C], logits of the distillation head of a distilled model in distilled training.
    patch_logits: [B, P, C], the classification head applied to every patch token.
    token_logits: [B, 1 + P, C], `logits` and `patch_logits` where they are views of one tensor: under torch.compile, of
        a model that classifies its class token and has no other prefix token.
    with_prefix: {"first", "last": [B, N, D]}, both with their `num_prefix_tokens` prefix tokens in front: under
        torch.compile, for terms that skip them; see `Regularizer.skips_prefix`.
"""
