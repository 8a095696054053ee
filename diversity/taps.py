"""TappedViT: hooks on a stock timm vision transformer that hand out what the diversity terms read."""

from collections.abc import Collection
from typing import NamedTuple

import torch
from timm.layers import PatchDropout
from timm.models import VisionTransformer
from torch import nn

TAPS = ("first", "last", "attention", "weights")


class TapOutput(NamedTuple):
    """What one training forward hands out; a field that was not asked for is None.

    Attributes:
        logits: [B, C], the class logits.
        dist_logits: [B, C], logits of the distillation head of a distilled model in distilled training.
        patch_logits: [B, P, C], the classification head applied to every patch token.
        first: [B, P, D], input of the first block (patch + position embedding), patch tokens only.
        last: [B, P, D], output of the last block before the final norm, patch tokens only.
        attention: [B, H, N, N], softmax maps of the first block before dropout, prefix tokens included.
        weights: [3L, D, D], the q, k and v projections of every block, in the order of the blocks.
    """

    logits: torch.Tensor
    dist_logits: torch.Tensor | None = None
    patch_logits: torch.Tensor | None = None
    first: torch.Tensor | None = None
    last: torch.Tensor | None = None
    attention: torch.Tensor | None = None
    weights: torch.Tensor | None = None


class TapError(ValueError):
    """The model cannot give a tap that was asked for.

    Attributes:
        tap: the tap's name, or "patch_logits".
    """

    def __init__(self, tap: str, model: nn.Module, missing: str):
        super().__init__(f"{type(model).__name__} cannot give {tap}: {missing}")
        self.tap = tap


class TappedViT(nn.Module):
    """A timm model whose training forward returns a `TapOutput` and whose eval forward returns plain class logits.

    Everything the terms read comes out of this one forward call, so wrap it (not `.model`) in DistributedDataParallel,
    and save `.model.state_dict()`, which has timm's own keys. Attention is un-fused in the one tapped block only, since
    fused attention never shows its maps. Usable as a context manager that calls `close()`.

    Args:
        model: a timm model; one with taps or patch logits must be a VisionTransformer. Copy the stock model, not the
            wrapper, whose hooks a copy would share.
        reads: names of the taps to hand out, see `TAPS`. Nothing is hooked for the others.
        patch_logits: also apply the head to every patch token.

    Raises:
        ValueError: an unknown tap name.
        TapError: the model lacks what a tap needs.

    Attributes:
        model: the stock model, unchanged.

    Source: the released code's own ViT, which returned these tensors.
    Differs: hooks on timm's model, whose keys and eval output stay its own.
    """

    def __init__(self, model: nn.Module, reads: Collection[str] = (), patch_logits: bool = False):
        super().__init__()
        reads = (reads,) if isinstance(reads, str) else reads
        unknown = sorted(set(reads) - set(TAPS))
        if unknown:
            raise ValueError(f"unknown tap {unknown[0]!r}; there are {', '.join(TAPS)}")
        self.model = model
        self.reads = tuple(tap for tap in TAPS if tap in reads)
        self.patch_logits = patch_logits
        self._captured: dict[str, torch.Tensor] | None = None  # None outside forward: hooks then keep nothing
        self._handles = []
        self._unfused = []
        self._require_support()
        if "first" in self.reads:
            self._capture_input("first", model.blocks[0])
        if "last" in self.reads:
            self._capture_output("last", model.blocks[-1])
        if "attention" in self.reads:
            self._unfuse(model.blocks[0].attn)
            self._capture_input("attention", model.blocks[0].attn.attn_drop)
        if patch_logits:
            self._capture_output("normed", model.norm)

    def forward(self, samples: torch.Tensor):
        """samples [B, 3, S, S] -> `TapOutput` in training mode, [B, C] in eval mode."""
        if not self.training:
            return self.model(samples)
        self._captured = {}
        logits = self.model(samples)
        taken = {tap: self._take(tap) for tap in self.reads if tap != "weights"}
        if "weights" in self.reads:
            taken["weights"] = torch.cat([block.attn.qkv.weight.unflatten(0, (3, -1)) for block in self.model.blocks])
        if self.patch_logits:
            taken["patch_logits"] = self._classify(self._take("normed"))
        if isinstance(logits, tuple):
            logits, taken["dist_logits"] = logits
        self._captured = None
        return TapOutput(logits, **taken)

    def close(self):
        """Remove the hooks and restore fused attention; from then on the wrapper hands out logits only."""
        for handle in self._handles:
            handle.remove()
        for attn, fused in self._unfused:
            attn.fused_attn = fused
        self._handles, self._unfused = [], []
        self.reads, self.patch_logits = (), False

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def _take(self, name: str) -> torch.Tensor:
        """A captured tensor, without prefix tokens unless it is an attention map."""
        tensor = self._captured.pop(name, None)
        if tensor is None:
            raise RuntimeError(
                f"the hook of {name!r} did not fire: {type(self.model).__name__} bypassed the hooked module"
            )
        return tensor if name == "attention" else tensor[:, self.model.num_prefix_tokens :]

    def _classify(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model.head(self.model.head_drop(self.model.fc_norm(tokens)))

    def _capture_input(self, name: str, module: nn.Module):
        def hook(module, inputs):
            if self._captured is not None:
                self._captured[name] = inputs[0]

        self._handles.append(module.register_forward_pre_hook(hook))

    def _capture_output(self, name: str, module: nn.Module):
        def hook(module, inputs, output):
            if self._captured is not None:
                self._captured[name] = output

        self._handles.append(module.register_forward_hook(hook))

    def _unfuse(self, attn: nn.Module):
        self._unfused.append((attn, attn.fused_attn))
        attn.fused_attn = False

    def _require_support(self):
        """Raise `TapError` for the first thing asked for that the model does not have."""
        asked = [*self.reads, *(["patch_logits"] if self.patch_logits else [])]
        if asked and not isinstance(self.model, VisionTransformer):
            raise TapError(asked[0], self.model, "it is not a VisionTransformer with a sequence of transformer blocks")
        for tap in asked:
            if tap in ("first", "last") and self.model.patch_embed.num_patches < 2:
                raise TapError(tap, self.model, "it has a single patch, and terms on patch embeddings compare patches")
            attn = getattr(self.model.blocks[0], "attn", None)
            if tap == "attention" and not (hasattr(attn, "fused_attn") and hasattr(attn, "attn_drop")):
                raise TapError(tap, self.model, "its first block has no attention with an `attn_drop` to hook")
            if tap == "weights" and any(_qkv(block) is None for block in self.model.blocks):
                raise TapError(tap, self.model, "its blocks have no joint `attn.qkv` projection")
            if tap == "patch_logits" and not isinstance(self.model.head, nn.Linear):
                raise TapError(tap, self.model, "it has no linear `head` to classify patch tokens with")
            if tap == "patch_logits" and isinstance(self.model.patch_drop, PatchDropout):
                raise TapError(tap, self.model, "patches are dropped (patch_drop_rate), so their labels would not fit")


def _qkv(block: nn.Module) -> nn.Module | None:
    return getattr(getattr(block, "attn", None), "qkv", None)
