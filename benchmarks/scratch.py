"""The folder for everything that a GPU report writes besides the report: caches, temporary files, data of its tests."""

import os
import shutil
from pathlib import Path

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


def remove_scratch(output: str | Path):
    """Delete the scratch folder and everything in it."""
    shutil.rmtree(scratch_folder(output), ignore_errors=True)


def use_scratch(output: str | Path):
    """Make an empty scratch folder, into which the processes started from now on write their caches and files.

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
