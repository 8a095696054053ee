"""`benchmark.py step`: the cost of a training step, and of the diversified one with each of its terms alone."""

from argparse import Namespace
from collections.abc import Callable, Collection

import torch

from engine import autocast_dtype
from reports.tables import rows_table
from training import arguments
from training.build import build_initial
from utils import World

from . import training_steps
from .measure import host_syncs, interleave, matmul_flops_per_second, peak_bytes, step_flops
from .training_steps import Run, with_flags

PLAIN, DIVERSIFIED, TEXTBOOK = "plain timm", "diversified", "textbook"
STEP_COLUMNS = {
    "ms": ("ms", "{:.1f}".format),
    "images/s": ("images_per_s", lambda speed: f"{speed:,.{0 if speed >= 100 else 1}f}"),
    "to plain": ("to_plain", "{:.3f}".format),
    "textbook to it": ("textbook_to_it", "{:.2f}".format),
    "peak memory, MiB": ("peak_mib", "{:,.0f}".format),
    "utilisation": ("utilisation", "{:.1%}".format),
    "host waits a step": ("host_syncs", "{:g}".format),
    "first step, s": ("first_step_s", "{:.1f}".format),
    "note": ("error", str),
}
"""{heading: (key, format)} of a table of steps, see `step_measures`."""


def compare_steps(own: Namespace, args: Namespace, world: World) -> dict:
    """The plain, the diversified and the textbook step, and the diversified one with each of its terms alone."""
    runs = {name: build() for name, build in step_builders(args, world, own.terms).items()}
    device, dtype = world.device, autocast_dtype(args.amp, world.device)
    seconds = seconds_of_a_step(runs, own.rounds, own.steps, device)
    flops = flops_of_an_image(args)
    rate = matmul_flops_per_second(device, dtype)
    steps = {}
    for name, run in runs.items():
        ratios = {"to_plain": seconds[name] / seconds[PLAIN], "textbook_to_it": seconds[TEXTBOOK] / seconds[name]}
        steps[name] = step_measures(run, seconds[name], args, device, flops / rate) | ratios
    precision = str(dtype or torch.float32).removeprefix("torch.")
    print(
        f"{args.model}, batch {args.batch_size}, {precision}, medians of {own.rounds} rounds\n"
        f"{flops / 1e9:.1f} GFLOP an image; a product of large matrices: {rate / 1e12:.3g} TFLOP/s"
    )
    print(rows_table("step", steps, STEP_COLUMNS))
    return {"flops_per_image": flops, "matmul_flops_per_second": rate, "steps": steps}


def step_builders(args: Namespace, world: World, terms: Collection[str] | None = None) -> dict[str, Callable[[], Run]]:
    """{name: builder} of the training steps to compare; `terms`: see `terms_to_compare`."""
    alone = {f"only {name}": only(args, [name]) for name in terms_to_compare(args, terms)}
    return {
        PLAIN: lambda: training_steps.plain(args, world),
        DIVERSIFIED: lambda: training_steps.diversified(args, world),
        **{name: lambda flags=flags: training_steps.diversified(flags, world) for name, flags in alone.items()},
        TEXTBOOK: lambda: training_steps.textbook(args, world),
    }


def terms_to_compare(args: Namespace, terms: Collection[str] | None) -> Collection[str]:
    """`terms`, or those that are on if it is None."""
    return [name for name, coef in arguments.coefficients(args).items() if coef] if terms is None else terms


def only(args: Namespace, names: Collection[str]) -> Namespace:
    """The flags with these terms alone, at their own coefficients, or 1 where they are off."""
    coefs = arguments.coefficients(args)
    return with_flags(args, **{f"{name}_coef": (coef or 1.0) * (name in names) for name, coef in coefs.items()})


def seconds_of_a_step(
    runs: dict[str, Run], rounds: int, num_steps: int | None, device: torch.device
) -> dict[str, float]:
    """Median seconds of a step of each run, over rounds of `num_steps` steps in turns; None = 20 on a GPU, else 1."""
    num_steps = num_steps or (20 if device.type == "cuda" else 1)
    timed = {name: lambda run=run: run(num_steps) for name, run in runs.items()}
    return {name: seconds / num_steps for name, seconds in interleave(timed, rounds, device).items()}


def step_measures(
    run: Run, seconds: float, args: Namespace, device: torch.device, product_seconds: float
) -> dict[str, float | None]:
    """The row of a training step of `seconds` in a table; {key of `STEP_COLUMNS`: value}.

    `product_seconds` is the time of the matrix products for one image at the speed of a product of large matrices.
    """
    return {
        "ms": 1000 * seconds,
        "images_per_s": args.batch_size / seconds,
        "peak_mib": peak_bytes(lambda: run(1), device) / 2**20,
        "utilisation": args.batch_size * product_seconds / seconds,
        "host_syncs": host_syncs(run, device),
    }


def flops_of_an_image(args: Namespace) -> int:
    """Floating-point operations of the model's matrix products in the forward and backward pass of an image."""
    image = torch.empty(1, 3, args.input_size, args.input_size)
    args = with_flags(args, patch_product=False, residual_dtype="float32")  # they ask for autocast, unknown on meta
    return step_flops(build_initial(args, training_steps.NUM_CLASSES), image)
