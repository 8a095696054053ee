"""The measuring parts of the GPU report: the card, training steps, the kernels of a step, the loader.

Each is called with the flags of benchmark.py, those of main.py, the results of all parts so far, and `send`, to which
it passes its results one by one.
"""

import dataclasses
import gc
import math
import subprocess
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from datasets import DataOptions
from engine import autocast_dtype
from training.build import options_of
from utils import World, cpu_count, init_world, quiet_warnings, set_backends

from . import training_steps
from .loader import ALL, AS_IS, EVERY, NONE, images_of_all_workers, images_per_core, make_photographs
from .measure import copy_bytes_per_second, matmul_flops_per_second, now
from .parts import one_line
from .scratch import scratch_folder
from .steps import DIVERSIFIED, PLAIN, TEXTBOOK, flops_of_an_image, seconds_of_a_step, step_builders, step_measures

EAGER = "diversified, eager"
ROUND_SECONDS = 0.3  # of the steps of one kind in a round on a GPU
NUM_KERNELS, TRACED_STEPS = 10, 3
TINY = {"input_size": 32, "patch_size": 8, "model_kwargs": {"depth": 2}}
CONFIGURATIONS = {
    "cuda": [
        {"model": "deit_small_patch16_224_diverse", "batch_size": 1024},
        {"model": "deit_small_patch16_224_diverse", "batch_size": 128},
        {"model": "deit_base_patch16_224_diverse", "batch_size": 256},
    ],
    "cpu": [
        TINY | {"model": "deit_tiny_patch16_224_diverse", "batch_size": 4},
        TINY | {"model": "deit_tiny_patch16_224_diverse", "batch_size": 8},
    ],
}
"""Flags of the models to train, the most important ones first."""

LOADERS = {
    "cuda": {"batch_size": 128, "num_batches": 2, "photographs": 128, "names": 32768, "seconds": 6.0},
    "cpu": {"batch_size": 4, "num_batches": 1, "photographs": 4, "names": 768, "seconds": 0.2},
}
"""Sizes of the measurement of the loader; `names` are so many that an epoch takes longer than the measurement."""

Send = Callable[[dict], None]


def start(args: Namespace) -> World:
    """Set up the process of a part as main.py does."""
    quiet_warnings()
    set_backends(args.fused_attn, args.tf32)
    return init_world(args.device)


def with_flags(args: Namespace, **flags) -> Namespace:
    """A copy of main.py's flags with some of them replaced."""
    return Namespace(**vars(args) | flags)


# The card


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
    send({"copy_bytes_per_second": copy_bytes_per_second(device, own.rounds)})
    precision = str(dtype or torch.float32).removeprefix("torch.")
    rate = matmul_flops_per_second(device, dtype, own.rounds)
    send({"precision": precision, "matmul_flops_per_second": rate})


