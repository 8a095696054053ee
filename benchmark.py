"""What the terms cost, side by side in one run.

    python benchmark.py step --model deit_small_patch16_224_diverse --batch-size 16
    python benchmark.py terms --model deit_small_patch16_224_diverse --batch-size 16

`step` times a plain timm training step against the diversified step of this project; `terms` every term alone, as its
share of the plain step, and the memory it adds. What is compared takes turns, A B A B ..., so that drift of the
machine's speed falls on both; medians are printed.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterable

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the memory profiler's own chatter

import timm
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from torch.profiler import ProfilerActivity, profile

import models  # noqa: F401  (registers the paper's models)
from diversity import PRESETS, REGULARIZERS, DiversityObjective, PatchMixup, TapOutput, TappedViT
from diversity.objective import MIXING
from engine import autocast, autocast_dtype
from parsing import KeyValues
from utils import keep_freed_memory

NUM_CLASSES = 1000


def plain_step(model_name: str, device: torch.device, dtype: torch.dtype | None) -> Callable:
    """A training step as any timm user writes it: stock model, Mixup, soft-target cross-entropy, AdamW."""
    model = timm.create_model(model_name).to(device).train()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-4, weight_decay=0.05)
    mixup, criterion = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=NUM_CLASSES), SoftTargetCrossEntropy()

    def step(samples, labels):
        samples, target = mixup(samples, labels)
        with autocast(device, dtype):
            loss = criterion(model(samples), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def diversified_step(
    model_name: str, device: torch.device, dtype: torch.dtype | None, coefs: dict, **settings
) -> Callable:
    """The same step with this project's objective."""
    model = timm.create_model(model_name).to(device)
    objective = DiversityObjective(coefs, smoothing=0.1, **settings)
    tapped = TappedViT(model, objective.reads, objective.patch_logits).train()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-4, weight_decay=0.05)
    mixup = PatchMixup(grid=tapped.grid)

    def step(samples, labels):
        samples, target = mixup(samples, labels)
        with autocast(device, dtype):
            loss, _ = objective(tapped(samples), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def batches(batch_size: int, device: torch.device) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """Random samples [B, 3, 224, 224] and labels [B], without end."""
    while True:
        yield (
            torch.randn(batch_size, 3, 224, 224, device=device),
            torch.randint(NUM_CLASSES, (batch_size,), device=device),
        )


def interleave(functions: dict[str, Callable], rounds: int, device: torch.device, inputs=None) -> dict[str, float]:
    """Median seconds of each function over `rounds` rounds in turns, after one warm-up round.

    Args:
        functions: {name: callable}, called with the next of `inputs` where there are some.
    """
    times = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, function in functions.items():
            arguments = next(inputs) if inputs else ()
            start = _now(device)
            function(*arguments)
            if turn:
                times[name].append(_now(device) - start)
    return {name: statistics.median(values) for name, values in times.items()}


def term_seconds(
    tapped: TappedViT, objectives: list[DiversityObjective], samples, labels, rounds: int, dtype: torch.dtype | None
) -> float:
    """Seconds that the second objective takes in a step, forward and backward, over the first.

    The backbone runs once, forward; the objectives are differentiated down to the tensors they read.
    """
    mixed, target = PatchMixup(grid=tapped.grid)(samples, labels)
    with autocast(samples.device, dtype):
        output = tapped(mixed)
    if output.tokens is None:  # else the logits have to stay a function of the tokens, through the head
        output = TapOutput(*(None if value is None else value.detach().requires_grad_() for value in output))
    read = [value for value in output if value is not None]

    def differentiate(objective):
        with autocast(samples.device, dtype):
            loss, _ = objective(output, target)
        torch.autograd.grad(loss, read, retain_graph=True, allow_unused=True)

    functions = {i: lambda objective=objective: differentiate(objective) for i, objective in enumerate(objectives)}
    median = interleave(functions, rounds, samples.device)
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


def peak_bytes(step: Callable, inputs: Iterable, device: torch.device) -> int:
    """Largest number of bytes that torch held during a step beyond what it held before."""
    samples, labels = next(inputs)
    step(samples, labels)  # gradients and optimizer state exist from now on
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step(samples, labels)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(samples, labels)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def compare_steps(args: argparse.Namespace, device: torch.device, dtype: torch.dtype | None):
    """Print the times of the plain and of the diversified step."""
    steps = {
        "plain timm": plain_step(args.model, device, dtype),
        "diversified": diversified_step(args.model, device, dtype, PRESETS["released"].coefs),
    }
    medians = interleave(steps, args.rounds, device, batches(args.batch_size, device))
    for name, seconds in medians.items():
        ratio = seconds / medians["plain timm"]
        print(f"{name:<14}{1000 * seconds:>10.1f} ms{args.batch_size / seconds:>10.1f} images/s  {ratio:.3f} x plain")


def compare_terms(args: argparse.Namespace, device: torch.device, dtype: torch.dtype | None):
    """Print a Markdown table of every term's time and memory beside the plain step's."""
    inputs = batches(args.batch_size, device)
    plain = plain_step(args.model, device, dtype)
    plain_seconds = interleave({"plain": plain}, args.rounds, device, inputs)["plain"]
    plain_bytes = peak_bytes(plain, inputs, device)
    model = timm.create_model(args.model).to(device)
    with TappedViT(model).train() as tapped:
        taps = tap_seconds(tapped, next(inputs)[0], 5 * args.rounds, dtype)
    print(f"plain step: {1000 * plain_seconds:.1f} ms, peak {plain_bytes / 2**20:.0f} MiB beyond weights and state")
    print("| term | added time, ms | share of the step | added peak memory, MiB |")
    print("|---|---|---|---|")
    for name in args.terms or (MIXING, *REGULARIZERS):
        options = REGULARIZERS[name].options if name in REGULARIZERS else ()
        settings = {option: value for option, value in args.settings.items() if option in options}
        # Without mixing only the class token has a gradient, and a term on the tokens' gradients has nothing to do.
        base = {MIXING: 1.0} if "tokens" in DiversityObjective({name: 1.0}).reads else {}
        with_term = DiversityObjective(base | {name: 1.0}, smoothing=0.1, **settings)
        with TappedViT(model, with_term.reads, with_term.patch_logits).train() as tapped:
            objectives = [DiversityObjective(base, smoothing=0.1), with_term]
            seconds = term_seconds(tapped, objectives, *next(inputs), 5 * args.rounds, dtype)
            reads = [*tapped.reads, *(["patch_logits"] if tapped.patch_logits and not base else [])]
        seconds += sum(taps.get(tap, 0) for tap in reads)
        held = peak_bytes(diversified_step(args.model, device, dtype, with_term.coefs, **settings), inputs, device)
        without = peak_bytes(diversified_step(args.model, device, dtype, base), inputs, device) if base else plain_bytes
        share, label = (
            seconds / plain_seconds,
            ", ".join([name, *(f"{key}={value}" for key, value in settings.items())]),
        )
        print(f"| {label} | {1000 * seconds:.1f} | {100 * share:.1f} % | {(held - without) / 2**20:.1f} |", flush=True)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def main(argv: list[str] | None = None):
    """Time what the command line names and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("step", "terms"))
    parser.add_argument("--model", default="deit_small_patch16_224_diverse", help="a 224 px timm vision transformer")
    parser.add_argument("--batch-size", type=int, default=16, help="images per step")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds after one warm-up")
    parser.add_argument("--terms", nargs="+", choices=(MIXING, *REGULARIZERS), metavar="TERM", help="only these")
    parser.add_argument("--settings", nargs="*", action=KeyValues, default={}, metavar="KEY=VALUE",
        help="of the terms that have them, e.g. cond_orth_steps=10")  # fmt: skip
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="as in main.py")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    dtype = autocast_dtype(args.amp, device)
    if device.type == "cpu":
        keep_freed_memory()  # as main.py does, for both steps
    print(f"{args.model}, batch {args.batch_size}, {device}, {dtype or 'float32'}, median of {args.rounds} in turns")
    {"step": compare_steps, "terms": compare_terms}[args.what](args, device, dtype)


if __name__ == "__main__":
    main()
