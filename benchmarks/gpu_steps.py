"""The part of the GPU report that measures training steps: a table for each model and batch size."""

import gc
import math
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator

import torch

from engine import autocast_dtype
from models.execution import set_backends
from utils import World, init_world, quiet_warnings

from . import training_steps
from .measure import matmul_flops_per_second, now
from .parts import one_line
from .steps import DIVERSIFIED, PLAIN, TEXTBOOK, flops_of_an_image, seconds_of_a_step, step_builders, step_measures
from .training_steps import with_flags

EAGER = "diversified, eager"
ROUND_SECONDS = 0.3  # of the steps of one kind in a round on a GPU
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


def start(args: Namespace) -> World:
    """Set up the process of a part as main.py does."""
    quiet_warnings()
    set_backends(args.fused_attn, args.tf32)
    return init_world(args.device)


def measure_steps(own: Namespace, args: Namespace, earlier: dict, send: Callable[[dict], None]):
    """Measure a table of training steps for each of `CONFIGURATIONS`; the steps with a single term come last."""
    world = start(args)
    rate = earlier["card"].get("matmul_flops_per_second") or matmul_flops_per_second(
        world.device, autocast_dtype(args.amp, world.device)
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
    """Measure one step after the other, in turns with the plain one, which comes first, and yield its name and row.

    A step that fails, for example for lack of memory, has a row with the error. Only the plain step stays in memory.
    Steps that have a row in `known` are not measured again.
    """
    plain = None
    for name, build in builders.items():
        run, row = None, {}
        try:
            run = build()
            row["first_step_s"] = seconds_of_one_step(run, world.device)
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


def measured_row(run, plain, args: Namespace, own: Namespace, device: torch.device, product_seconds: float) -> dict:
    """`step_measures` of a step that has run before, and its time relative to the plain one, if there is one."""
    num_steps = own.steps
    if num_steps is None and device.type == "cuda":
        num_steps = min(20, math.ceil(ROUND_SECONDS / seconds_of_one_step(run, device)))
    runs = {"this": run} if plain in (None, run) else {"plain": plain, "this": run}
    seconds = seconds_of_a_step(runs, own.rounds, num_steps, device)
    measures = step_measures(run, seconds["this"], args, device, product_seconds)
    return measures | {"to_plain": seconds["this"] / seconds.get("plain", seconds["this"]) if plain else None}


def seconds_of_one_step(run: training_steps.Run, device: torch.device) -> float:
    """Seconds of the next step, which is compiled if it is the first."""
    start = now(device)
    run(1)
    return now(device) - start


def release_memory(device: torch.device):
    """Return to the device the memory that nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