def driver_version(device: torch.device) -> str:
    """Version of NVIDIA's driver, or "unknown"."""
    query = ["nvidia-smi", f"--id={device.index}", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return result.stdout.strip() or "unknown"


# Training steps


def measure_steps(own: Namespace, args: Namespace, earlier: dict, send: Send):
    """Measure a table of training steps for each of `CONFIGURATIONS`; the steps with a single term come last."""
    world = start(args)
    rate = earlier["card"].get("matmul_flops_per_second") or matmul_flops_per_second(
        world.device, autocast_dtype(args.amp, world.device), own.rounds
    )
    configurations = [with_flags(args, **flags) for flags in CONFIGURATIONS[world.device.type]]
    tables = [
        {"model": flags.model, "batch_size": flags.batch_size, "flops_per_image": flops_of_an_image(flags), "rows": {}}
        for flags in configurations
    ]
    for single_terms in (False, True):
        for flags, table in zip(configurations, tables, strict=True):
            builders = step_builders(flags, world)
            eager = with_flags(flags, compile=False)
            builders[EAGER] = lambda eager=eager: training_steps.diversified(eager, world)
            names = (PLAIN, DIVERSIFIED, EAGER, TEXTBOOK)
            if single_terms:
                names = (PLAIN, *(name for name in builders if name not in names))
            builders = {name: builders[name] for name in names}
            product_seconds = table["flops_per_image"] / rate
            for name, row in measured_rows(builders, table["rows"], flags, own, world, product_seconds):
                table["rows"][name] = row
                send({"tables": tables, "rounds": own.rounds})
            release_memory(world.device)
            torch._dynamo.reset()


def measured_rows(
    builders: dict[str, Callable], known: dict, args: Namespace, own: Namespace, world: World, product_seconds: float
) -> Iterator[tuple[str, dict]]:
    """Measure one step after the other, in turns with the plain one, and yield its name and row.

    A step that fails, for example for lack of memory, has a row with the error. Only the plain step stays in memory.

    Args:
        builders: {name: builder}, `PLAIN` first.
        known: rows that exist already; their steps are not measured again.
        args: main.py's flags.
        own: benchmark.py's flags.
        world: this process.
        product_seconds: see `step_measures`.
    """
    plain = None
    for name, build in builders.items():
        run, row = None, {}
        try:
            run = build()
            row["first_step_s"] = first_step_seconds(run, world.device)
            plain = run if name == PLAIN else plain
            if name not in known:
                row |= measured_row(run, plain, args, own, world.device, product_seconds)
        except Exception as error:
            traceback.print_exc()
            row["error"] = "out of memory" if isinstance(error, torch.OutOfMemoryError) else one_line(error)
        run = None
        release_memory(world.device)
        if name not in known:
            yield name, row


def first_step_seconds(run: training_steps.Run, device: torch.device) -> float:
    """Seconds of one step, which is compiled if it is the first."""
    start = now(device)
    run(1)
    return now(device) - start


def measured_row(run, plain, args: Namespace, own: Namespace, device: torch.device, product_seconds: float) -> dict:
    """`step_measures` of a step that has run before, and its time relative to the plain one, if there is one."""
    num_steps = own.steps or 1
    if own.steps is None and device.type == "cuda":
        num_steps = min(20, math.ceil(ROUND_SECONDS / first_step_seconds(run, device)))
    runs = {"this": run} if plain in (None, run) else {"plain": plain, "this": run}
    seconds = seconds_of_a_step(runs, own.rounds, num_steps, device)
    measures = step_measures(run, seconds["this"], args, device, product_seconds)
    return measures | {"to_plain": seconds["this"] / seconds.get("plain", seconds["this"]) if plain else None}


def release_memory(device: torch.device):
    """Return to the device the memory that nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# Kernels


def trace_kernels(own: Namespace, args: Namespace, earlier: dict, send: Send):
    """Trace the diversified step, and report the kernels that take most time; on a CPU the operators."""
    world = start(args)
    on_gpu = world.device.type == "cuda"
    flags = with_flags(args, **CONFIGURATIONS[world.device.type][0])
    run = training_steps.diversified(flags, world)
    run(2)
    now(world.device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        run(TRACED_STEPS)
        now(world.device)
    kernels = []
    for event in profiler.key_averages():
        if event.device_type == (DeviceType.CUDA if on_gpu else DeviceType.CPU) and not event.is_user_annotation:
            microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            kernels.append({
                "name": event.key,
                "ms": microseconds / 1000 / TRACED_STEPS,
                "calls": event.count / TRACED_STEPS,
            })  # fmt: skip
    total = sum(kernel["ms"] for kernel in kernels)
    kernels = sorted(kernels, key=lambda kernel: kernel["ms"], reverse=True)[:NUM_KERNELS]
    send({
        "model": flags.model,
        "batch_size": flags.batch_size,
        "ms_of_all": total,
        "kernels": [kernel | {"fraction": kernel["ms"] / total} for kernel in kernels],
    })  # fmt: skip


# The loader


def measure_loader(own: Namespace, args: Namespace, earlier: dict, send: Send):
    """Measure how many images per second one core and all loader processes read.

    This process never uses the GPU, so it can be forked.
    """
    quiet_warnings()
    size = LOADERS["cuda" if args.device.startswith("cuda") else "cpu"]
    flags, source = {"batch_size": size["batch_size"]}, args.data_path
    if not args.data_path:
        folder = scratch_folder(own.output) / "photographs"
        make_photographs(folder, size["photographs"], size["names"])
        flags |= {"data_set": "IMNET", "data_path": str(folder)}
        source = f"{size['photographs']} random JPEG images of 500 x 375 pixels, read again and again"
    workers = cpu_count() if args.num_workers is None else args.num_workers
    send({"source": source, "workers": workers, "batch_size": size["batch_size"]})
    options = options_of(DataOptions, with_flags(args, **flags))
    modes = {AS_IS: dataclasses.replace(options, **NONE), ALL: dataclasses.replace(options, **EVERY)}
    send({"images_per_s_of_a_core": images_per_core(modes, size["num_batches"], min(own.rounds, 3))})
    send({"images_per_s_of_all_workers": images_of_all_workers(modes[ALL], size["seconds"])})
