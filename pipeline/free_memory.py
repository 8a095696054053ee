"""How many bytes this process can still allocate: on the host within its control groups, and on a GPU."""

import math
from pathlib import Path

import torch

PROCESS, SYSTEM = Path("/proc"), Path("/sys/fs/cgroup")
USAGE_AND_LIMIT = {"memory.current": "memory.max", "memory.usage_in_bytes": "memory.limit_in_bytes"}
"""{file of the usage: file of the limit}, of version 2 and of version 1."""


def free_bytes(device: torch.device) -> int | None:
    """The free memory of a device in bytes; None where the system does not report it.

    On the host it is the least of what Linux calls available and of what the control groups of this process leave to
    it, as containers and schedulers such as SLURM set their limits. Files that Linux keeps in memory count as free.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = PROCESS / "meminfo"
    if not meminfo.exists():
        return None
    lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
    available = 1024 * int(lines["MemAvailable"].split()[0])
    return max(0, min([available, *map(_left_by_group, _control_groups())]))


def _control_groups() -> list[Path]:
    """The folders of the control groups that limit the memory of this process, those above them too."""
    file, folders = PROCESS / "self" / "cgroup", []
    for line in file.read_text().splitlines() if file.exists() else ():
        _, controllers, group = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            folder = SYSTEM / "memory" if controllers else SYSTEM
            folders.append(folder)
            for name in Path(group.lstrip("/")).parts:  # in a container they may not be there
                folders.append(folder := folder / name)
    return folders


def _left_by_group(folder: Path) -> float:
    """Bytes that a control group can still use; infinite where it has no limit."""
    for usage, limit in USAGE_AND_LIMIT.items():
        if (folder / usage).exists() and (folder / limit).exists():
            most = (folder / limit).read_text().strip()
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            files = int(statistics.get("total_inactive_file", statistics.get("inactive_file", 0)))
            return math.inf if most == "max" else int(most) - int((folder / usage).read_text()) + files
    return math.inf
