"""What training costs, measured side by side in one run.

    python benchmark.py step --model deit_small_patch16_224_diverse --batch-size 16
    python benchmark.py terms --model deit_small_patch16_224_diverse --batch-size 16
    python benchmark.py remedies --model deit_small_patch16_224_diverse --batch-size 16
    python benchmark.py loader --data-path DATA --resized RESIZED
    python benchmark.py cached --model deit_tiny_patch16_224_diverse --input-size 32 --patch-size 4 --batch-size 1024
    python benchmark.py host --config recipes/slvit.yaml --compile-mode reduce-overhead
    python benchmark.py bytes --model deit_small_patch16_224_diverse --batch-size 1024
    python benchmark.py gpu --minutes 8

`step` times a plain timm training step, this project's with all terms, with further flags (--variant) and with each
term alone, and a textbook's. `terms` times every term alone, more precisely, as a fraction of the plain step, and
measures the memory that it adds. `remedies` times the plain step with every remedy alone, with further flags too
(--variant). `loader` times the input pipeline, of random images without --data-path. `cached` times batches of cached
images on the device, and a training step on them. `host` times what the host does in a step, part by part. `bytes`
counts, without a GPU, the memory traffic and the kernels of the compiled step on an H100. `card` has the two speeds of
the device, and `kernels` where a step spends its time. `gpu` runs all of this and the tests for a GPU, with a time
limit for each, and writes a report; on a CPU with tiny models.

What is compared runs in turns, A B A B ..., so that a drift of the machine's speed affects all of it; medians are
printed, and written as JSON. Further flags are main.py's.
"""

import argparse
import os
import shlex
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C: no traceback of an import; see `run_command`

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch is imported: the profiler prints no messages

from benchmarks import cached, cuda_bytes, gpu, host, loader, measure, remedies, steps, terms
from diversity import ALIASES, REGULARIZERS
from diversity.classification import MIXING
from models.execution import set_backends
from models.flag_types import positive_float, positive_int
from training import arguments
from training.provenance import environment_lines
from utils import cpu_count, init_world, quiet_warnings, run_command, write_json

WHATS = {
    "step": steps.compare_steps,
    "terms": terms.compare_terms,
    "remedies": remedies.compare_remedies,
    "loader": loader.compare_loaders,
    "cached": cached.compare_cached,
    "host": host.compare_host_work,
    "bytes": cuda_bytes.compare_bytes,
    "card": gpu.describe_card,
    "kernels": gpu.trace_kernels,
    "gpu": gpu.write_report,
}


def main(argv: list[str] | None = None):
    """Measure what a command line names; print a Markdown table and write a JSON file."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], allow_abbrev=False, epilog="Further flags are main.py's."
    )
    add = parser.add_argument
    add("what", choices=WHATS)
    add("--rounds", type=positive_int, default=7, help="timed rounds after one warm-up")
    add("--steps", type=positive_int, default=None,
        help="training steps of a round, by default 10 on a GPU and 1 on a CPU; loader: batches, 8")  # fmt: skip
    add("--variant", action="append", default=[], metavar="FLAGS", dest="variants",
        help="step, remedies: a row of the step with these flags too, such as --variant=--no-compile")  # fmt: skip
    add("--terms", nargs="*", type=lambda name: ALIASES.get(name, name), choices=(MIXING, *REGULARIZERS),
        metavar="TERM", default=None, help="only these; for step and bytes the list may be empty")  # fmt: skip
    add("--resized", default="", metavar="DIR", help="loader: a copy of the images by script/resize_imagenet.sh")
    add("--json", default="", metavar="FILE", help="file of the numbers; default: runs/benchmark_WHAT.json")
    add("--minutes", type=positive_float, default=8.0, help="gpu: time limit; what is not finished by then is stopped")
    add("--output", default="runs/benchmark_gpu", metavar="DIR", help="gpu: the folder of gpu.md and gpu.log")
    add("--cpu-time", action="store_true",
        help="measure the CPU time of the process, with one thread: for a busy machine")  # fmt: skip
    argv = sys.argv[1:] if argv is None else argv
    own, words = parser.parse_known_args(argv)
    defaults = {"model": "deit_small_patch16_224_diverse", "batch_size": 16, "preset": "released"}
    args = arguments.parse_args(words, defaults)
    own.variants = {flags: arguments.parse_args([*words, *shlex.split(flags)], defaults) for flags in own.variants}
    quiet_warnings()
    world = init_world(args.device)
    if own.cpu_time and world.device.type == "cuda":
        raise SystemExit("error: --cpu-time does not include what a GPU computes; add --device cpu, or leave it out")
    set_backends(args.fused_attn, args.tf32)
    own.environment = environment_lines(world, args.seed)
    print("\n".join(own.environment), file=sys.stderr)
    with measure.use_clock(of_process=own.cpu_time):
        results = WHATS[own.what](own, args, world)
    if results is not None:
        path = Path(own.json or f"runs/benchmark_{own.what}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json({"command": argv, "environment": own.environment, "cores": cpu_count()} | results, path)
        print(f"written: {path}", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
