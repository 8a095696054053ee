"""`benchmark.py gpu`: the report of a machine with a GPU, as gpu.json and gpu.md in one folder."""

from argparse import Namespace
from pathlib import Path

from utils import World, atomic_write, write_json

from . import gpu_parts
from .cuda_tests import run_cuda_tests
from .gpu_markdown import markdown_report
from .parts import Part, run_parts
from .scratch import remove_scratch, use_scratch

PARTS = {
    "card": Part(gpu_parts.describe_card, 0.04),
    "tests": Part(run_cuda_tests, 0.34),
    "steps": Part(gpu_parts.measure_steps, 0.42),
    "kernels": Part(gpu_parts.trace_kernels, 0.08),
    "loader": Part(gpu_parts.measure_loader, 0.12),
}


def write_report(own: Namespace, args: Namespace, world: World, heading: dict):
    """Run the parts of the report one after the other, and write it again with every result.

    A run that is interrupted therefore leaves a report of what it has done. On a CPU the models are tiny.

    Args:
        own: `minutes` of the report, its folder `output`, and for the steps `rounds` and `steps` of a round (None = as
            many as take 0.3 s).
        args: main.py's flags.
        world: this process.
        heading: further content of the JSON file.
    """
    args = Namespace(**vars(args) | {"device": str(world.device)})
    folder = Path(own.output)
    use_scratch(folder)
    log = folder / "gpu.log"
    log.write_text("")

    def write(results: dict[str, dict]):
        report = heading | {"device": world.device.type, "minutes": own.minutes, "parts": results}
        write_json(report, folder / "gpu.json")
        with atomic_write(folder / "gpu.md") as file:
            file.write(markdown_report(report).encode())

    # A process that has used CUDA cannot be forked. Without CUDA, forking saves the time of importing torch.
    start_method = "spawn" if world.device.type == "cuda" else "fork"
    run_parts(PARTS, (own, args), 60 * own.minutes, write, log, start_method)
    remove_scratch(folder)
    print((folder / "gpu.md").read_text())
    print(f"written: {folder / 'gpu.md'}, {folder / 'gpu.json'}; output of the parts: {log}")
