"""How benchmark.py measures: times in turns, peak memory, waits of the host, and the largest rates of the device."""

import contextlib
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

_clock = time.perf_counter


def interleave(functions: dict[str, Callable], rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each function over `rounds` rounds in turns, A B A B ..., after one warm-up round.

    So a drift of the machine's speed affects all of them.
    """
    times = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, function in functions.items():
            start = now(device)
            function()
            if turn:
                times[name].append(now(device) - start)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_bytes(function: Callable, device: torch.device) -> int:
    """Largest number of bytes that torch allocated during a call, beyond those that were allocated before.

    The function is called once before, so that gradients and optimizer state exist.
    """
    function()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def host_syncs(run: Callable[[int], None], device: torch.device) -> float | None:
    """How often the host waits for the GPU in each further step of `run(num_steps)`; None without a GPU."""
    if device.type != "cuda":
        return None
    counts = []
    torch.cuda.set_sync_debug_mode("warn")
    try:
        for num_steps in (4, 12):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                run(num_steps)
            counts.append(sum("synchroniz" in str(warning.message) for warning in caught))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return (counts[1] - counts[0]) / 8


def step_flops(model: torch.nn.Module, samples: torch.Tensor) -> int:
    """Floating-point operations of the matrix products in a forward and backward pass, a multiply-add as two.

    Counted on the meta device, where nothing is computed; the model is moved there.
    """
    model, samples = model.to("meta"), samples.to("meta")
    with FlopCounterMode(display=False) as counter:
        model(samples).sum().backward()
    return counter.get_total_flops()


def matmul_flops_per_second(device: torch.device, dtype: torch.dtype | None) -> float:
    """Floating-point operations per second that the device reaches in the product of two large square matrices."""
    side = 8192 if device.type == "cuda" else 2048
    a, b, product = torch.randn(3, side, side, device=device, dtype=dtype or torch.float32)
    return 2 * side**3 / seconds_of_a_call(lambda: torch.mm(a, b, out=product))


def copy_bytes_per_second(device: torch.device) -> float:
    """Bytes per second, read and written, of a large copy from the device's memory to the device's memory."""
    num_bytes = 2**30 if device.type == "cuda" else 2**26  # far more than its caches hold
    source, copy = torch.zeros(2, num_bytes, dtype=torch.uint8, device=device)
    return 2 * num_bytes / seconds_of_a_call(lambda: copy.copy_(source))


def seconds_of_a_call(function: Callable) -> float:
    """Median seconds of a short function, over blocks of so many calls that launching and waiting hardly count."""
    timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.5).median


def now(device: torch.device) -> float:
    """Seconds on the clock, after the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock()


def clock() -> float:
    """Seconds on the clock that `use_clock` has chosen."""
    return _clock()


@contextlib.contextmanager
def use_clock(of_process: bool) -> Iterator[None]:
    """Context manager in which times are of the CPU, for this process and all its threads, or those that pass."""
    global _clock
    before, _clock = _clock, time.process_time if of_process else time.perf_counter
    try:
        yield
    finally:
        _clock = before


def new_process() -> ProcessPoolExecutor:
    """A process that runs what is submitted to it, and that shares nothing with this one."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
