"""`benchmark.py gpu`: the report of a machine with a GPU, as gpu.json and gpu.md in one folder."""

import os
import shutil
from argparse import Namespace
from pathlib import Path

from utils import World, atomic_write, write_json

from . import gpu_parts
from .cuda_tests import run_cuda_tests
from .gpu_markdown import markdown_report
from .gpu_steps import measure_steps
from .parts import Part, run_parts

PARTS = {
    "card": Part(gpu_parts.describe_card, 0.04),
    "tests": Part(run_cuda_tests, 0.34),
    "steps": Part(measure_steps, 0.42),
    "kernels": Part(gpu_parts.trace_kernels, 0.08),
    "loader": Part(gpu_parts.measure_loader, 0.12),
}
VARIABLES = {
    "TMPDIR": "tmp",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "CUDA_CACHE_PATH": "cuda",
    "MPLCONFIGDIR": "matplotlib",
    "XDG_CACHE_HOME": "cache",
}
"""{environment variable: its folder within the scratch folder}."""

SOCKET_PATH = 107  # largest number of bytes in the path of a Unix socket; loader processes open some in TMPDIR
SOCKET_NAME = len("/pymp-12345678/listener-12345678")


def write_report(own: Namespace, args: Namespace, world: World, heading: dict):
    """Run the parts of the report one after the other, and write it again with every result.

    A run that is interrupted therefore leaves a report of what it has done. On a CPU the models are tiny. `own` and
    `args` are the flags of benchmark.py and main.py; the JSON file begins with `heading`.
    """
    args = Namespace(**vars(args) | {"device": str(world.device)})
    folder = Path(own.output)
    scratch = use_scratch(folder)
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
    shutil.rmtree(scratch, ignore_errors=True)
    print((folder / "gpu.md").read_text())
    print(f"written: {folder / 'gpu.md'}, {folder / 'gpu.json'}; output of the parts: {log}")


def use_scratch(output: str | Path) -> Path:
    """Make an empty folder in `output`, into which processes started from now on write their caches and files.

    Raises:
        SystemExit: the folder cannot be written, or its path is too long.
    """
    scratch = Path(output).resolve() / "scratch"
    excess = len(os.fsencode(scratch / VARIABLES["TMPDIR"])) + SOCKET_NAME - SOCKET_PATH
    if excess > 0:
        raise SystemExit(
            f"error: --output {output} is {excess} characters too long for the sockets of loader processes; choose a "
            "folder with a shorter path"
        )
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        for folder in VARIABLES.values():
            (scratch / folder).mkdir(parents=True)
    except OSError as error:
        raise SystemExit(f"error: --output {output} cannot be written: {error.strerror}") from None
    os.environ |= {name: str(scratch / folder) for name, folder in VARIABLES.items()}
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "GIT_OPTIONAL_LOCKS": "0", "HF_HUB_OFFLINE": "1"}
    return scratch
