"""A record of what crosses between the host and a fake CUDA device: values that the host reads, and copies."""

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from helpers import REPOSITORY
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.fake_cuda import fake_cuda

PAGEABLE_LIMIT = 64 * 1024
"""Bytes. A larger copy from pageable memory may wait for all work of the stream, though it is non-blocking."""

NOT_REPORTED = (Path(__file__), REPOSITORY / "benchmarks" / "fake_cuda.py")
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
    """Intercepts every operation before the fake mode, and records `findings`."""

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
        if path.is_relative_to(REPOSITORY) and ".venv" not in path.parts and path not in NOT_REPORTED:
            return f"{path.relative_to(REPOSITORY)}:{frame.lineno} {frame.line}"
    return "outside the repository"


@contextlib.contextmanager
def watched_fake_cuda() -> Iterator[Watch]:
    """`fake_cuda` with streams and events that do nothing, and with a `Watch`."""
    watch = Watch()

    def on_wait(what):
        watch.add("wait", what)

    def tolist(tensor):
        if tensor.device.type == "cuda":
            on_wait("tolist reads values of the device")
        value = True if tensor.dtype == torch.bool else 1.0 if tensor.is_floating_point() else 1
        for size in reversed(tensor.shape):
            value = [value] * size
        return value

    event = mock.Mock(spec=["record", "query", "synchronize"], **{"query.return_value": False})
    event.synchronize.side_effect = lambda: on_wait("waits for an event")
    stand_ins = {
        "torch.cuda.Event": lambda *_, **__: event,
        "torch.cuda.Stream": mock.MagicMock(),
        "torch.cuda.current_stream": mock.MagicMock(),
        "torch.cuda.stream": lambda stream: contextlib.nullcontext(),
        "torch.cuda.max_memory_allocated": lambda *_: 0,
        "torch.cuda.synchronize": lambda *_: on_wait("torch.cuda.synchronize"),
        "torch.Tensor.tolist": tolist,
        "torch._subclasses.fake_tensor.FakeTensor.tolist": tolist,
    }
    with contextlib.ExitStack() as stack:
        for name, stand_in in stand_ins.items():
            stack.enter_context(mock.patch(name, stand_in))
        stack.enter_context(fake_cuda())
        yield stack.enter_context(watch)
