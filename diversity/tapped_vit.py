"""TappedViT: hooks on a stock vision transformer that return what the diversity terms read."""

import copy
from collections.abc import Callable, Collection, Sequence

import torch
from timm.layers import Attention
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from .backbones import Backbone, TapError, parse_weight_groups
from .block_parts import TransformersAttention, attention_of, trains_maps
from .hooks import ModelHooks
from .taps import TAPS, Source, TapOutput, TapSettings
from .transformers_models import class_logits

FINAL_NORM = ("output", "final norm")


class TappedViT(nn.Module):
    """A model of timm or transformers that returns a `TapOutput` in train mode and class logits in eval mode.

    Everything the terms read comes out of this one forward call, so wrap it (not `.model`) in DistributedDataParallel,
    and save `.model.state_dict()`, which has the model's own keys. timm's attention is un-fused in the tapped blocks
    only, since fused attention never forms its maps. Under torch.compile, plain ViT blocks stay fused, and their maps
    are computed beside it, as are those of transformers always. Usable as a context manager that calls `close()`.

    Args:
        model: a timm model, or one of transformers for image classification; one with taps or patch logits must be a
            ViT, DeiT, BEiT, EVA or Swin of timm or a ViT, DeiT, DINOv2 or BEiT of transformers.
        reads: names of the taps to return, see `TAPS`. Nothing is hooked for the others.
        patch_logits: also apply the head to every patch token.
        emb_layers: the blocks whose outputs are `last`: "first", "last", "all", or indices as "0,5,11" or (0, 5, 11).
        attn_layers: the blocks whose maps are `attention`, in the same form.
        weight_groups: the matrices in `weights`, some of qkv, proj, fc1, fc2, as "qkv,proj" or ("qkv", "proj").

    Raises:
        ValueError: an unknown tap name, or layers or groups that cannot be read.
        TypeError: a model that DistributedDataParallel, DataParallel or torch.compile wraps.
        TapError: the model lacks what a tap needs, or has no such layer.

    Attributes:
        model: the stock model, unchanged.
        grid: (rows, columns) of the patches that have tokens and logits; None where nothing can be tapped.
        distilled_training: whether the logits of both heads of a distilled model of transformers are returned.

    Source: the released code's own ViT, which returned these tensors.
    Differs: hooks on timm's model, whose keys and eval output stay as they are; other backbones, layers and matrices.
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
        if isinstance(model, (DistributedDataParallel, nn.DataParallel, OptimizedModule)):
            raise TypeError(
                f"the stock timm model is needed, not the {type(model).__name__} around it; wrap or compile what is "
                "built from it, a TappedViT or a DiverseLoss"
            )
        reads = (reads,) if isinstance(reads, str) else reads
        unknown = sorted(set(reads) - set(TAPS))
        if unknown:
            raise ValueError(f"unknown tap {unknown[0]!r}; there are {', '.join(TAPS)}")
        self.model = model
        self.reads = tuple(tap for tap in TAPS if tap in reads)
        self.patch_logits = patch_logits
        self.settings = TapSettings(emb_layers, attn_layers, parse_weight_groups(weight_groups))
        asked = [*self.reads, *(["patch_logits"] if patch_logits else [])]
        self.backbone = Backbone.require(model, asked[0]) if asked else Backbone.of(model)
        if self.backbone and not self.backbone.head:
            raise TapError("logits", model, "it has no classifier; load it with AutoModelForImageClassification")
        self.grid = self.backbone.grid if self.backbone else None
        self.distilled_training = False
        self._sources = {tap: TAPS[tap].sources(self.backbone, self.settings) for tap in self.reads}
        if patch_logits:
            self.backbone.require_patch_head()
        self._captured: dict[Source, torch.Tensor] | None = None  # None outside forward: hooks then keep nothing
        self._hooks = ModelHooks()
        self._hook()

    def forward(self, samples: torch.Tensor, call: Callable | None = None):
        """samples [B, 3, S, S] -> `TapOutput` in train mode, [B, C] in eval mode.

        `call` calls the model: the DistributedDataParallel that a framework built around it, or a function that gives
        it more arguments; None = the model itself.
        """
        call = self.model if call is None else call
        if isinstance(call, nn.DataParallel):
            self._replicate_for_data_parallel()
        if not self.training:
            return class_logits(self.model, call(samples))
        self._captured = {}
        compiling = torch.compiler.is_compiling()
        if compiling:
            self._hooks.fuse_plain_attention(True)
        try:
            logits = class_logits(self.model, call(samples), self.distilled_training)
            taken = {tap: self._tap(tap) for tap in self.reads}
            if compiling and self.backbone:
                taken["with_prefix"] = {tap: self._with_prefix(tap) for tap in self.reads if TAPS[tap].patches_only}
                taken["num_prefix_tokens"] = self.backbone.num_prefix_tokens
            if self.patch_logits:
                normed = self._take(FINAL_NORM)
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
                self._hooks.fuse_plain_attention(False)
        if isinstance(logits, tuple):
            logits, taken["dist_logits"] = logits
        return TapOutput(logits, **taken)

    def close(self):
        """Remove the hooks and restore fused attention; from then on the wrapper returns logits only."""
        self._hooks.remove()
        self.reads, self.patch_logits, self._sources = (), False, {}

    def __reduce__(self):  # which copy.copy calls too
        raise TypeError(
            "a TappedViT cannot be shallowly copied or pickled, since its hooks belong to this object; save the "
            "state_dict of its stock model (.model), load it into another model, and build a new TappedViT around that"
        )

    def __deepcopy__(self, memo):
        """A TappedViT with its own hooks around a copy of the model, such as averages of weights make."""
        self._hooks.remove()
        try:
            model = copy.deepcopy(self.model, memo)
        finally:
            self._hook()
        settings = self.settings.emb_layers, self.settings.attn_layers, self.settings.weight_groups
        copied = type(self)(model, self.reads, self.patch_logits, *settings)
        copied.training, copied.distilled_training = self.training, self.distilled_training
        return copied

    def _replicate_for_data_parallel(self):
        raise TypeError(
            "a TappedViT cannot run in DataParallel, whose replicas would share its hooks; start one process for each "
            "GPU with torchrun, or make one GPU visible with CUDA_VISIBLE_DEVICES=0"
        )

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def table(self) -> str:
        """The taps in use, one line each: its name, and the blocks or matrices it covers."""
        lines = []
        for tap in self.reads:
            sources = self._sources[tap]
            if sources:
                blocks = ", ".join(str(i) for _, i in sources)
                covers = f"{sources[0][0]} of block{'s' if len(sources) > 1 else ''} {blocks}"
            else:
                stacks = TAPS[tap].from_weights(self.backbone, self.settings)
                stacks = (stacks,) if torch.is_tensor(stacks) else stacks
                shapes = ", ".join(f"{len(stack)} of {[*stack.shape[1:]]}" for stack in stacks)
                covers = f"{TAPS[tap].covers(self.settings)} of all blocks: {shapes}"
            lines.append(f"{tap:<24}{covers}")
        if self.patch_logits:
            lines.append(f"{'patch logits':<24}{self.grid[0]} x {self.grid[1]} patches")
        heading = f"{'tap':<24}from the {len(self.backbone.blocks)} {self.backbone.blocks_are}" if lines else ""
        return "\n".join([heading, *lines])

    def _tap(self, name: str):
        """The value of a tap, from what the hooks kept or from the weights."""
        tap = TAPS[name]
        if tap.from_weights:
            return tap.from_weights(self.backbone, self.settings)
        if tap.patches_only:
            return self._with_prefix(name)[..., self.backbone.num_prefix_tokens :, :]
        return _stacked([self._take(source) for source in self._sources[name]])

    def _with_prefix(self, name: str) -> torch.Tensor:
        """The tokens of a tap, prefix tokens included: [B, N, D] or [layers, B, N, D]."""
        return _stacked([self._take(source).flatten(1, -2) for source in self._sources[name]])

    def _take(self, source: Source) -> torch.Tensor:
        """The tensor that a hook kept."""
        tensor = self._captured.get(source)
        if callable(tensor):  # the maps of transformers' attention
            tensor = tensor()
        if tensor is None:
            what = f"{source[0]} of {source[1] if source == FINAL_NORM else f'block {source[1]}'}"
            raise RuntimeError(f"the hook for the {what} did not fire: {type(self.model).__name__} bypassed its module")
        if source[0] == "maps" and torch.is_grad_enabled() and not tensor.requires_grad:
            self._require_fixed_maps(source[1])
        return tensor

    def _require_fixed_maps(self, i: int):
        """Raise for maps without a gradient if their weights are trained."""
        if trains_maps(attention_of(self.backbone.blocks[i])) and not torch.is_inference_mode_enabled():
            raise RuntimeError(
                f"the maps of block {i} have no gradient, since reentrant checkpointing computes a block without one; "
                "checkpoint with use_reentrant=False (of transformers: gradient_checkpointing_kwargs)"
            )

    def _hook(self):
        """Hook what the taps need, and nothing else."""
        for source in sorted({source for sources in self._sources.values() for source in sources}):
            kind, i = source
            block, keep = self.backbone.blocks[i], self._keep(source)
            attn = attention_of(block)
            if kind == "input":
                self._hooks.on_input(block, keep)
            elif kind == "output":
                self._hooks.on_output(block, keep)
            elif isinstance(attn, TransformersAttention):
                self._hooks.on_scores(attn, keep)
            else:
                self._hooks.on_maps(attn, keep)
                if type(attn) is Attention:
                    self._hooks.on_compiled_maps(attn, keep)
        if self.patch_logits:
            self._hooks.on_output(self.model.get_submodule(self.backbone.norm), self._keep(FINAL_NORM))

    def _keep(self, source: Source) -> Callable[[torch.Tensor], None]:
        """A function that keeps a tensor until the end of the forward pass."""

        def keep(tensor):
            if self._captured is not None:
                self._captured[source] = tensor

        return keep


def _stacked(tensors: list[torch.Tensor]) -> torch.Tensor:
    """A single tensor as it is, several with a leading axis."""
    return tensors[0] if len(tensors) == 1 else torch.stack(tensors)
