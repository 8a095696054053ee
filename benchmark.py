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
from diversity import PRESETS, REGULARIZERS, DiversityObjective, PatchMixup, TappedViT
from diversity.objective import MIXING
from engine import autocast, autocast_dtype
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


def diversified_step(model_name: str, device: torch.device, dtype: torch.dtype | None, coefs: dict) -> Callable:
    """The same step with this project's objective."""
    model = timm.create_model(model_name).to(device)
    objective = DiversityObjective(coefs, smoothing=0.1)
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
    model_name: str, name: str, batch_size: int, rounds: int, device: torch.device, dtype: torch.dtype | None
) -> float:
    """Seconds that one term adds to a step, forward and backward: on the tensors it reads, and to have them read.

    The backbone runs once. What is timed is the objective, differentiated down to the tapped tensors, with the term and
    without; beside it the parts of the model that run differently for the term's sake.
    """
    torch.manual_seed(0)
    model = timm.create_model(model_name).to(device)
    objectives = {
        "with": DiversityObjective({name: 1.0}, smoothing=0.1),
        "without": DiversityObjective({}, smoothing=0.1),
    }
    tapped = TappedViT(model, objectives["with"].reads, objectives["with"].patch_logits).train()
    samples, target = PatchMixup(grid=tapped.grid)(*next(batches(batch_size, device)))
    with autocast(device, dtype):
        output = tapped(samples)
    leaves = [value for value in output if value is not None]

    def differentiate(objective):
        with autocast(device, dtype):
            loss, _ = objective(output, target)
        torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)

    functions = {key: lambda objective=objective: differentiate(objective) for key, objective in objectives.items()}
    functions |= _tap_parts(tapped, output, samples, device, dtype)
    median = interleave(functions, rounds, device)
    seconds = median["with"] - median["without"] + median.get("weights", 0) + median.get("head", 0)
    if "maps" in median:
        blocks = {source for sources in tapped._sources.values() for source in sources if source[0] == "maps"}
        seconds += len(blocks) * (median["maps"] - median["fused"])
    return seconds


def _tap_parts(tapped, output, samples, device, dtype) -> dict[str, Callable]:
    """Forward and backward of the parts that run for a tap alone, and of fused attention where it is given up."""

    def differentiate(function, *inputs):
        with autocast(device, dtype):
            value = function(*inputs)
        torch.autograd.backward(value, torch.ones_like(value))
        tapped.zero_grad()

    model, parts = tapped.model, {}
    attn, tokens = model.blocks[0].attn, torch.randn(len(samples), 1 + tapped.grid[0] * tapped.grid[1], model.embed_dim)
    tokens = tokens.to(device).requires_grad_()

    def attend(fused):
        before, attn.fused_attn = attn.fused_attn, fused
        differentiate(attn, tokens)
        attn.fused_attn = before

    if output.weights is not None:
        parts["weights"] = lambda: differentiate(lambda: torch.cat(tapped.backbone.weight_stacks(tapped.weight_groups)))
    if output.patch_logits is not None:
        parts["head"] = lambda: differentiate(tapped.backbone.classify, tapped.backbone.patch_tokens(tokens))
    if output.attention is not None or output.attention_first is not None:
        parts |= {"maps": lambda: attend(False), "fused": lambda: attend(True)}
    return parts


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
    print(f"plain step: {1000 * plain_seconds:.1f} ms, peak {plain_bytes / 2**20:.0f} MiB beyond weights and state")
    print("| term | added time, ms | share of the step | added peak memory, MiB |")
    print("|---|---|---|---|")
    for name in args.terms or (MIXING, *REGULARIZERS):
        seconds = term_seconds(args.model, name, args.batch_size, args.rounds, device, dtype)
        added = peak_bytes(diversified_step(args.model, device, dtype, {name: 1.0}), inputs, device) - plain_bytes
        share = seconds / plain_seconds
        print(f"| {name} | {1000 * seconds:.1f} | {100 * share:.1f} % | {added / 2**20:.1f} |", flush=True)


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
