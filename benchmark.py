"""What training costs, measured side by side in one run.

    python benchmark.py step --model deit_small_patch16_224_diverse --batch-size 16
    python benchmark.py terms --model deit_small_patch16_224_diverse --batch-size 16
    python benchmark.py loader --data-path DATA --resized RESIZED
    python benchmark.py gpu --minutes 8
    python benchmark.py bytes --model deit_small_patch16_224_diverse --batch-size 1024

`step` times a plain timm training step, this project's step with all terms and with each alone, and a textbook's step.
`terms` times every term alone, more precisely, as a fraction of the plain step, and measures the memory that it adds.
`loader` times the input pipeline. `gpu` writes a report of a GPU machine: card, CUDA tests, training steps of three
sizes, kernels, loader; on a CPU with tiny models. `bytes` counts, without a GPU, the memory traffic and the kernels of
the compiled step on an H100.

What is compared runs in turns, A B A B ..., so that a drift of the machine's speed affects all of it; medians are
printed, and written as JSON. Further flags are main.py's.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch is imported: the profiler prints no messages

from benchmarks import cuda_bytes, gpu, loader, steps, terms
from diversity import ALIASES, REGULARIZERS
from diversity.objective import MIXING
from models.execution import set_backends
from training import arguments
from training.log import environment_lines
from training.parsing import positive_float, positive_int
from utils import cpu_count, init_world, quiet_warnings, run_command, write_json

WHATS = {
    "step": steps.compare_steps,
    "terms": terms.compare_terms,
    "loader": loader.compare_loaders,
    "bytes": cuda_bytes.compare_bytes,
}


def main(argv: list[str] | None = None):
    """Measure what a command line names; print a Markdown table and write a JSON file."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], allow_abbrev=False, epilog="Further flags are main.py's."
    )
    add = parser.add_argument
    add("what", choices=(*WHATS, "gpu"))
    add("--rounds", type=positive_int, default=7, help="timed rounds after one warm-up")
    add("--steps", type=positive_int, default=None,
        help="training steps of a round: 1 on a CPU, on a GPU 20 (gpu: as many as take 0.3 s, at most 20) "
        "by default; loader: batches, 8")  # fmt: skip
    add("--terms", nargs="*", type=lambda name: ALIASES.get(name, name), choices=(MIXING, *REGULARIZERS),
        metavar="TERM", default=None, help="only these; for step and bytes the list may be empty")  # fmt: skip
    add("--resized", default="", metavar="DIR", help="loader: a copy of the images by script/resize_imagenet.sh")
    add("--json", default="", metavar="FILE", help="file of the numbers; default: runs/benchmark_WHAT.json")
    add("--minutes", type=positive_float, default=8.0, help="gpu: time limit; what is not finished by then is stopped")
    add("--output", default="runs/benchmark_gpu", metavar="DIR", help="gpu: the folder of gpu.md, gpu.json and gpu.log")
    argv = sys.argv[1:] if argv is None else argv
    own, words = parser.parse_known_args(argv)
    defaults = {"model": "deit_small_patch16_224_diverse", "batch_size": 16, "preset": "released"}
    args = arguments.parse_args(words, defaults)
    quiet_warnings()
    world = init_world(args.device)
    set_backends(args.fused_attn, args.tf32)
    environment = environment_lines(world, args.seed)
    print("\n".join(environment), flush=True)
    heading = {"command": argv, "environment": environment, "cores": cpu_count()}
    if own.what == "gpu":
        gpu.write_report(own, args, world, heading)
        return
    results = WHATS[own.what](own, args, world)
    path = Path(own.json or f"runs/benchmark_{own.what}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(heading | results, path)
    print(f"written: {path}")


if __name__ == "__main__":
    run_command(main)
