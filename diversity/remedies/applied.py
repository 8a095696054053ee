"""Remedies on a model: one module with the parameters and the hooks of all of them."""

from functools import partial

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from .registry import REMEDIES, RemedyError, find_remedy
from .sites import BlockShape, blocks_of, has_joint_projection, merge_heads, missing, output_projection, split_heads

FIRST_VALUES = "remedies_first_values"
"""The attribute of a block's output that has the values of the first block.

It goes from block to block with the tokens, and not in `Remedies`, so that a checkpointed block finds the values of its
own forward pass when it is computed again in the backward pass.
"""


class Remedies(nn.ModuleDict):
    """The remedies of a model under their names, registered as `model.remedies`; each has its `settings`.

    Its hooks are bound to it, so a deep copy of the model has its own hooks and parameters.
    """

    def __init__(self):
        super().__init__()
        self._handles = []
        self._num_heads: list[int] = []
        self._by_site: dict[str, list[str]] = {}
        self._was_fused: dict[int, bool] = {}  # whether the attention of a block was fused before it formed maps
        self._kept: dict[tuple[str, int], torch.Tensor] = {}  # while a block computes, what remedies read

    def add(self, name: str, module: nn.Module):
        """Add a remedy, in the order of `REMEDIES`."""
        modules = {**self, name: module}
        self.clear()
        self.update({name: modules[name] for name in REMEDIES if name in modules})

    def hook(self, model: nn.Module):
        """Hook the tensors that the present remedies need, and nothing else."""
        self.unhook(model)
        for name, module in self.items():
            for site in getattr(module, "changes", REMEDIES[name].changes):
                self._by_site.setdefault(site, []).append(name)
        needs = {*self._by_site, *(read for name in self for read in REMEDIES[name].reads)}
        for i, block in enumerate(blocks_of(model)):
            self._num_heads.append(block.attn.num_heads)
            self._hook_block(i, block, needs)
            self._hook_attention(i, block.attn, needs)

    def unhook(self, model: nn.Module):
        """Remove all hooks, and restore fused attention."""
        for handle in self._handles:
            handle.remove()
        blocks = blocks_of(model)
        for i, was_fused in self._was_fused.items():
            blocks[i].attn.fused_attn = was_fused
        self._handles, self._num_heads, self._by_site, self._was_fused = [], [], {}, {}

    def _hook_block(self, i: int, block: nn.Module, needs: set[str]):
        """Hooks on the modules of a block around attention and MLP."""
        reads_residual = "residual" in needs
        for branch, norm, path in (("attention", "norm1", "drop_path1"), ("mlp", "norm2", "drop_path2")):
            if reads_residual or f"{branch}_input" in needs:
                self._before(getattr(block, norm), self._enter_branch, f"{branch}_input", i)
            if f"{branch}_update" in needs:
                self._after(getattr(block, path), self._change_output, f"{branch}_update", i)
        if "attention_output" in needs:
            self._after(block.attn, self._change_output, "attention_output", i)
        if "first_values" in needs and i > 0:
            self._before(block, self._enter_block, i, prepend=True)
        self._after(block, self._leave_block, i, always_call=True)

    def _hook_attention(self, i: int, attn: nn.Module, needs: set[str]):
        """Hooks on the modules of attention."""
        if needs & {"values", "first_values"}:
            if has_joint_projection(attn):
                self._after(attn.qkv, self._see_joint_values, i)
            else:
                self._after(attn.v_proj, self._see_values, i)
        if "queries" in needs:
            self._after(attn.q_norm, self._keep_output, "queries", i)
            self._after(attn.k_norm, self._keep_output, "keys", i)
        if "maps" in needs:
            if hasattr(attn, "fused_attn"):  # Swin V2 has no fused form
                self._was_fused[i] = attn.fused_attn
                attn.fused_attn = False
            self._after(attn.attn_drop, self._change_maps, i)
        if needs & {"heads", "maps"}:
            self._before(output_projection(attn), self._change_heads, i)

    def _before(self, module: nn.Module, hook, *args, **options):
        self._handles.append(module.register_forward_pre_hook(partial(hook, *args), **options))

    def _after(self, module: nn.Module, hook, *args, **options):
        self._handles.append(module.register_forward_hook(partial(hook, *args), **options))

    def _changed(self, site: str, i: int, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of block i after all remedies that change it."""
        for name in self._by_site.get(site, ()):
            tensor = self[name](i, tensor, *(self._kept[read, i] for read in REMEDIES[name].reads))
        return tensor

    def _enter_block(self, i: int, block: nn.Module, inputs):
        values = getattr(inputs[0], FIRST_VALUES, None)
        if values is None:
            raise RuntimeError(
                f"the input of block {i} is not the output of block {i - 1}, which has the values of the first block; "
                "gradient checkpointing must be non-reentrant"
            )
        self._kept["first_values", i] = values

    def _leave_block(self, i: int, block: nn.Module, inputs, output: torch.Tensor | None):
        """Keep nothing; called also after an error, and then without output."""
        values = self._kept.get(("first_values", i))
        if values is not None and output is not None and i + 1 < len(self._num_heads):
            setattr(output, FIRST_VALUES, values)
        for need in ("residual", "values", "first_values", "queries", "keys", "maps"):
            self._kept.pop((need, i), None)

    def _enter_branch(self, site: str, i: int, norm: nn.Module, inputs):
        self._kept["residual", i] = inputs[0]
        return self._changed(site, i, inputs[0])

    def _change_output(self, site: str, i: int, module: nn.Module, inputs, output: torch.Tensor) -> torch.Tensor:
        return self._changed(site, i, output)

    def _keep_output(self, read: str, i: int, module: nn.Module, inputs, output: torch.Tensor):
        self._kept[read, i] = output

    def _see_values(self, i: int, v_proj: nn.Module, inputs, output: torch.Tensor) -> torch.Tensor | None:
        values = split_heads(output, self._num_heads[i])
        if i == 0 and any("first_values" in REMEDIES[name].reads for name in self):
            self._kept["first_values", i] = values
        changed = self._kept["values", i] = self._changed("values", i, values)
        return None if changed is values else merge_heads(changed)

    def _see_joint_values(self, i: int, qkv: nn.Module, inputs, output: torch.Tensor) -> torch.Tensor | None:
        queries, keys, values = output.chunk(3, dim=-1)
        changed = self._see_values(i, qkv, inputs, values)
        return None if changed is None else torch.cat((queries, keys, changed), dim=-1)

    def _change_maps(self, i: int, attn_drop: nn.Module, inputs, output: torch.Tensor) -> torch.Tensor:
        maps = self._kept["maps", i] = self._changed("maps", i, output)
        return maps

    def _change_heads(self, i: int, module: nn.Module, inputs) -> torch.Tensor | None:
        if "maps" in self._by_site and ("maps", i) not in self._kept:
            raise RuntimeError(f"the attention of block {i} was fused after a remedy that changes its maps was applied")
        if "heads" not in self._by_site:
            return None
        return merge_heads(self._changed("heads", i, split_heads(inputs[0], self._num_heads[i])))


class RemedyHandle:
    """A remedy that is applied to a model. Usable as a context manager that calls `remove()`.

    Attributes:
        model: the model.
        name: the remedy's name.
    """

    def __init__(self, model: nn.Module, name: str):
        self.model = model
        self.name = name
        self._module = model.remedies[name]

    def remove(self):
        """Remove the remedy's hooks and parameters; without another remedy the model is stock again.

        A second call does nothing.
        """
        remedies = getattr(self.model, "remedies", None)
        if remedies is None or self._module not in remedies.values():
            return
        del remedies[self.name]
        remedies.unhook(self.model)
        if len(remedies):
            remedies.hook(self.model)
        else:
            del self.model.remedies

    def __enter__(self) -> "RemedyHandle":
        return self

    def __exit__(self, *exception):
        self.remove()


def apply_remedy(model: nn.Module, name: str, **settings) -> RemedyHandle:
    """Apply a remedy to a stock timm model, by hooks.

    Its parameters are in `model.remedies`, with the keys `remedies.<name>.` in the state_dict; the stock keys stay.
    They have one dimension, which optimizers exempt from weight decay. No random number is drawn. Several remedies
    change a tensor in the order of `REMEDIES`, whatever the order of the calls. Prefix tokens count as tokens.

    Apply remedies before the model gets an optimizer, an average of its weights, DistributedDataParallel, torch.compile
    or a `DiverseLoss`. A deep copy of the model has its own remedies. torch.compile of checkpointed blocks needs
    `torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint`, as the hooks of a `TappedViT` do.

    Args:
        model: a ViT, DeiT, BEiT, EVA or Swin of timm, on its device.
        name: one of `REMEDIES`.
        settings: of the remedy.

    Returns:
        A handle whose `remove()` restores the model.

    Raises:
        ValueError: an unknown remedy or setting, a bad value, or a remedy that the model already has.
        TypeError: a model that DistributedDataParallel, DataParallel or torch.compile wraps.
        RemedyError: the model lacks what the remedy needs.
        The model stays as it is where one is raised.
    """
    remedy = find_remedy(name)
    remedy.check_settings(settings)
    if isinstance(model, (DistributedDataParallel, nn.DataParallel, OptimizedModule)):
        raise TypeError(f"the stock timm model is needed, not the {type(model).__name__} around it")
    lacks = missing(model, remedy.needs)
    if lacks is not None:
        raise RemedyError(name, model, lacks)
    if name in getattr(model, "remedies", {}):
        raise ValueError(f"the model has the remedy {name} already; call remove() of its handle to apply it again")
    module = remedy.module([BlockShape.of(block) for block in blocks_of(model)], **settings)
    module.settings = remedy.settings | settings
    if not hasattr(model, "remedies"):
        model.remedies = Remedies()
    model.remedies.add(name, module)
    model.remedies.train(model.training)
    model.remedies.hook(model)
    return RemedyHandle(model, name)
