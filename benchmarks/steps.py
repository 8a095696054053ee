"""`benchmark.py step` and `benchmark.py terms`: the cost of a training step, and of every term in it."""

import functools
from argparse import Namespace
from collections.abc import Callable, Collection

import torch
from tqdm import tqdm

from diversity import REGULARIZERS, DiversityObjective, TapOutput, TappedViT
from diversity.objective import MIXING
from engine import autocast, autocast_dtype
from reports.tables import rows_table
from training import arguments
from training.build import build_initial, build_mixup, objective_settings, tap_settings
from utils import World

from . import training_steps
from .measure import host_syncs, interleave, matmul_flops_per_second, peak_bytes, step_flops

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
    """The plain, the diversified and the textbook step, and the diversified one with each of its terms alone.

    Args:
        own: `rounds`, `steps` of a round, `terms` to time alone (None = those that are on).
        args: main.py's flags.
    """
    runs = {name: build() for name, build in step_builders(args, world, own.terms).items()}
    device, dtype = world.device, autocast_dtype(args.amp, world.device)
    seconds = seconds_of_a_step(runs, own.rounds, own.steps or default_steps(device), device)
    flops = flops_of_an_image(args)
    most = matmul_flops_per_second(device, dtype, own.rounds)
    steps = {}
    for name, run in runs.items():
        ratios = {"to_plain": seconds[name] / seconds[PLAIN], "textbook_to_it": seconds[TEXTBOOK] / seconds[name]}
        steps[name] = step_measures(run, seconds[name], args, device, flops / most) | ratios
    precision = str(dtype or torch.float32).removeprefix("torch.")
    print(
        f"{args.model}, batch {args.batch_size}, {precision}, medians of {own.rounds} rounds\n"
        f"{flops / 1e9:.1f} GFLOP an image; a product of large matrices: {most / 1e12:.3g} TFLOP/s"
    )
    print(rows_table("step", steps, STEP_COLUMNS))
    return {"flops_per_image": flops, "matmul_flops_per_second": most, "steps": steps}


def step_builders(
    args: Namespace, world: World, terms: Collection[str] | None = None
) -> dict[str, Callable[[], training_steps.Run]]:
    """{name: builder} of the training steps to compare.

    Args:
        terms: those to build a step with alone; None = those that are on.
    """
    terms = terms_to_compare(args, terms)
    return {
        PLAIN: lambda: training_steps.plain(args, world),
        DIVERSIFIED: lambda: training_steps.diversified(args, world),
        **{f"only {name}": lambda name=name: training_steps.diversified(only(args, [name]), world) for name in terms},
        TEXTBOOK: lambda: training_steps.textbook(args, world),
    }


def terms_to_compare(args: Namespace, terms: Collection[str] | None) -> Collection[str]:
    """`terms`, or those that are on if it is None."""
    if terms is None:
        return [name for name, coef in arguments.coefficients(args).items() if coef]
    return terms


def step_measures(
    run: training_steps.Run, seconds: float, args: Namespace, device: torch.device, product_seconds: float
) -> dict[str, float | None]:
    """The row of a training step in a table.

    Args:
        run: takes training steps.
        seconds: time of a step.
        args: main.py's flags.
        device: that it runs on.
        product_seconds: time of the matrix products for one image at the speed of a product of large matrices.

    Returns:
        ms, images_per_s, peak_mib (beyond weights, average and state), utilisation (fraction of the speed of a product
        of large matrices), and host_syncs (waits of the host for the GPU in a step, None on a CPU).
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
    return step_flops(build_initial(args, training_steps.NUM_CLASSES), image)


def compare_terms(own: Namespace, args: Namespace, world: World) -> dict:
    """Every term alone: its time on a step's tensors, and the additional peak memory of a step with it."""
    plain, device = training_steps.plain(args, world), world.device
    num_steps = own.steps or default_steps(device)
    plain_seconds = seconds_of_a_step({PLAIN: plain}, own.rounds, num_steps, device)[PLAIN]
    plain_bytes = peak_bytes(lambda: plain(1), device)
    model = build_initial(args, training_steps.NUM_CLASSES).to(device)
    dtype = autocast_dtype(args.amp, device)
    with TappedViT(model).train() as tapped:
        taps = tap_seconds(tapped, training_steps.random_batch(args, device)[0], 5 * own.rounds, dtype)
    print(f"plain step: {1000 * plain_seconds:.1f} ms, peak {plain_bytes / 2**20:.0f} MiB beyond weights and state")
    bytes_with = functools.cache(lambda *names: step_bytes(only(args, names), world))
    results = {}
    for name in tqdm(own.terms or (MIXING, *REGULARIZERS), desc="terms", leave=False, disable=None):
        # A term on the tokens' gradients needs mixing, without which only the class token has a gradient.
        base = [MIXING] if "tokens" in DiversityObjective({name: 1.0}).reads else []
        with_term, without = only(args, [*base, name]), only(args, base)
        objectives = [DiversityObjective(**objective_settings(flags)) for flags in (without, with_term)]
        reads, patch_logits = objectives[1].reads, objectives[1].patch_logits
        with TappedViT(model, reads, patch_logits, **tap_settings(with_term)).train() as tapped:
            seconds = term_seconds(tapped, objectives, with_term, world, 5 * own.rounds)
            reads = [*tapped.reads, *(["patch_logits"] if tapped.patch_logits and not base else [])]
        seconds += sum(taps.get(tap, 0) for tap in reads)
        results[name] = {
            "ms": 1000 * seconds,
            "share": seconds / plain_seconds,
            "peak_mib": (step_bytes(with_term, world) - bytes_with(*base)) / 2**20,
        }
    columns = {
        "ms": ("ms", "{:.1f}".format),
        "of the step": ("share", "{:.1%}".format),
        "peak memory, MiB": ("peak_mib", "{:.1f}".format),
    }
    print(rows_table("term", {f"`{name}`": result for name, result in results.items()}, columns))
    return {"plain_ms": 1000 * plain_seconds, "plain_peak_mib": plain_bytes / 2**20, "terms": results}


