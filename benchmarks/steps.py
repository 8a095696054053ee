"""`benchmark.py step` and `benchmark.py terms`: the cost of a training step, whole and term by term."""

import functools
from argparse import Namespace
from collections.abc import Callable, Collection

import torch
from tqdm import tqdm

from diversity import REGULARIZERS, DiversityObjective, TapOutput, TappedViT
from diversity.objective import MIXING
from engine import autocast, autocast_dtype
from reports.tables import markdown_table
from training import arguments
from training.build import build_initial, build_mixup, objective_settings, tap_settings
from utils import World

from . import training_steps
from .measure import host_syncs, interleave, matmul_flops_per_second, peak_bytes, step_flops

PLAIN, DIVERSIFIED, TEXTBOOK = "plain timm", "diversified", "textbook"


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
    columns = {
        "step": [*steps],
        "ms": [f"{step['ms']:.1f}" for step in steps.values()],
        "images/s": [f"{step['images_per_s']:.1f}" for step in steps.values()],
        "to plain": [f"{step['to_plain']:.3f}" for step in steps.values()],
        "textbook to it": [f"{step['textbook_to_it']:.2f}" for step in steps.values()],
        "peak memory, MiB": [f"{step['peak_mib']:.0f}" for step in steps.values()],
        "utilisation": [f"{100 * step['utilisation']:.0f} %" for step in steps.values()],
        "host syncs a step": [
            "" if step["host_syncs"] is None else f"{step['host_syncs']:g}" for step in steps.values()
        ],
    }
    print(markdown_table(columns))
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
    """The terms that were chosen, or, where that is None, those that are on."""
    if terms is None:
        return [name for name, coef in arguments.coefficients(args).items() if coef]
    return terms


def step_measures(
    run: training_steps.Run, seconds: float, args: Namespace, device: torch.device, product_seconds: float
) -> dict[str, float | None]:
    """What a row of a table says of a training step.

    Args:
        seconds: that it takes.
        product_seconds: that the matrix products for one image take at the speed of a product of large matrices.

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
    """Every term alone: its time on a step's tensors, and the peak memory that a step with it needs more."""
    plain, device = training_steps.plain(args, world), world.device
    num_steps = own.steps or default_steps(device)
    plain_seconds = seconds_of_a_step({PLAIN: plain}, own.rounds, num_steps, device)[PLAIN]
    plain_bytes = peak_bytes(lambda: plain(1), device)
    model = build_initial(args, training_steps.NUM_CLASSES).to(device)
    dtype = autocast_dtype(args.amp, device)
    with TappedViT(model).train() as tapped:
        taps = tap_seconds(tapped, training_steps.random_batch(args, device)[0], 5 * own.rounds, dtype)
    print(f"plain step: {1000 * plain_seconds:.1f} ms, peak {plain_bytes / 2**20:.0f} MiB beyond weights and state")
    held_with = functools.cache(lambda *names: step_bytes(only(args, names), world))
    results = {}
    for name in tqdm(own.terms or (MIXING, *REGULARIZERS), desc="terms", leave=False, disable=None):
        # Without mixing only the class token has a gradient, and a term on the tokens' gradients has nothing to do.
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
            "peak_mib": (step_bytes(with_term, world) - held_with(*base)) / 2**20,
        }
    columns = {
        "term": [f"`{name}`" for name in results],
        "ms": [f"{result['ms']:.1f}" for result in results.values()],
        "share of the step": [f"{100 * result['share']:.1f} %" for result in results.values()],
        "peak memory, MiB": [f"{result['peak_mib']:.1f}" for result in results.values()],
    }
    print(markdown_table(columns))
    return {"plain_ms": 1000 * plain_seconds, "plain_peak_mib": plain_bytes / 2**20, "terms": results}


def default_steps(device: torch.device) -> int:
    """Training steps of a round."""
    return 20 if device.type == "cuda" else 1


def seconds_of_a_step(
    runs: dict[str, training_steps.Run], rounds: int, num_steps: int, device: torch.device
) -> dict[str, float]:
    """Median seconds of a step of each run over rounds of `num_steps` steps, taking turns."""
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
    """Seconds that the second objective takes in a step, forward and backward, over the first.

    The backbone runs once, forward; the objectives are differentiated down to the tensors they read.
    """
    device, dtype = world.device, autocast_dtype(args.amp, world.device)
    mixed, target = build_mixup(args, tapped.grid)(*training_steps.random_batch(args, device))
    with autocast(device, dtype):
        output = tapped(mixed)
    if output.tokens is None:  # else the logits have to stay a function of the tokens, through the head
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
    """{tap: seconds} of what the model does for a tap alone, forward and backward; taps that cost nothing are left out.

    The patch head, the stack of weights, and one block's attention with its map over the same block's fused attention.
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
            "weights": lambda: differentiate(lambda: tapped.backbone.weight_stacks(tapped.weight_groups)[0]),
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
