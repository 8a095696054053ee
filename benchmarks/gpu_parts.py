"""Measuring parts of the GPU report: the card, the kernels of a step, the loader. gpu_steps.py has the training steps.

Each is called with the flags of benchmark.py, those of main.py, the results of all parts so far, and `send`, to which
it passes its results one by one.
"""

import dataclasses
import subprocess
import tempfile
from argparse import Namespace
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import profile

from datasets import DataOptions
from engine import autocast_dtype
from training.build import options_of
from utils import cpu_count, quiet_warnings

from . import training_steps
from .gpu_steps import CONFIGURATIONS, start
from .loader import ALL, AS_IS, EVERY, NONE, images_of_all_workers, images_per_core, make_photographs
from .measure import copy_bytes_per_second, matmul_flops_per_second, now
from .training_steps import with_flags

NUM_KERNELS, TRACED_STEPS = 10, 3
LOADERS = {
    "cuda": {"batch_size": 128, "num_batches": 2, "photographs": 128, "names": 32768, "seconds": 6.0},
    "cpu": {"batch_size": 4, "num_batches": 1, "photographs": 4, "names": 768, "seconds": 0.2},
}
"""Sizes of the measurement of the loader; `names` are so many that an epoch takes longer than the measurement."""

Send = Callable[[dict], None]


def describe_card(own: Namespace, args: Namespace, earlier: dict, send: Send):
    """Report the device, and measure how fast it copies its memory and multiplies matrices."""
    world = start(args)
    device, dtype = world.device, autocast_dtype(args.amp, world.device)
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        send({
            "name": card.name,
            "memory_gib": card.total_memory / 2**30,
            "multiprocessors": card.multi_processor_count,
            "cuda": torch.version.cuda,
            "driver": driver_version(device),
        })  # fmt: skip
    send({"copy_bytes_per_second": copy_bytes_per_second(device)})
    precision = str(dtype or torch.float32).removeprefix("torch.")
    send({"precision": precision, "matmul_flops_per_second": matmul_flops_per_second(device, dtype)})


def driver_version(device: torch.device) -> str:
    """Version of NVIDIA's driver, or "unknown"."""
    query = ["nvidia-smi", f"--id={device.index}", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip() or "unknown"
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def trace_kernels(own: Namespace, args: Namespace, earlier: dict, send: Send):
    """Trace the diversified step, and report the kernels that take most time; on a CPU the operators."""
    world = start(args)
    flags = with_flags(args, **CONFIGURATIONS[world.device.type][0])
    run = training_steps.diversified(flags, world)
    run(2)
    now(world.device)
    with profile() as profiler:
        run(TRACED_STEPS)
        now(world.device)
    kind, time = DeviceType.CPU, "self_cpu_time_total"
    if world.device.type == "cuda":
        kind, time = DeviceType.CUDA, "self_device_time_total"
    events = [e for e in profiler.key_averages() if e.device_type == kind and not e.is_user_annotation]
    events.sort(key=attrgetter(time), reverse=True)
    total = sum(getattr(event, time) for event in events)
    kernels = [
        {
            "name": event.key,
            "ms": getattr(event, time) / 1000 / TRACED_STEPS,
            "calls": event.count / TRACED_STEPS,
            "fraction": getattr(event, time) / total,
        }
        for event in events[:NUM_KERNELS]
    ]
    ms_of_all = total / 1000 / TRACED_STEPS
    send({"model": flags.model, "batch_size": flags.batch_size, "ms_of_all": ms_of_all, "kernels": kernels})


def measure_loader(own: Namespace, args: Namespace, earlier: dict, send: Send):
    """Measure how many images per second one core and all loader processes read.

    This process never uses the GPU, so it can be forked.
    """
    quiet_warnings()
    size = LOADERS["cuda" if args.device.startswith("cuda") else "cpu"]
    flags, source = {"batch_size": size["batch_size"]}, args.data_path
    if not args.data_path:
        folder = Path(tempfile.mkdtemp())
        make_photographs(folder, size["photographs"], size["names"])
        flags |= {"data_set": "IMNET", "data_path": str(folder)}
        source = f"{size['photographs']} random JPEG images of 500 x 375 pixels, read again and again"
    workers = cpu_count() if args.num_workers is None else args.num_workers
    send({"source": source, "workers": workers, "batch_size": size["batch_size"]})
    options = options_of(DataOptions, with_flags(args, **flags))
    modes = {AS_IS: dataclasses.replace(options, **NONE), ALL: dataclasses.replace(options, **EVERY)}
    send({"images_per_s_of_a_core": images_per_core(modes, size["num_batches"], min(own.rounds, 3))})
    send({"images_per_s_of_all_workers": images_of_all_workers(modes[ALL], size["seconds"])})
