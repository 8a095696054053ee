"""The folder for everything that a GPU report writes beside the report: caches, temporary files, data of its tests."""

import argparse
import os
import shutil
from pathlib import Path

DEFAULT_OUTPUT = "runs/benchmark_gpu"
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


def scratch_folder(output: str | Path) -> Path:
    """The absolute path of the scratch folder of a report."""
    return Path(output).resolve() / "scratch"


def output_of(argv: list[str]) -> str:
    """The value of --output on a command line of benchmark.py, before anything else of it is read."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--output", default=DEFAULT_OUTPUT)
    try:
        return parser.parse_known_args(argv)[0].output
    except argparse.ArgumentError:  # no value: the parser of all flags reports it
        return DEFAULT_OUTPUT


def remove_scratch(output: str | Path):
    """Delete the scratch folder and everything in it."""
    shutil.rmtree(scratch_folder(output), ignore_errors=True)


def use_scratch(output: str | Path):
    """Make an empty scratch folder, and let this process and those it starts write their caches and files there.

    Libraries create some of these files when they are imported, so call it before.

    Raises:
        SystemExit: the folder cannot be written, or its path is too long.
    """
    scratch = scratch_folder(output)
    longest = len(os.fsencode(scratch / VARIABLES["TMPDIR"])) + SOCKET_NAME
    if longest > SOCKET_PATH:
        raise SystemExit(
            f"error: --output {output} is {longest - SOCKET_PATH} characters too long for the sockets of loader "
            "processes; choose a folder with a shorter path"
        )
    try:
        remove_scratch(output)
        for folder in VARIABLES.values():
            (scratch / folder).mkdir(parents=True)
    except OSError as error:
        raise SystemExit(f"error: --output {output} cannot be written: {error.strerror}") from None
    os.environ |= {name: str(scratch / folder) for name, folder in VARIABLES.items()}
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "GIT_OPTIONAL_LOCKS": "0", "HF_HUB_OFFLINE": "1"}
