"""TappedViT: hooks on a stock timm vision transformer that hand out what the diversity terms read."""

from collections.abc import Collection
from typing import NamedTuple

import torch
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
        model: a timm model. One with taps needs `blocks` with a joint `attn.qkv`, as VisionTransformer has.
        reads: names of the taps to hand out, see `TAPS`. Nothing is hooked for the others.
        patch_logits: also apply the head to every patch token.

    Raises:
        ValueError: an unknown tap name.
        TapError: the model lacks what a tap needs.

    Attributes:
        model: the stock model, unchanged.
    """

    def __init__(self, model: nn.Module, reads: Collection[str] = (), patch_logits: bool = False):
        super().__init__()
        unknown = sorted(set(reads) - set(TAPS))
        if unknown:
            raise ValueError(f"unknown tap {unknown[0]!r}; there are {', '.join(TAPS)}")
        self.model = model
        self.reads = tuple(tap for tap in TAPS if tap in reads)
        self.patch_logits = patch_logits
        self._captured: dict[str, torch.Tensor] = {}
        self._handles = []
        self._unfused = []
        for tap in self.reads:
            self._require_blocks(tap)
        if patch_logits:
            self._require_head()
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
        self._captured.clear()
        logits = self.model(samples)
        taken = {tap: self._take(tap) for tap in self.reads if tap != "weights"}
        if "weights" in self.reads:
            taken["weights"] = torch.cat([block.attn.qkv.weight.unflatten(0, (3, -1)) for block in self.model.blocks])
        if self.patch_logits:
            taken["patch_logits"] = self._classify(self._take("normed"))
        if isinstance(logits, tuple):
            logits, taken["dist_logits"] = logits
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
            if self.training:
                self._captured[name] = inputs[0]

        self._handles.append(module.register_forward_pre_hook(hook))

    def _capture_output(self, name: str, module: nn.Module):
        def hook(module, inputs, output):
            if self.training:
                self._captured[name] = output

        self._handles.append(module.register_forward_hook(hook))

    def _unfuse(self, attn: nn.Module):
        self._unfused.append((attn, attn.fused_attn))
        attn.fused_attn = False

    def _require_blocks(self, tap: str):
        blocks = getattr(self.model, "blocks", None)
        if not isinstance(blocks, nn.Sequential | nn.ModuleList) or not hasattr(self.model, "num_prefix_tokens"):
            raise TapError(tap, self.model, "it has no sequence of transformer blocks")
        attn = getattr(blocks[0], "attn", None)
        if tap == "attention" and not (hasattr(attn, "fused_attn") and hasattr(attn, "attn_drop")):
            raise TapError(tap, self.model, "its first block has no attention with an `attn_drop` to hook")
        if tap == "weights" and not all(hasattr(getattr(block, "attn", None), "qkv") for block in blocks):
            raise TapError(tap, self.model, "its blocks have no joint `attn.qkv` projection")

    def _require_head(self):
        needed = ("norm", "fc_norm", "head_drop", "head", "num_prefix_tokens")
        missing = [name for name in needed if not hasattr(self.model, name)]
        if missing:
            raise TapError("patch_logits", self.model, f"it has no `{missing[0]}` to classify patch tokens with")
