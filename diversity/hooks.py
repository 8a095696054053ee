"""Changes of a model for a while: hooks that see its tensors, un-fused attention where maps are read, eval mode."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from timm.layers import Attention
from torch import nn

from .block_parts import TransformersAttention

See = Callable[[torch.Tensor], None]
"""A function that is called with a tensor of every forward pass."""


class ModelHooks:
    """Hooks on the modules of a model of timm or transformers, which are removed together.

    Usable as a context manager that calls `remove()`.
    """

    def __init__(self):
        self._handles = []
        self._unfused: list[tuple[nn.Module, bool]] = []  # and whether each was fused before

    def on_input(self, module: nn.Module, see: See):
        """Call `see` with the module's first input."""

        def hook(module, inputs):
            see(inputs[0])

        self._handles.append(module.register_forward_pre_hook(hook))

    def on_output(self, module: nn.Module, see: See):
        """Call `see` with the module's output."""

        def hook(module, inputs, output):
            see(output)

        self._handles.append(module.register_forward_hook(hook))

    def on_maps(self, attn: nn.Module | TransformersAttention, see: See):
        """Call `see` with the attention maps [B, H, N, N], after the softmax and before dropout.

        timm's attention is un-fused, since fused attention never forms its maps; see `on_scores` for that of
        transformers.
        """
        if isinstance(attn, TransformersAttention):
            self.on_scores(attn, lambda maps: see(maps()))
            return
        if hasattr(attn, "fused_attn"):  # Swin V2 has no fused form
            self._unfused.append((attn, attn.fused_attn))
            attn.fused_attn = False
        self.on_input(attn.attn_drop, see)

    def on_scores(self, attn: TransformersAttention, see: Callable[[Callable[[], torch.Tensor]], None]):
        """Call `see` with a function that returns the maps, computed from the module's queries, keys and bias.

        The hooks only keep these. Where a block is checkpointed, its backward pass computes it again and must find the
        operations of its forward pass, so the maps have to be computed after it.
        """
        kept = {}

        def begin(module, inputs, kwargs):
            kept["bias"] = kwargs.get("attention_mask", inputs[1] if len(inputs) > 1 else None)

        def end(module, inputs, output):
            see(partial(attn.maps, kept.pop("queries"), kept.pop("keys"), kept.pop("bias")))

        self._handles.append(attn.module.register_forward_pre_hook(begin, with_kwargs=True))
        self.on_output(attn.q_proj, partial(kept.__setitem__, "queries"))
        self.on_output(attn.k_proj, partial(kept.__setitem__, "keys"))
        self._handles.append(attn.module.register_forward_hook(end))

    def on_compiled_maps(self, attn: Attention, see: See):
        """Call `see` with the maps under torch.compile, computed beside fused attention from its queries and keys.

        They then need not be stored in the precision of softmax, as they would be for unfused attention. See
        `fuse_plain_attention`.
        """

        def hook(module, inputs, output):
            if torch.compiler.is_compiling():
                q, k, _ = output.unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
                q, k = attn.q_norm(q), attn.k_norm(k)
                see((q * attn.scale @ k.mT).softmax(dim=-1))

        self._handles.append(attn.qkv.register_forward_hook(hook))

    def fuse_plain_attention(self, fused: bool):
        """Fuse or un-fuse the attention of plain ViT blocks that `on_maps` un-fused, if it was fused before."""
        for attn, was_fused in self._unfused:
            if was_fused and type(attn) is Attention:
                attn.fused_attn = fused

    def remove(self):
        """Remove the hooks and restore fused attention."""
        for handle in self._handles:
            handle.remove()
        for attn, was_fused in self._unfused:
            attn.fused_attn = was_fused
        self._handles, self._unfused = [], []

    def __enter__(self) -> "ModelHooks":
        return self

    def __exit__(self, *exception):
        self.remove()


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, and afterwards each of its modules back into its own mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
