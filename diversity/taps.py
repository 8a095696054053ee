"""TappedViT: hooks on a stock timm vision transformer that hand out what the diversity terms read."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from timm.layers import Attention
from torch import nn

from .backbones import Backbone, parse_weight_groups

TAPS = ("first", "last", "tokens", "attention", "attention_first", "attention_last", "weights")


class TapOutput(NamedTuple):
    """What one training forward hands out; a field that was not asked for is None.

    "The blocks" are all blocks of a ViT, and those of the last stage of a Swin, whose patches are that stage's grid.

    Attributes:
        logits: [B, C], the class logits.
        dist_logits: [B, C], logits of the distillation head of a distilled model in distilled training.
        patch_logits: [B, P, C], the classification head applied to every patch token.
        token_logits: [B, 1 + P, C], `logits` and `patch_logits` where they are views of one tensor: compiled, of a
            model that classifies its class token and has no other prefix token.
        first: [B, P, D], input of the first block (patch + position embedding), patch tokens only.
        last: [B, P, D], output of the last block before the final norm, patch tokens only; with several `emb_layers`
            [layers, B, P, D], the outputs of those blocks.
        tokens: the output of the last block as the model holds it, prefix tokens included: [B, N, D] or
            [B, rows, columns, D].
        attention: [B, H, N, N], softmax maps of the first block before dropout, prefix tokens included; with several
            `attn_layers` [layers, B, H, N, N], the maps of those blocks. A Swin's windows count as images.
        attention_first, attention_last: [B, H, N, N], the maps of the first and of the last block.
        with_prefix: {"first", "last": [B, N, D]}, both with their `num_prefix_tokens` prefix tokens in front: compiled,
            for terms that skip them; see `Regularizer.skips_prefix`.
        weights: [M, Dout, Din], the matrices of `weight_groups` in all blocks of the model, in the order of the blocks;
            a tuple of such stacks where shapes differ.
    """

    logits: torch.Tensor
    dist_logits: torch.Tensor | None = None
    patch_logits: torch.Tensor | None = None
    first: torch.Tensor | None = None
    last: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    attention: torch.Tensor | None = None
    attention_first: torch.Tensor | None = None
    attention_last: torch.Tensor | None = None
    weights: torch.Tensor | tuple[torch.Tensor, ...] | None = None
    token_logits: torch.Tensor | None = None
    with_prefix: dict[str, torch.Tensor] | None = None
    num_prefix_tokens: int | None = None


class TappedViT(nn.Module):
    """A timm model whose training forward returns a `TapOutput` and whose eval forward returns plain class logits.

    Everything the terms read comes out of this one forward call, so wrap it (not `.model`) in DistributedDataParallel,
    and save `.model.state_dict()`, which has timm's own keys. Attention is un-fused in the tapped blocks only, since
    fused attention never shows its maps. Under torch.compile, plain ViT blocks stay fused, and their maps are computed
    beside it. Usable as a context manager that calls `close()`.

    Args:
        model: a timm model; one with taps or patch logits must be a ViT, DeiT, BEiT, EVA or Swin. Copy the stock model,
            not the wrapper, whose hooks a copy would share.
        reads: names of the taps to hand out, see `TAPS`. Nothing is hooked for the others.
        patch_logits: also apply the head to every patch token.
        emb_layers: the blocks whose outputs are `last`: "first", "last", "all", or indices as "0,5,11" or (0, 5, 11).
        attn_layers: the blocks whose maps are `attention`, likewise.
        weight_groups: the matrices in `weights`, some of qkv, proj, fc1, fc2, as "qkv,proj" or ("qkv", "proj").

    Raises:
        ValueError: an unknown tap name, or layers or groups that cannot be read.
        TapError: the model lacks what a tap needs, or has no such layer.

    Attributes:
        model: the stock model, unchanged.
        grid: (rows, columns) of the patches that have tokens and logits; None where nothing can be tapped.

    Source: the released code's own ViT, which returned these tensors.
    Differs: hooks on timm's model, whose keys and eval output stay its own; other backbones, layers and matrices.
    """

    def __init__(
        self,
        model: nn.Module,
        reads: Collection[str] = (),
        patch_logits: bool = False,
        emb_layers: str | Sequence[int] = "last",
        attn_layers: str | Sequence[int] = "first",
        weight_groups: str | Sequence[str] = "qkv",
    ):
        super().__init__()
        reads = (reads,) if isinstance(reads, str) else reads
        unknown = sorted(set(reads) - set(TAPS))
        if unknown:
            raise ValueError(f"unknown tap {unknown[0]!r}; there are {', '.join(TAPS)}")
        self.model = model
        self.reads = tuple(tap for tap in TAPS if tap in reads)
        self.patch_logits = patch_logits
        self.weight_groups = parse_weight_groups(weight_groups)
        asked = [*self.reads, *(["patch_logits"] if patch_logits else [])]
        self.backbone = Backbone.require(model, asked[0]) if asked else Backbone.of(model)
        self.grid = self.backbone.grid if self.backbone else None
        self._sources = {tap: self._sources_of(tap, emb_layers, attn_layers) for tap in self.reads}
        if patch_logits:
            self.backbone.require_patch_head()
        self._captured: dict[tuple, torch.Tensor] | None = None  # None outside forward: hooks then keep nothing
        self._handles = []
        self._unfused = []
        self._hook()

    def forward(self, samples: torch.Tensor):
        """samples [B, 3, S, S] -> `TapOutput` in training mode, [B, C] in eval mode."""
        if not self.training:
            return self.model(samples)
        self._captured = {}
        compiling = torch.compiler.is_compiling()
        if compiling:
            self._set_fused(True)
        try:
            logits = self.model(samples)
            taken = {tap: self._tap(tap) for tap in self.reads}
            if compiling and self.backbone:
                taken["with_prefix"] = {tap: self._with_prefix(tap) for tap in ("first", "last") if tap in taken}
                taken["num_prefix_tokens"] = self.backbone.num_prefix_tokens
            if self.patch_logits:
                normed = self._take("norm", "final")
                if compiling and not self.backbone.head_drops:
                    # One product for all tokens saves a copy of the patch tokens, and the product for the class token.
                    token_logits = self.backbone.classify(normed)
                    taken["patch_logits"] = self.backbone.patch_tokens(token_logits)
                    if self.backbone.classifies_class_token:
                        logits, taken["token_logits"] = token_logits[:, 0], token_logits
                else:
                    taken["patch_logits"] = self.backbone.classify(self.backbone.patch_tokens(normed))
        finally:
            self._captured = None
            if compiling:
                self._set_fused(False)
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

    def table(self) -> str:
        """The taps in use, one line each: name and what it holds."""
        lines = []
        for tap in self.reads:
            if tap == "weights":
                stacks = self.backbone.weight_stacks(self.weight_groups)
                shapes = ", ".join(f"{len(stack)} of [{stack.shape[1]}, {stack.shape[2]}]" for stack in stacks)
                lines.append(f"{tap:<24}{', '.join(self.weight_groups)} of all blocks: {shapes}")
            else:
                sources = self._sources[tap]
                blocks = ", ".join(str(i) for _, i in sources)
                lines.append(f"{tap:<24}{sources[0][0]} of block{'s' if len(sources) > 1 else ''} {blocks}")
        if self.patch_logits:
            lines.append(f"{'patch logits':<24}{self.grid[0]} x {self.grid[1]} patches")
        heading = f"{'tap':<24}from the {len(self.backbone.blocks)} {self.backbone.blocks_are}" if lines else ""
        return "\n".join([heading, *lines])

    def _sources_of(self, tap: str, emb_layers, attn_layers) -> list[tuple[str, int]]:
        """What the hooks have to keep for a tap, as (what, index of its block).

        Raises:
            TapError: the model lacks it.
        """
        backbone, final = self.backbone, len(self.backbone.blocks) - 1
        match tap:
            case "weights":
                backbone.weight_stacks(self.weight_groups)
                return []
            case "first":
                backbone.require_patches(tap)
                return [("input", 0)]
            case "last":
                backbone.require_patches(tap)
                return [("output", i) for i in backbone.layer_indices(tap, "emb_layers", emb_layers)]
            case "tokens":
                backbone.require_head_on_tokens(tap)
                return [("output", final)]
            case "attention":
                indices = backbone.layer_indices(tap, "attn_layers", attn_layers)
            case _:
                backbone.require_two_comparable_blocks(tap)
                indices = [0 if tap == "attention_first" else final]
        backbone.require_attention(tap, indices)
        return [("maps", i) for i in indices]

    def _tap(self, tap: str):
        """The value of a tap, from what the hooks kept or from the weights."""
        if tap == "weights":
            stacks = self.backbone.weight_stacks(self.weight_groups)
            return stacks[0] if len(stacks) == 1 else stacks
        if tap in ("first", "last"):
            return self._with_prefix(tap)[..., self.backbone.num_prefix_tokens :, :]
        return _stacked([self._take(*source) for source in self._sources[tap]])

    def _with_prefix(self, tap: str) -> torch.Tensor:
        """The tokens of "first" or "last", prefix tokens included: [B, N, D] or [layers, B, N, D]."""
        return _stacked([self._take(*source).flatten(1, -2) for source in self._sources[tap]])

    def _take(self, *source) -> torch.Tensor:
        """What a hook kept."""
        tensor = self._captured.get(source)
        if tensor is None:
            what = f"{source[0]} of block {source[1]}"
            raise RuntimeError(f"the hook for the {what} did not fire: {type(self.model).__name__} bypassed its module")
        return tensor

    def _hook(self):
        """Hook what the taps need, and nothing else."""
        for what, i in sorted({source for sources in self._sources.values() for source in sources}):
            block = self.backbone.blocks[i]
            if what == "input":
                self._keep_input((what, i), block)
            elif what == "output":
                self._keep_output((what, i), block)
            else:
                self._unfuse(block.attn)
                self._keep_input((what, i), block.attn.attn_drop)
                if type(block.attn) is Attention:
                    self._keep_maps((what, i), block.attn)
        if self.patch_logits:
            self._keep_output(("norm", "final"), self.model.norm)

    def _keep_input(self, source: tuple, module: nn.Module):
        def hook(module, inputs):
            if self._captured is not None:
                self._captured[source] = inputs[0]

        self._handles.append(module.register_forward_pre_hook(hook))

    def _keep_output(self, source: tuple, module: nn.Module):
        def hook(module, inputs, output):
            if self._captured is not None:
                self._captured[source] = output

        self._handles.append(module.register_forward_hook(hook))

    def _keep_maps(self, source: tuple, attn: Attention):
        """Compute the maps of a compiled block beside its fused attention, from the same queries and keys.

        They then need not be stored in the precision of softmax, as they would be for unfused attention.
        """

        def hook(module, inputs, output):
            if self._captured is not None and torch.compiler.is_compiling():
                q, k, _ = output.unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
                q, k = attn.q_norm(q), attn.k_norm(k)
                self._captured[source] = (q * attn.scale @ k.mT).softmax(dim=-1)

        self._handles.append(attn.qkv.register_forward_hook(hook))

    def _set_fused(self, fused: bool):
        """Switch fused attention on or off in the tapped blocks that show their maps also with it; see `_keep_maps`."""
        for attn, was_fused in self._unfused:
            if was_fused and type(attn) is Attention:
                attn.fused_attn = fused

    def _unfuse(self, attn: nn.Module):
        if hasattr(attn, "fused_attn"):  # Swin V2 has no fused form
            self._unfused.append((attn, attn.fused_attn))
            attn.fused_attn = False


def _stacked(tensors: list[torch.Tensor]) -> torch.Tensor:
    """A single tensor as it is, several with a leading axis."""
    return tensors[0] if len(tensors) == 1 else torch.stack(tensors)
