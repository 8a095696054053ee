"""`benchmark.py terms`: the time and the memory that every term adds to a training step."""

import functools
from argparse import Namespace

import torch

from diversity import REGULARIZERS, TAPS, DiversityObjective, TapOutput, TappedViT
from diversity.classification import MIXING
from engine import autocast, autocast_dtype
from reports.tables import print_rows
from training.build import build_initial, build_mixup, objective_settings, tap_settings
from utils import World

from . import training_steps
from .measure import interleave, peak_bytes
from .steps import only, seconds_of_a_step


def compare_terms(own: Namespace, args: Namespace, world: World) -> dict:
    """Every term alone: its time on a step's tensors, and the additional peak memory of a step with it."""
    plain, device, rounds = training_steps.plain(args, world), world.device, 5 * own.rounds
    plain_seconds = seconds_of_a_step({"": plain}, own.rounds, own.steps, device)[""]
    plain_bytes = peak_bytes(lambda: plain(1), device)
    model = build_initial(args, training_steps.NUM_CLASSES).to(device)
    with TappedViT(model).train() as tapped:
        taps = tap_seconds(tapped, args, world, rounds)
    print(f"plain step: {1000 * plain_seconds:.1f} ms, peak {plain_bytes / 2**20:.0f} MiB beyond weights and state\n")

    @functools.cache
    def bytes_with(*names):
        run = training_steps.diversified(only(args, names), world)
        return peak_bytes(lambda: run(1), device)

    names = own.terms or [MIXING, *REGULARIZERS]

    def rows():
        for name in names:
            # A term on the tokens' gradients needs mixing, without which only the class token has a gradient.
            base = [MIXING] if "tokens" in DiversityObjective({name: 1.0}).reads else []
            with_term, without = only(args, [*base, name]), only(args, base)
            objectives = [DiversityObjective(**objective_settings(flags)) for flags in (without, with_term)]
            for objective in objectives:
                objective.set_epoch(args.diversity_warmup)  # whose coefficients are the full ones
            reads, patch_logits = objectives[1].reads, objectives[1].patch_logits
            with TappedViT(model, reads, patch_logits, **tap_settings(with_term)).train() as tapped:
                seconds = term_seconds(tapped, objectives, with_term, world, rounds)
                reads = [*tapped.reads, *(["patch_logits"] if tapped.patch_logits and not base else [])]
            seconds += sum(taps.get(tap, 0) for tap in reads)
            peak = bytes_with(*base, name) - bytes_with(*base)
            yield {"ms": 1000 * seconds, "share": seconds / plain_seconds, "peak_mib": peak / 2**20}

    columns = {
        "ms": ("ms", "{:.1f}".format),
        "of the step": ("share", "{:.1%}".format),
        "peak memory, MiB": ("peak_mib", "{:.1f}".format),
    }
    terms = print_rows("term", [f"`{name}`" for name in names], rows(), columns)
    return {"plain_ms": 1000 * plain_seconds, "plain_peak_mib": plain_bytes / 2**20, "terms": terms}


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


def tap_seconds(tapped: TappedViT, args: Namespace, world: World, rounds: int) -> dict[str, float]:
    """{tap: seconds} of what the model computes only for a tap, forward and backward; without taps that cost nothing.

    These are the patch head, the stacks of weights and of circuits, and the difference between one block's attention
    with and without its maps, which fused attention does not compute.
    """
    model, backbone, device = tapped.model, tapped.backbone, world.device
    attn = model.blocks[0].attn
    num_tokens = model.num_prefix_tokens + model.patch_embed.num_patches
    tokens = torch.randn(args.batch_size, num_tokens, model.embed_dim, device=device).requires_grad_()

    def differentiate(function, *inputs):
        with autocast(device, autocast_dtype(args.amp, device)):
            values = function(*inputs)
        values = (values,) if torch.is_tensor(values) else values
        torch.autograd.backward(values, [torch.ones_like(value) for value in values])
        tapped.zero_grad()

    def attend(fused):
        attn.fused_attn = fused
        differentiate(attn, tokens)

    functions = {
        "maps": lambda: attend(False),
        "fused": lambda: attend(True),
        "patch_logits": lambda: differentiate(backbone.classify, backbone.patch_tokens(tokens)),
    }
    for name, tap in TAPS.items():
        if tap.from_weights:
            functions[name] = lambda tap=tap: differentiate(tap.from_weights, backbone, tapped.settings)
    seconds = interleave(functions, rounds, device)
    maps = seconds.pop("maps") - seconds.pop("fused")
    return seconds | dict.fromkeys(("attention", "attention_first", "attention_last"), maps)
