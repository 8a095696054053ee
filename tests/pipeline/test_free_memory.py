"""Free memory as Linux and its control groups, of both versions, report it in their files."""

import pytest
import torch

from pipeline import free_memory
from pipeline.free_memory import free_bytes

CPU = torch.device("cpu")
AVAILABLE = 1000 * 1024
FREE = {
    "no group": ("", {}, AVAILABLE),
    "version 2": ("0::/job/step", {"job/step": (900_000, "1000000", 30_000)}, 130_000),
    "a limit above": ("0::/job/step", {"job/step": (9, "max", 0), "job": (900_000, "1000000", 0)}, 100_000),
    "no limit": ("0::/job", {"job": (5, "max", 0)}, AVAILABLE),
    "more than the machine has": ("0::/", {"": (0, str(2**40), 0)}, AVAILABLE),
    "in a container": ("0::/../outside", {"": (600_000, "1000000", 0)}, 400_000),
    "used up": ("0::/job", {"job": (2_000_000, "1000000", 1000)}, 0),
    "version 1": (
        "9:cpu:/a\n4:memory:/job",
        {"memory/job": (700_000, "1000000", 50_000), "memory": (0, str(2**63), 0)},
        350_000,
    ),
}


@pytest.mark.parametrize(("groups", "files", "expected"), FREE.values(), ids=FREE)
def test_free_memory_of_the_host(groups, files, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(free_memory, "PROCESS", tmp_path / "proc")
    monkeypatch.setattr(free_memory, "SYSTEM", tmp_path / "cgroup")
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text(f"MemTotal:  9999 kB\nMemFree: 5 kB\nMemAvailable:  {1000} kB\n")
    (tmp_path / "proc" / "self" / "cgroup").write_text(groups)
    for name, (usage, limit, inactive) in files.items():
        folder, is_first = tmp_path / "cgroup" / name, name.startswith("memory")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ("memory.usage_in_bytes" if is_first else "memory.current")).write_text(f"{usage}\n")
        (folder / ("memory.limit_in_bytes" if is_first else "memory.max")).write_text(f"{limit}\n")
        (folder / "memory.stat").write_text(f"anon 7\n{'total_' if is_first else ''}inactive_file {inactive}\n")
    assert free_bytes(CPU) == expected


def test_a_system_that_does_not_report_it(tmp_path, monkeypatch):
    monkeypatch.setattr(free_memory, "PROCESS", tmp_path)
    assert free_bytes(CPU) is None


def test_this_machine():
    assert free_bytes(CPU) is None or 0 < free_bytes(CPU) < 2**50