def default_steps(device: torch.device) -> int:
    """Training steps of a round."""
    return 20 if device.type == "cuda" else 1


def seconds_of_a_step(
    runs: dict[str, training_steps.Run], rounds: int, num_steps: int, device: torch.device
) -> dict[str, float]:
    """Median seconds of a step of each run, over rounds of `num_steps` steps in turns."""
    timed = {name: lambda run=run: run(num_steps) for name, run in runs.items()}
    return {name: seconds / num_steps for name, seconds in interleave(timed, rounds, device).items()}


def only(args: Namespace, names: Collection[str]) -> Namespace:
    """The flags with these terms alone, at their own coefficients, or 1 where they are off."""
    coefs = {f"{name}_coef": coef or 1.0 for name, coef in arguments.coefficients(args).items()}
    off = {flag: coef if flag.removesuffix("_coef") in names else 0.0 for flag, coef in coefs.items()}
    return Namespace(**vars(args) | off)


def term_seconds(
    tapped: TappedViT, objectives: list[DiversityObjective], args: Namespace, world: World, rounds: int
) -> float:
    """Additional seconds of the second objective in a step, forward and backward, compared with the first.

    The backbone runs once, forward; the objectives are differentiated with respect to the tensors that they read.
    """
    device, dtype = world.device, autocast_dtype(args.amp, world.device)
    mixed, target = build_mixup(args, tapped.grid)(*training_steps.random_batch(args, device))
    with autocast(device, dtype):
        output = tapped(mixed)
    if output.tokens is None:  # a term that reads `tokens` differentiates the logits with respect to them
        output = TapOutput(*(None if value is None else value.detach().requires_grad_() for value in output))
    read = [value for value in output if value is not None]

    def differentiate(objective):
        with autocast(device, dtype):
            loss, _ = objective(output, target)
        torch.autograd.grad(loss, read, retain_graph=True, allow_unused=True)

    functions = {i: lambda objective=objective: differentiate(objective) for i, objective in enumerate(objectives)}
    median = interleave(functions, rounds, device)
    return median[1] - median[0]


def tap_seconds(tapped: TappedViT, samples: torch.Tensor, rounds: int, dtype: torch.dtype | None) -> dict[str, float]:
    """{tap: seconds} of what the model computes only for a tap, forward and backward; without taps that cost nothing.

    These are the patch head, the stack of weights, and the difference between one block's attention with and without
    its maps, which fused attention does not compute.
    """
    model, device = tapped.model, samples.device
    attn = model.blocks[0].attn
    tokens = torch.randn(len(samples), model.num_prefix_tokens + model.patch_embed.num_patches, model.embed_dim)
    tokens = tokens.to(device).requires_grad_()

    def differentiate(function, *inputs):
        with autocast(device, dtype):
            value = function(*inputs)
        value.backward(torch.ones_like(value))
        tapped.zero_grad()

    def attend(fused):
        attn.fused_attn = fused
        differentiate(attn, tokens)

    median = interleave(
        {
            "maps": lambda: attend(False),
            "fused": lambda: attend(True),
            "weights": lambda: differentiate(lambda: tapped.backbone.weight_stacks(tapped.settings.weight_groups)[0]),
            "head": lambda: differentiate(tapped.backbone.classify, tapped.backbone.patch_tokens(tokens)),
        },
        rounds,
        device,
    )
    maps = median["maps"] - median["fused"]
    return {
        "attention": maps,
        "attention_first": maps,
        "attention_last": maps,
        "weights": median["weights"],
        "patch_logits": median["head"],
    }


def step_bytes(args: Namespace, world: World) -> int:
    """`peak_bytes` of a diversified step."""
    run = training_steps.diversified(args, world)
    return peak_bytes(lambda: run(1), world.device)
