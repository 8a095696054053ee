"""Step times side by side in one run: a plain timm training step against the diversified step of this project.

    python benchmark.py step --model deit_small_patch16_224_diverse --batch-size 16

The two take turns, A B A B ..., so that drift of the machine's speed falls on both; medians and the ratio are printed.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import timm
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2

import models  # noqa: F401  (registers the paper's models)
from diversity import REGULARIZERS, DiversityObjective, PatchMixup, TappedViT
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
    mixup = PatchMixup(grid=model.patch_embed.grid_size)

    def step(samples, labels):
        samples, target = mixup(samples, labels)
        with autocast(device, dtype):
            loss, _ = objective(tapped(samples), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def interleave(steps: dict[str, Callable], batch_size: int, device: torch.device, rounds: int) -> dict[str, float]:
    """Median seconds of each step over `rounds` rounds in turns, after one warm-up round.

    Args:
        steps: {name: callable (samples [B, 3, 224, 224], labels [B])}.
    """
    times = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            samples = torch.randn(batch_size, 3, 224, 224, device=device)
            labels = torch.randint(NUM_CLASSES, (batch_size,), device=device)
            start = _now(device)
            step(samples, labels)
            if turn:
                times[name].append(_now(device) - start)
    return {name: statistics.median(values) for name, values in times.items()}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def main(argv: list[str] | None = None):
    """Time the steps that the command line names and print their medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("step",))
    parser.add_argument("--model", default="deit_small_patch16_224_diverse", help="a 224 px timm vision transformer")
    parser.add_argument("--batch-size", type=int, default=16, help="images per step")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds after one warm-up")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="as in main.py")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    dtype = autocast_dtype(args.amp, device)
    if device.type == "cpu":
        keep_freed_memory()  # as main.py does, for both steps
    coefs = {"mixing": 1.0} | {name: term.coef for name, term in REGULARIZERS.items()}
    steps = {
        "plain timm": plain_step(args.model, device, dtype),
        "diversified": diversified_step(args.model, device, dtype, coefs),
    }
    medians = interleave(steps, args.batch_size, device, args.rounds)
    print(f"{args.model}, batch {args.batch_size}, {device}, {dtype or 'float32'}, median of {args.rounds} in turns")
    for name, seconds in medians.items():
        ratio = seconds / medians["plain timm"]
        print(f"{name:<14}{1000 * seconds:>10.1f} ms{args.batch_size / seconds:>10.1f} images/s  {ratio:.3f} x plain")


if __name__ == "__main__":
    main()
