"""`benchmark.py step`: the cost of a training step, of the diversified one with other flags, and with single terms."""

import gc
import traceback
from argparse import Namespace
from collections.abc import Callable, Collection

import torch

from engine import autocast_dtype
from reports.tables import print_rows
from training import arguments
from training.build import build_initial
from utils import World

from . import training_steps
from .measure import host_syncs, interleave, matmul_flops_per_second, now, peak_bytes, step_flops
from .training_steps import Run, with_flags

PLAIN, DIVERSIFIED, TEXTBOOK = "plain timm", "diversified", "textbook"
STEP_COLUMNS = {
    "ms": ("ms", "{:.1f}".format),
    "images/s": ("images_per_s", lambda speed: f"{speed:,.{0 if speed >= 100 else 1}f}"),
    "time / plain": ("to_plain", "{:.3f}".format),
    "peak memory, MiB": ("peak_mib", "{:,.0f}".format),
    "utilisation": ("utilisation", "{:.1%}".format),
    "host waits per step": ("host_syncs", "{:g}".format),
    "first step, s": ("first_step_s", "{:.1f}".format),
}
"""{heading: (key, format)} of the table of steps, see `measured_rows`."""


def compare_steps(own: Namespace, args: Namespace, world: World) -> dict:
    """The plain step, the diversified one, also with `own.variants` and with each of `own.terms` alone, the textbook's.

    A row is printed when it is measured, so that an interrupted benchmark shows what it has.
    """
    device, dtype = world.device, autocast_dtype(args.amp, world.device)
    rate, flops = matmul_flops_per_second(device, dtype), flops_of_an_image(args)
    precision = str(dtype or torch.float32).removeprefix("torch.")
    print(
        f"{args.model}, batch {args.batch_size}, {precision}, medians of {own.rounds} rounds\n"
        f"{flops / 1e9:.1f} GFLOP per image; a product of large matrices: {rate / 1e12:.3g} TFLOP/s\n"
    )
    builders = {PLAIN: lambda: training_steps.plain(args, world)}
    diversified = {DIVERSIFIED: args} | {f"{DIVERSIFIED}, {words}": flags for words, flags in own.variants.items()}
    diversified |= {f"only {name}": only(args, [name]) for name in terms_to_compare(args, own.terms)}
    for name, flags in diversified.items():
        builders[name] = lambda flags=flags: training_steps.diversified(flags, world)
    builders[TEXTBOOK] = lambda: training_steps.textbook(args, world)
    rows = measured_rows(builders, args.batch_size, flops / rate, own.rounds, own.steps, device)
    columns = {head: column for head, column in STEP_COLUMNS.items() if device.type == "cuda" or "host" not in head}
    steps = print_rows("step", [*builders], rows, columns)
    return {"flops_per_image": flops, "matmul_flops_per_second": rate, "steps": steps}


def terms_to_compare(args: Namespace, terms: Collection[str] | None) -> Collection[str]:
    """`terms`, or those that are on if it is None."""
    return [name for name, coef in arguments.coefficients(args).items() if coef] if terms is None else terms


def only(args: Namespace, names: Collection[str]) -> Namespace:
    """The flags with these terms alone, at their own coefficients, or 1 where they are off."""
    coefs = arguments.coefficients(args)
    return with_flags(args, **{f"{name}_coef": (coef or 1.0) * (name in names) for name, coef in coefs.items()})


def measured_rows(
    builders: dict[str, Callable[[], Run]], batch_size: int, product_seconds: float, rounds: int,
    num_steps: int | None, device: torch.device,
):  # fmt: skip
    """Measure one step after the other in turns with the first, the plain one; yields {key of `STEP_COLUMNS`: value}.

    A step that fails, for example for lack of memory, has a row with the error. Only the plain step stays in memory.

    Args:
        product_seconds: of the matrix products for one image at the speed of a product of large matrices.
    """
    plain = None
    for name, build in builders.items():
        run, row = None, {}
        try:
            run = build()
            start = now(device)
            run(1)
            row["first_step_s"] = now(device) - start
            plain = run if name == PLAIN else plain
            runs = {"this": run} if plain in (None, run) else {"plain": plain, "this": run}
            seconds = seconds_of_a_step(runs, rounds, num_steps, device)
            row |= {
                "ms": 1000 * seconds["this"],
                "images_per_s": batch_size / seconds["this"],
                "to_plain": seconds["this"] / seconds.get("plain", seconds["this"]) if plain else None,
                "peak_mib": peak_bytes(lambda run=run: run(1), device) / 2**20,
                "utilisation": batch_size * product_seconds / seconds["this"],
                "host_syncs": host_syncs(run, device),
            }
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            first_line = next(iter(str(error).splitlines()), "")
            row["error"] = "out of memory" if isinstance(error, torch.OutOfMemoryError) else first_line
        run = None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        yield row


def seconds_of_a_step(
    runs: dict[str, Run], rounds: int, num_steps: int | None, device: torch.device
) -> dict[str, float]:
    """Median seconds of a step of each run, over rounds of `num_steps` steps in turns; None = 10 on a GPU, else 1.

    On a GPU they are those of a step within an epoch: what the first one takes, before which the device has nothing to
    do, is measured too and subtracted.
    """
    num_steps = num_steps or (10 if device.type == "cuda" else 1)
    first = 1 if device.type == "cuda" else 0
    timed = {(name, first + num_steps): lambda run=run: run(first + num_steps) for name, run in runs.items()}
    if first:
        timed |= {(name, first): lambda run=run: run(first) for name, run in runs.items()}
    seconds = interleave(timed, rounds, device)
    return {name: (seconds[name, first + num_steps] - seconds.get((name, first), 0)) / num_steps for name in runs}


def flops_of_an_image(args: Namespace) -> int:
    """Floating-point operations of the model's matrix products in the forward and backward pass of an image."""
    image = torch.empty(1, 3, args.input_size, args.input_size)
    args = with_flags(args, patch_product=False, residual_dtype="float32")  # they ask for autocast, unknown on meta
    return step_flops(build_initial(args, training_steps.NUM_CLASSES), image)
