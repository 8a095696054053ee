"""Applying remedies to a model: one module with the parameters and the hooks of all of them."""

import functools

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from .registry import REMEDIES, RemedyError, find_remedy
from .sites import BlockShape, before_output_projection, blocks_of, merge_heads, missing, split_heads, values_module


class Remedies(nn.ModuleDict):
    """The remedies of a model under their names, registered as `model.remedies`.

    Its hooks on the blocks call every remedy in the order of `REMEDIES`. They are bound to this module, so a deep copy
    of the model has its own hooks and parameters.
    """

    def __init__(self):
        super().__init__()
        self._handles = []
        self._num_heads: list[int] = []
        self._kept: dict[tuple[str, int], torch.Tensor] = {}  # within the forward pass of a block

    def __getstate__(self):
        return {**self.__dict__, "_kept": {}}

    def ordered(self, method: str) -> list[nn.Module]:
        """The remedies that have a method, in the order of `REMEDIES`."""
        return [self[name] for name in REMEDIES if name in self and hasattr(self[name], method)]

    def hook(self, model: nn.Module):
        """Hook what the present remedies need, and nothing else."""
        self.unhook()
        blocks = blocks_of(model)
        self._num_heads = [block.attn.num_heads for block in blocks]
        for i, block in enumerate(blocks):
            values = values_module(block.attn).register_forward_hook(functools.partial(self._see_values, i))
            heads = before_output_projection(block.attn)
            heads = heads.register_forward_pre_hook(functools.partial(self._change_heads, i))
            self._handles += [values, heads]

    def unhook(self):
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _see_values(self, i: int, module: nn.Module, inputs, output: torch.Tensor):
        """Keep the values of block i until its attention has been computed."""
        values = output.chunk(3, dim=-1)[2] if output.shape[-1] != module.weight.shape[1] else output
        self._kept["values", i] = split_heads(values, self._num_heads[i])

    def _change_heads(self, i: int, module: nn.Module, inputs):
        """Change the heads' outputs of block i before they are projected."""
        values = self._kept.pop(("values", i))
        y = split_heads(inputs[0], self._num_heads[i])
        for remedy in self.ordered("heads"):
            y = remedy.heads(i, y, values)
        return (merge_heads(y), *inputs[1:])


class RemedyHandle:
    """A remedy that is applied to a model. Usable as a context manager that calls `remove()`.

    Attributes:
        model: the model.
        name: the remedy's name.
    """

    def __init__(self, model: nn.Module, name: str):
        self.model = model
        self.name = name

    def remove(self):
        """Remove the remedy's hooks and parameters; without another remedy the model is stock again."""
        remedies = getattr(self.model, "remedies", None)
        if remedies is None or self.name not in remedies:
            return
        del remedies[self.name]
        if len(remedies):
            remedies.hook(self.model)
        else:
            remedies.unhook()
            del self.model.remedies

    def __enter__(self) -> "RemedyHandle":
        return self

    def __exit__(self, *exception):
        self.remove()


def apply_remedy(model: nn.Module, name: str, **settings) -> RemedyHandle:
    """Apply a remedy to a stock timm model, by hooks.

    Its parameters are those of `model.remedies`, with the keys `remedies.<name>.` in the state_dict; the keys of the
    stock model stay. Apply remedies before the optimizer, the average of the weights, DistributedDataParallel,
    torch.compile and `DiverseLoss` see the model. Several remedies change the model in the order of `REMEDIES`,
    whatever the order of the calls. No random number is drawn. Prefix tokens count as tokens.

    Args:
        model: a ViT, DeiT, BEiT, EVA or Swin of timm, on its device.
        name: one of `REMEDIES`.
        settings: of the remedy.

    Returns:
        A handle whose `remove()` restores the model.

    Raises:
        ValueError: an unknown remedy or setting, a bad value, or a remedy that the model already has.
        TypeError: a model that DistributedDataParallel, DataParallel or torch.compile wraps.
        RemedyError: the model lacks what the remedy needs. The model then stays as it is.
    """
    remedy = find_remedy(name)
    remedy.check_settings(settings)
    if isinstance(model, (DistributedDataParallel, nn.DataParallel, OptimizedModule)):
        raise TypeError(f"the stock timm model is needed, not the {type(model).__name__} around it")
    lacks = missing(model, remedy.needs)
    if lacks is not None:
        raise RemedyError(name, model, lacks)
    if name in getattr(model, "remedies", {}):
        raise ValueError(f"the model has the remedy {name} already; call remove() of its handle to apply it anew")
    module = remedy.module([BlockShape.of(block) for block in blocks_of(model)], **settings)
    module.train(model.training)
    if not hasattr(model, "remedies"):
        model.remedies = Remedies()
    model.remedies[name] = module
    model.remedies.hook(model)
    return RemedyHandle(model, name)
