"""`benchmark.py gpu` in miniature: all parts on a CPU, and parts that take too long or fail."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import REPOSITORY, run_process

import benchmark
from benchmarks.gpu import run_part
from benchmarks.steps import PLAIN, TEXTBOOK, measured_rows


@pytest.mark.slow
def test_the_report_has_every_part(tmp_path):
    words = ("gpu", "--device", "cpu", "--rounds", "1", "--minutes", "20", "--output", tmp_path)
    run = run_process("benchmark.py", *words, timeout=1200)
    assert run.returncode == 0, run.stderr
    text = (tmp_path / "gpu.md").read_text()
    parts = ["card", "cached", "step", "host", "pytest", "step", "kernels", "step", "loader", "step", "step"]
    parts.append("remedies")
    ends = [line for line in text.splitlines() if "finished, after" in line]
    assert [line.split(":")[0] for line in ends] == parts
    assert [line for line in run.stdout.splitlines() if "finished, after" in line] == ends
    assert "needs a CUDA GPU" in text and "64 random JPEG images" in text
    numbers = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert len(numbers) == 11
    assert numbers["0_card.json"]["copy_bytes_per_second"] > 1e8
    assert numbers["1_cached.json"]["cached"]["step on cached images"]["data_wait"] > 0
    modes = {"--compile-mode reduce-overhead", "--preset none", "--preset none --compile-mode reduce-overhead"}
    diversified = {"diversified", *(f"diversified, {words}" for words in modes)}
    assert numbers["2_step.json"]["steps"].keys() == {PLAIN, TEXTBOOK, *diversified}
    assert numbers["5_step.json"]["steps"].keys() == {PLAIN, TEXTBOOK, "diversified", "diversified, --no-compile"}
    assert numbers["3_host.json"]["host"]["all"]["us"] > 0
    assert len(numbers["10_step.json"]["steps"]) == 10
    for row in numbers["10_step.json"]["steps"].values():
        assert all(row[name] > 0 for name in ("ms", "images_per_s", "to_plain", "peak_mib", "utilisation"))
    assert all(row["ms"] > 0 for row in numbers["11_remedies.json"]["remedies"].values() if "error" not in row)
    times = [*numbers["6_kernels.json"]["kernels"].values()]
    assert len(times) == 10 and times == sorted(times, reverse=True)
    assert 0.5 < sum(times) / numbers["6_kernels.json"]["ms"] < 1


def test_a_report_that_is_stopped_keeps_what_it_has_and_leaves_no_process(tmp_path):
    command = [sys.executable, "benchmark.py", "gpu", "--device", "cpu", "--rounds", "1", "--output", str(tmp_path)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        while not parts_running(tmp_path / "0_card.json"):
            assert run.poll() is None
        run.send_signal(signal.SIGTERM)
        _, errors = run.communicate(timeout=60)
    assert run.returncode == 1 and "error: stopped by SIGTERM; " in errors.splitlines()[-1]
    assert (tmp_path / "gpu.md").read_text().startswith("# Benchmark of a CPU\n")
    assert not parts_running(tmp_path)


def parts_running(path):
    """How many processes have the path in their command line."""
    count = 0
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            count += str(path).encode() in file.read_bytes()
    return count


@pytest.mark.parametrize(
    ("code", "state"),
    [
        ("print('some', flush=True); import time; time.sleep(60)", "stopped at its time limit of 1 s"),
        ("print('some'); raise SystemExit(3)", "failed with exit code 3; gpu.log has its messages"),
        ("print('some'); import sys; print('more', file=sys.stderr)", "finished"),
    ],
)
def test_a_part_that_takes_too_long_or_fails_says_so(code, state, tmp_path):
    start = time.monotonic()
    with open(tmp_path / "report", "w") as report, open(tmp_path / "log", "w") as log:
        assert run_part(["-c", code], report, log, 1 if "60" in code else 30) == state
        report.write(state)
    assert time.monotonic() - start < 30
    assert (tmp_path / "report").read_text() == f"some\n{state}"
    assert (tmp_path / "log").read_text() == ("more\n" if state == "finished" else "")


def test_a_step_that_needs_too_much_memory_has_a_row_and_the_next_one_is_measured():
    def too_large():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def broken():
        raise RuntimeError("this is broken\nin many ways")

    builders = {PLAIN: too_large, "broken": broken, "good": lambda: lambda num_steps: time.sleep(0.001 * num_steps)}
    first, second, good = measured_rows(builders, 4, 1e-6, 1, None, torch.device("cpu"))
    assert first == {"error": "out of memory"} and second == {"error": "this is broken"}
    assert good["ms"] >= 1 and good["to_plain"] is None


def test_an_output_folder_that_cannot_be_written_is_refused_in_one_line():
    with pytest.raises(SystemExit, match="error: --output /dev/null/r cannot be written: Not a directory"):
        benchmark.main(["gpu", "--device", "cpu", "--output", "/dev/null/r"])
