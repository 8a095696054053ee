"""CUDA tensors without a GPU, which compute shapes, dtypes and devices only, and a record of what crosses to the host.

Under FakeTensorMode a tensor may claim the device "cuda". An operation that mixes devices then raises as on a GPU, and
a dispatch mode above sees every value that the host reads and every copy between host and device. What the CUDA driver
would do is replaced: streams, events, generators, and torch's autograd engine, whose nodes are called from Python.
It uses private parts of torch 2.14.
"""

import collections
import contextlib
import traceback
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.cuda.amp.common
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)
PAGEABLE_LIMIT = 64 * 1024
"""Bytes. A larger copy from pageable memory may wait for all work of the stream, though it is non-blocking."""

REPOSITORY = Path(__file__).parents[1]
aten = torch.ops.aten
READS = {aten._local_scalar_dense.default: 1, aten.is_nonzero.default: True, aten.equal.default: True}
COPIES = (aten._to_copy.default, aten.copy_.default)


class Finding(NamedTuple):
    """A wait of the host for the device, or a copy between them.

    Attributes:
        kind: "wait", "upload" (non-blocking), "pageable upload" (the same, from pageable memory beyond the limit), or
            "download" (non-blocking, to page-locked memory).
        phase: of the run.
        where: the innermost line of this repository that was running.
        what: the operation.
        num_bytes: copied.
    """

    kind: str
    phase: str
    where: str
    what: str
    num_bytes: int = 0


class Watch(TorchDispatchMode):
    """Sees every operation before the fake mode does, and keeps `findings`."""

    def __init__(self):
        super().__init__()
        self.findings: list[Finding] = []
        self.phase = "build"
        self.locked: set[StorageWeakRef] = set()  # page-locked memory

    def add(self, kind: str, what: str, num_bytes: int = 0):
        self.findings.append(Finding(kind, self.phase, _running_line(), what, num_bytes))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_host = [tensor for tensor in tensors if tensor.device.type == "cpu"]
        on_device = len(on_host) < len(tensors)
        if function in READS:
            if on_device:
                self.add("wait", f"{function} reads a value of the device")
            value = READS[function]
            return value if value is True or not tensors[0].is_floating_point() else 0.5
        if on_device and function not in COPIES and any(tensor.dim() for tensor in on_host):
            self.add("wait", f"{function} copies an operand from the host", sum(t.nbytes for t in on_host))
        result = function(*args, **kwargs)
        if kwargs.get("pin_memory"):
            self.locked.add(StorageWeakRef(result.untyped_storage()))
        if function in COPIES:
            target, source = (args[0], args[1]) if function is aten.copy_.default else (result, args[0])
            non_blocking = bool(kwargs.get("non_blocking") or args[2:3] == (True,))
            self._copy(source, target, non_blocking and function in COPIES)
        return result

    def _copy(self, source: torch.Tensor, target: torch.Tensor, non_blocking: bool):
        if source.device.type == target.device.type:
            return
        to_device = target.device.type == "cuda"
        is_locked = StorageWeakRef((source if to_device else target).untyped_storage()) in self.locked
        memory = "page-locked" if is_locked else "pageable"
        if not non_blocking or not (to_device or is_locked):
            self.add("wait", f"copy {'from' if to_device else 'to'} {memory} memory", target.nbytes)
        elif to_device:
            over = not is_locked and target.nbytes > PAGEABLE_LIMIT
            self.add("pageable upload" if over else "upload", f"copy from {memory} memory", target.nbytes)
        else:
            self.add("download", "copy to page-locked memory", target.nbytes)


def _running_line() -> str:
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(REPOSITORY) and ".venv" not in path.parts and path != Path(__file__):
            return f"{path.relative_to(REPOSITORY)}:{frame.lineno} {frame.line}"
    return "outside the repository"


