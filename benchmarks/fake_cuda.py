"""CUDA tensors without a GPU, which compute shapes, dtypes and devices only.

Under FakeTensorMode a tensor may claim the device "cuda". An operation that mixes devices then raises as on a GPU. What
the CUDA driver would do is replaced: generators, and torch's autograd engine, whose nodes are called from Python. It
uses private parts of torch 2.14.
"""

import collections
import contextlib
from unittest import mock

import torch
import torch.cuda.amp.common
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)


@contextlib.contextmanager
def fake_cuda():
    """Within, tensors may be on "cuda" on any machine."""
    stand_ins = {
        "torch.autograd.backward": backward,
        "torch.autograd.grad": grad,
        "torch.cuda.default_generators": (mock.Mock(),),
        "torch.cuda.is_bf16_supported": lambda **_: True,
        "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
        "torch.nn.Module.to": _to,
    }
    with contextlib.ExitStack() as stack:
        for name, stand_in in stand_ins.items():
            stack.enter_context(mock.patch(name, stand_in))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # the others ask the driver
        stack.enter_context(FakeTensorMode())
        yield


def _to(module: nn.Module, device: torch.device | str) -> nn.Module:
    """nn.Module.to, which could not swap real parameters for fake ones."""

    def fake(tensor):
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)

    for submodule in module.modules():
        for name, value in submodule._parameters.items():
            if value is not None and value.device != device:
                submodule._parameters[name] = nn.Parameter(fake(value), value.requires_grad)
        for name, value in submodule._buffers.items():
            if value is not None and value.device != device:
                submodule._buffers[name] = fake(value)
    return module


# torch's autograd engine, which would start a thread for the device


def backward(tensors, *_, **__):
    """torch.autograd.backward of tensors of one number each."""
    differentiate(tree_leaves(tensors), None)


def grad(outputs, inputs, grad_outputs=None, create_graph: bool = False, **_):
    """torch.autograd.grad."""
    return differentiate(tree_leaves(outputs), tree_leaves(inputs), grad_outputs, create_graph)


def differentiate(outputs, inputs, grad_outputs=None, create_graph: bool = False) -> tuple[torch.Tensor | None, ...]:
    """The gradients at `inputs`; where that is None, they are added to `.grad` of the leaves."""
    edges = [torch.autograd.graph.get_gradient_edge(tensor) for tensor in inputs or ()]
    ends = {edge.node for edge in edges}
    arrived = collections.defaultdict(dict)  # {node: {number of its output: gradient so far}}

    def add(node, number, grad):
        arrived[node][number] = arrived[node][number] + grad if number in arrived[node] else grad

    for output, start in zip(outputs, grad_outputs or map(torch.ones_like, outputs), strict=True):
        add(output.grad_fn, output.output_nr, start)
    with torch.set_grad_enabled(create_graph):
        while inner := [node for node in arrived if node not in ends and not hasattr(node, "variable")]:
            node = max(inner, key=lambda node: node._sequence_nr())  # the latest: no other passes it a gradient
            grads = arrived.pop(node)
            function = node.apply if hasattr(node, "_forward_cls") else node  # a torch.autograd.Function, or torch's
            results = function(*(grads.get(number) for number in range(len(node._input_metadata))))
            results = results if isinstance(results, tuple) else (results,)
            for (child, number), grad in zip(node.next_functions, results, strict=False):
                if child is not None and grad is not None:
                    add(child, number, _as_expected(grad, child, number))
    if inputs is None:
        for leaf, grads in arrived.items():
            before = leaf.variable.grad
            leaf.variable.grad = grads[0].detach() if before is None else before + grads[0].detach()
    return tuple(arrived[edge.node].get(edge.output_nr) for edge in edges)


def _as_expected(grad: torch.Tensor, child, number: int) -> torch.Tensor:
    """A gradient in the shape and dtype of its value, as the engine passes it on; it must be on the same device."""
    value = child.variable if hasattr(child, "variable") else child._input_metadata[number]
    assert grad.device == value.device, f"a gradient on {grad.device} for a value on {value.device}"
    return grad.sum_to_size(torch.Size(value.shape)).to(value.dtype)
