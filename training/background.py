"""Saving beside training: a copy of the state in CPU memory, a check that it is finite, a thread that writes it."""

import copy
import threading
from collections.abc import Callable, Iterator

import torch


class BackgroundWriter:
    """Runs one job at a time in a thread. An error of a job is reported, and does not stop the training.

    Only one thread, the one that trains, may call the methods.

    Args:
        on_error: called with the exception of a job, once, by the next `submit`, `poll` or `wait`.
    """

    def __init__(self, on_error: Callable[[BaseException], None]):
        self.on_error = on_error
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether a job is running."""
        return self._thread is not None and self._thread.is_alive()

    def submit(self, job: Callable[[], None]):
        """Wait for the running job, then start this one."""
        self.wait()
        thread = threading.Thread(target=self._run, args=(job,), name="background writer")
        try:
            thread.start()
        except RuntimeError:  # the system starts no more threads
            self._run(job)
        else:
            self._thread = thread

    def poll(self):
        """Report the error of the last job if it has ended; never waits."""
        if not self.busy:
            self.wait()

    def wait(self):
        """Wait for the running job, and report its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            self.on_error(error)
            error.with_traceback(None)  # its frames refer to the job, and so to the state

    def _run(self, job: Callable[[], None]):
        try:
            job()
        except BaseException as error:
            self._error = error


def copy_to_cpu(tree, buffers: dict[tuple, torch.Tensor] | None = None):
    """Copy to CPU memory, so that later changes of the original do not change the copy.

    Args:
        tree: nested dicts, lists and tuples of tensors and plain values.
        buffers: page-locked tensors for what is on a GPU, by place in the tree. They are created where they are
            missing, and a later call with the same buffers overwrites the earlier copy.
    """
    devices = set()
    copies = _copy(tree, devices, {} if buffers is None else buffers, ())
    for device in devices:
        torch.cuda.synchronize(device)
    return copies


def first_non_finite(tree) -> str | None:
    """Dotted name of the first tensor with a NaN or an infinity, such as `model.blocks.0.attn.qkv.weight`."""
    for name, tensor in _named_tensors(tree, ()):
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            return ".".join(name)
    return None


def _copy(tree, devices: set[torch.device], buffers: dict[tuple, torch.Tensor], place: tuple):
    """The copy of what is at a place of the tree; copies from the GPUs that are added to `devices` may not be done."""
    if isinstance(tree, torch.Tensor):
        tensor = tree.detach()
        if not tensor.is_cuda:
            return tensor.cpu() if tensor.device.type != "cpu" else tensor.clone()
        devices.add(tensor.device)
        buffer = buffers.get(place)
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            buffers[place] = buffer = torch.empty_like(tensor, device="cpu", pin_memory=True)
        return buffer.copy_(tensor, non_blocking=True)
    if isinstance(tree, dict):
        copies = copy.copy(tree)  # keeps its type, and the metadata of a state_dict
        copies.update((key, _copy(value, devices, buffers, (*place, key))) for key, value in tree.items())
        return copies
    if isinstance(tree, list | tuple):
        return type(tree)(_copy(value, devices, buffers, (*place, i)) for i, value in enumerate(tree))
    return copy.deepcopy(tree)


def _named_tensors(tree, name: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], torch.Tensor]]:
    if isinstance(tree, torch.Tensor):
        yield name, tree
    elif isinstance(tree, dict | list | tuple):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _named_tensors(value, (*name, str(key)))