@contextlib.contextmanager
def fake_cuda():
    """Within, tensors may lie on "cuda" on any machine; yields the `Watch`."""
    watch = Watch()

    def tolist(tensor):
        if tensor.device.type == "cuda":
            watch.add("wait", "tolist reads values of the device")
        value = True if tensor.dtype == torch.bool else 1.0 if tensor.is_floating_point() else 1
        for size in reversed(tensor.shape):
            value = [value] * size
        return value

    event = mock.Mock(spec=["record", "query", "synchronize"], **{"query.return_value": False})
    event.synchronize.side_effect = lambda: watch.add("wait", "waits for an event")
    stand_ins = {
        "torch.autograd.backward": backward,
        "torch.autograd.grad": grad,
        "torch.cuda.Event": lambda *_, **__: event,
        "torch.cuda.Stream": mock.MagicMock(),
        "torch.cuda.current_stream": mock.MagicMock(),
        "torch.cuda.stream": lambda stream: contextlib.nullcontext(),
        "torch.cuda.default_generators": (mock.Mock(),),
        "torch.cuda.is_bf16_supported": lambda **_: True,
        "torch.cuda.max_memory_allocated": lambda *_: 0,
        "torch.cuda.synchronize": lambda *_: watch.add("wait", "torch.cuda.synchronize"),
        "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
        "torch.Tensor.tolist": tolist,
        "torch._subclasses.fake_tensor.FakeTensor.tolist": tolist,
        "torch.nn.Module.to": _to,
    }
    with contextlib.ExitStack() as stack:
        for name, stand_in in stand_ins.items():
            stack.enter_context(mock.patch(name, stand_in))
        for context in (sdpa_kernel(SDPBackend.MATH), FakeTensorMode(), watch):  # the others ask the driver
            stack.enter_context(context)
        yield watch


def _to(module: nn.Module, device: torch.device | str) -> nn.Module:
    """nn.Module.to, which could not swap real parameters for fake ones."""

    def fake(tensor):
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)

    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None and value.device != device:
                part._parameters[name] = nn.Parameter(fake(value), value.requires_grad)
        for name, value in part._buffers.items():
            if value is not None and value.device != device:
                part._buffers[name] = fake(value)
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
    wanted = {(edge.node, edge.output_nr): place for place, edge in enumerate(edges)}
    ends = {node for node, _ in wanted}
    missing = _num_parents([output.grad_fn for output in outputs], ends)
    arriving = collections.defaultdict(dict)
    for output, start in zip(outputs, grad_outputs or map(torch.ones_like, outputs), strict=True):
        arriving[output.grad_fn][output.output_nr] = start
    ready, found = [output.grad_fn for output in outputs if not missing[output.grad_fn]], [None] * len(edges)
    with torch.set_grad_enabled(create_graph):
        while ready:
            node = ready.pop()
            grads = arriving.pop(node, {})
            if node in ends:
                for (end, number), place in wanted.items():
                    if end is node:
                        found[place] = grads.get(number)
                continue
            if hasattr(node, "variable"):  # a leaf
                if inputs is None and grads:
                    before = node.variable.grad
                    node.variable.grad = grads[0].detach() if before is None else before + grads[0].detach()
                continue
            results = _call(node, [grads.get(number) for number in range(len(node._input_metadata))])
            for (child, number), grad in zip(node.next_functions, results, strict=False):
                if child is None:
                    continue
                if grad is not None:
                    grad = _as_expected(grad, child, number)
                    before = arriving[child].get(number)
                    arriving[child][number] = grad if before is None else before + grad
                missing[child] -= 1
                if not missing[child]:
                    ready.append(child)
    return tuple(found)


def _num_parents(roots, ends) -> collections.Counter:
    """How many nodes hand a gradient to each node."""
    counts, stack, seen = collections.Counter(), [*roots], set()
    while stack:
        node = stack.pop()
        if node in seen or node in ends:
            continue
        seen.add(node)
        children = [child for child, _ in node.next_functions if child is not None]
        counts.update(children)
        stack += children
    return counts


def _call(node, grads) -> tuple:
    if all(grad is None for grad in grads):
        return (None,) * len(node.next_functions)
    result = (node.apply if hasattr(node, "_forward_cls") else node)(
        *grads
    )  # a torch.autograd.Function, or torch's own
    return result if isinstance(result, tuple) else (result,)


def _as_expected(grad: torch.Tensor, child, number: int) -> torch.Tensor:
    """A gradient in the shape and dtype of its value, as the engine hands it on; on its device it must be."""
    value = child.variable if hasattr(child, "variable") else child._input_metadata[number]
    assert grad.device == value.device, f"a gradient on {grad.device} for a value on {value.device}"
    return grad.sum_to_size(torch.Size(value.shape)).to(value.dtype)
