"""`benchmark.py gpu`: a report of a machine with a GPU, and two of its parts, `card` and `kernels`."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Collection
from operator import attrgetter
from pathlib import Path
from typing import IO, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import profile

from engine import autocast_dtype
from reports.tables import markdown_table
from utils import World

from . import training_steps
from .measure import copy_bytes_per_second, matmul_flops_per_second, now

REPOSITORY = Path(__file__).parents[1]
NUM_KERNELS, TRACED_STEPS, KERNEL_NAME = 10, 3, 90  # the last is the largest number of characters
TESTS = [
    str(REPOSITORY / "tests" / "test_cuda.py"),
    str(REPOSITORY / "tests" / "test_cuda_cached.py"),
    str(REPOSITORY / "tests" / "test_cuda_evaluation.py"),
    str(REPOSITORY / "tests" / "pipeline"),
    "-m",
    "cuda",
    "-p",
    "no:cacheprovider",
    "-q",
    "-rs",
    "--durations=3",
]


class Part(NamedTuple):
    """A command, and its fraction of the time, to which what earlier parts have left is added."""

    words: list[str]
    fraction: float


def parts(own: Namespace, device: torch.device) -> list[Part]:
    """The commands of the report, the most important ones first; tiny ones on a CPU."""
    small, base = ["--model", "deit_small_patch16_224_diverse"], ["--model", "deit_base_patch16_224_diverse"]
    tiny = ["--model", "deit_tiny_patch16_224_diverse", "--input-size", "32", "--patch-size", "4"]
    narrow = ["--config", str(REPOSITORY / "recipes" / "slvit.yaml")]
    if device.type != "cuda":
        small = base = tiny = narrow = [*tiny, "--model-kwargs", "depth=2", "embed_dim=24", "num_heads=3"]
    large, middle, few = map(str, (1024, 256, 128) if device.type == "cuda" else (8, 4, 2))
    common = ["--device", str(device), "--rounds", str(own.rounds)]
    flags = ["--variant=--no-compile", "--variant=--patch-product", "--variant=--residual-dtype bfloat16 --amp bf16"]
    graphs = "--compile-mode reduce-overhead"
    modes = ["--terms", f"--variant={graphs}", "--variant=--preset none", f"--variant=--preset none {graphs}"]
    return [
        Part(["card", *common], 0.05),
        Part(["cached", *common, *tiny, "--batch-size", large], 0.1),
        Part(["step", *common, *narrow, "--batch-size", few, *modes], 0.18),
        Part(["host", *common, *narrow, "--batch-size", few, *graphs.split()], 0.05),
        Part(["pytest", *TESTS], 0.2),
        Part(["step", *common, *small, "--batch-size", large, "--terms", *flags[:1]], 0.2),
        Part(["kernels", *common, *small, "--batch-size", large], 0.05),
        Part(["step", *common, *small, "--batch-size", few, "--terms", *flags[:1]], 0.05),
        Part(["loader", *common, "--batch-size", few, "--steps", "2"], 0.05),
        Part(["step", *common, *base, "--batch-size", middle, "--terms"], 0.03),
        Part(["step", *common, *small, "--batch-size", large, *flags[1:]], 0.02),
        Part(["remedies", *common, *small, "--batch-size", middle, "--no-compile"], 0.02),
    ]


def write_report(own: Namespace, args: Namespace, world: World):
    """Run the parts one after the other, and write what they print to gpu.md; so an interrupted report has it too.

    Raises:
        SystemExit: the folder cannot be written.
    """
    folder = Path(own.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        report, log = open(folder / "gpu.md", "w"), open(folder / "gpu.log", "w")  # noqa: SIM115
    except OSError as error:
        raise SystemExit(f"error: --output {folder} cannot be written: {error.strerror}") from None
    stops = []  # an exception instead could be raised while a part starts, which would then stay
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stops.append(signal.Signals(number).name))
    start, fraction = time.monotonic(), 0.0
    with report, log:
        name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "a CPU"
        report.write(f"# Benchmark of {name}\n\n" + "".join(f"- {line}\n" for line in own.environment))
        report.write(f"- `python benchmark.py {' '.join(sys.argv[1:])}`, limit {own.minutes:g} minutes\n")
        for number, (words, share) in enumerate(parts(own, world.device)):
            fraction += share
            begin = time.monotonic()
            report.write(f"\n## `{' '.join(words)}`\n\n")
            if words[0] == "pytest":
                command = ["-m", *words]
            else:
                command = [
                    str(REPOSITORY / "benchmark.py"),
                    *words,
                    "--json",
                    str(folder / f"{number}_{words[0]}.json"),
                ]
            state = run_part(command, report, log, start + 60 * own.minutes * fraction - begin, stops)
            line = f"{words[0]}: {state}, after {time.monotonic() - begin:.0f} s"
            report.write(f"\n{line}\n")
            print(line, flush=True)
            if stops:
                raise SystemExit(f"error: stopped by {stops[0]}; {folder / 'gpu.md'} has what was measured")
    print(f"written: {folder / 'gpu.md'}; messages of the parts: {folder / 'gpu.log'}")


def run_part(command: list[str], report: IO[str], log: IO[str], limit: float, stops: Collection[str] = ()) -> str:
    """Run a Python program with its output in the report for at most `limit` seconds, or until there are `stops`.

    Returns how it ended. Processes that it has started end with it.
    """
    report.flush()
    # Plugins of other packages may fail, or write elsewhere.
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    options = {"stdout": report, "stderr": log, "env": environment, "start_new_session": True}
    process = subprocess.Popen([sys.executable, *command], **options)
    end = time.monotonic() + max(1, limit)
    while (code := process.poll()) is None and time.monotonic() < end and not stops:
        time.sleep(0.1)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    report.seek(0, os.SEEK_END)
    if code is None:
        return f"stopped by {stops[0]}" if stops else f"stopped at its time limit of {limit:.0f} s"
    return "finished" if code == 0 else f"failed with exit code {code}; gpu.log has its messages"


def describe_card(own: Namespace, args: Namespace, world: World) -> dict:
    """The device, how fast it copies its memory, and how fast it multiplies matrices."""
    device, dtype = world.device, autocast_dtype(args.amp, world.device)
    rows = {}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        rows = {
            "memory, GiB": f"{card.total_memory / 2**30:.1f}",
            "multiprocessors": str(card.multi_processor_count),
            "CUDA version of torch": torch.version.cuda,
        }
    copied, product = copy_bytes_per_second(device), matmul_flops_per_second(device, dtype)
    rows["copy within its memory, read + written, GB/s"] = f"{copied / 1e9:,.0f}"
    precision = str(dtype or torch.float32).removeprefix("torch.")
    rows[f"product of large {precision} matrices, TFLOP/s"] = f"{product / 1e12:.3g}"
    print(markdown_table({"property": [*rows], "value": [*rows.values()]}))
    return {"copy_bytes_per_second": copied, "matmul_flops_per_second": product}


def trace_kernels(own: Namespace, args: Namespace, world: World) -> dict:
    """The kernels that take most time of a diversified step; on a CPU the operators."""
    is_cuda = world.device.type == "cuda"
    run = training_steps.diversified(args, world)
    run(2)
    now(world.device)
    with profile() as profiler:
        run(TRACED_STEPS)
        now(world.device)
    kind, time_of = DeviceType.CPU, attrgetter("self_cpu_time_total")
    if is_cuda:
        kind, time_of = DeviceType.CUDA, attrgetter("self_device_time_total")
    events = [e for e in profiler.key_averages() if e.device_type == kind and not e.is_user_annotation]
    events.sort(key=time_of, reverse=True)
    total = sum(map(time_of, events))
    kinds, events = "kernels" if is_cuda else "operators", events[:NUM_KERNELS]
    print(f"{args.model}, batch {args.batch_size}: all {kinds} take {total / 1000 / TRACED_STEPS:.1f} ms per step\n")
    columns = {
        kinds: [f"`{event.key[:KERNEL_NAME]}`" for event in events],
        "ms per step": [f"{time_of(event) / 1000 / TRACED_STEPS:.2f}" for event in events],
        "of all": [f"{time_of(event) / total:.1%}" for event in events],
        "calls per step": [f"{event.count / TRACED_STEPS:.4g}" for event in events],
    }
    print(markdown_table(columns))
    return {"ms": total / 1000 / TRACED_STEPS, "kernels": {e.key: time_of(e) / 1000 / TRACED_STEPS for e in events}}
