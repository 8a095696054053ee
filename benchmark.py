"""What training costs, side by side in one run.

    python benchmark.py step --model deit_small_patch16_224_diverse --batch-size 16
    python benchmark.py terms --model deit_small_patch16_224_diverse --batch-size 16
    python benchmark.py loader --data-path DATA --resized RESIZED

`step` times a plain timm training step, this project's with all terms and with each alone, and a textbook's; `terms`
every term alone, more precisely, as its share of the plain step, with the memory it adds; `loader` the input pipeline.
What is compared takes turns, A B A B ..., so that drift of the machine's speed falls on all; medians are printed, and
written as JSON. Further flags are main.py's.
"""

import argparse
import os
import sys

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the memory profiler's own chatter

from pathlib import Path

import arguments
from benchmarks import loader, steps
from diversity import REGULARIZERS
from diversity.objective import MIXING
from parsing import count
from utils import environment_lines, init_world, keep_freed_memory, quiet_warnings, run_command, write_json

WHATS = {
    "step": steps.compare_steps,
    "terms": steps.compare_terms,
    "loader": loader.compare_loaders,
}


def main(argv: list[str] | None = None):
    """Measure what the command line names; print a Markdown table and write a JSON file."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], allow_abbrev=False, epilog="Further flags are main.py's."
    )
    add = parser.add_argument
    add("what", choices=WHATS)
    add("--rounds", type=count, default=7, help="timed rounds after one warm-up")
    add("--steps", type=count, default=None,
        help="training steps of a round: 1 on a CPU and 20 on a GPU by default; loader: batches, 8")  # fmt: skip
    add("--terms", nargs="*", choices=(MIXING, *REGULARIZERS), metavar="TERM", default=None,
        help="only these; step: none may be named")  # fmt: skip
    add("--resized", default="", metavar="DIR", help="loader: a copy of the images by script/resize_imagenet.sh")
    add("--json", default="", metavar="FILE", help="where the numbers go; runs/benchmark_WHAT.json by default")
    argv = sys.argv[1:] if argv is None else argv
    own, words = parser.parse_known_args(argv)
    defaults = {"model": "deit_small_patch16_224_diverse", "batch_size": 16, "preset": "released"}
    args = arguments.parse_args(words, defaults)
    quiet_warnings()
    world = init_world(args.device)
    keep_freed_memory()  # as main.py does, for all that is compared
    heading = environment_lines(world, args.seed)
    print("\n".join(heading), flush=True)
    results = WHATS[own.what](own, args, world)
    path = Path(own.json or f"runs/benchmark_{own.what}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json({"command": argv, "environment": heading, "cores": os.cpu_count(), **results}, path)
    print(f"written: {path}")


if __name__ == "__main__":
    run_command(main)
