"""`benchmark.py gpu` in miniature: all parts on a CPU, runs that are cut off, parts that take too long or fail."""

import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import part_functions
import pytest
import torch
from helpers import REPOSITORY, parse, world

from benchmarks.gpu import use_scratch
from benchmarks.gpu_markdown import markdown_report
from benchmarks.gpu_steps import EAGER, measured_rows
from benchmarks.loader import ALL, AS_IS
from benchmarks.parts import FAILED, FINISHED, NOT_FINISHED, NOT_STARTED, Part, run_parts
from benchmarks.steps import DIVERSIFIED, PLAIN, TEXTBOOK
from diversity import PRESETS

STEPS = {PLAIN, DIVERSIFIED, EAGER, TEXTBOOK, *(f"only {name}" for name in PRESETS["released"].coefs)}


@pytest.fixture
def start(tmp_path_factory):
    """A function that starts the program; the folder of its report; folders that it must not write into."""
    folder = tmp_path_factory.mktemp("g")  # sockets need a short path
    elsewhere = [folder / name for name in ("home", "tmp")]
    for path in elsewhere:
        path.mkdir()
    environment = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {"HOME": str(elsewhere[0]), "TMPDIR": str(elsewhere[1])}
    command = [sys.executable, "benchmark.py", "gpu", "--device", "cpu", "--rounds", "1"]

    def start(*words):
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command_line = [*command, "--output", str(folder / "r"), *words]
        return subprocess.Popen(command_line, cwd=REPOSITORY, env=os.environ | environment, **options)

    return start, folder / "r", elsewhere


def report_of(folder):
    """The parts of gpu.json, and the text of gpu.md."""
    return json.loads((folder / "gpu.json").read_text())["parts"], (folder / "gpu.md").read_text()


def files_of_the_repository():
    """{path: time of its last change} of what no test that runs at the same time changes."""
    kept = ("__pycache__", ".git", ".pytest_cache", ".ruff_cache")
    paths = [path for path in REPOSITORY.rglob("*") if not set(kept) & set(path.relative_to(REPOSITORY).parts)]
    return {path: path.stat().st_mtime_ns for path in paths if path.is_file()}


@pytest.mark.slow
def test_the_report_has_every_part_and_nothing_is_written_elsewhere(start):
    start, folder, elsewhere = start
    before = files_of_the_repository()
    with start() as run:
        printed, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors
    parts, text = report_of(folder)
    assert {name: part["state"] for name, part in parts.items()} == dict.fromkeys(parts, FINISHED)
    assert text in printed
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert [title.split()[1] for title in titles] == ["Card", "CUDA", "Training", "The", "Loader"]
    assert parts["card"]["copy_bytes_per_second"] > 1e8 and parts["card"]["matmul_flops_per_second"] > 1e8
    assert {test["outcome"] for test in parts["tests"]["tests"]} == {"skipped"}
    assert "- Skipped: needs a CUDA GPU" in text
    for table in parts["steps"]["tables"]:
        assert table["rows"].keys() == STEPS
        for row in table["rows"].values():
            assert all(row[name] > 0 for name in ("ms", "images_per_s", "peak_mib", "utilisation", "first_step_s"))
        assert table["rows"][PLAIN]["to_plain"] == 1
    fractions = [kernel["fraction"] for kernel in parts["kernels"]["kernels"]]
    assert len(fractions) == 10 and fractions == sorted(fractions, reverse=True) and 0.5 < sum(fractions) < 1
    assert "random JPEG images" in text and "The training step needs" in text
    assert sorted(path.name for path in folder.iterdir()) == ["gpu.json", "gpu.log", "gpu.md"]
    assert [[*path.rglob("*")] for path in elsewhere] == [[], []]
    assert files_of_the_repository() == before


@pytest.mark.slow
def test_a_run_that_is_killed_leaves_the_parts_that_it_has_done(start):
    start, folder, _ = start
    with start() as run:
        wait_for(lambda: (folder / "gpu.json").exists() and len(rows_of(folder)) >= 2)
        run.kill()
    parts, text = report_of(folder)
    states = [part["state"] for part in parts.values()]
    assert states == [FINISHED, FINISHED, NOT_FINISHED, NOT_STARTED, NOT_STARTED]
    assert f"| {DIVERSIFIED} " in text and "## Card" in text and "## Loader" not in text
    wait_for(lambda: not processes_of(folder))


def rows_of(folder):
    tables = report_of(folder)[0]["steps"].get("tables", [{"rows": {}}])
    return tables[0]["rows"]


def processes_of(folder):
    """Command lines of the processes that write the report."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes())
        except OSError:  # it has just ended
            continue
    return [line for line in lines if os.fsencode(folder) in line]


def wait_for(condition, seconds=200):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_a_part_that_takes_too_long_or_fails_is_marked_and_the_next_one_runs(start_method, tmp_path):
    functions = ("slow", "failing", "crashing", "quick")
    parts = {name: Part(getattr(part_functions, name), 0.25) for name in functions}
    written, log = [], tmp_path / "log"
    results = run_parts(parts, (5,), 16, lambda results: written.append(json.dumps(results)), log, start_method)
    assert [results[name]["state"] for name in functions] == [NOT_FINISHED, FAILED, FAILED, FINISHED]
    assert results["slow"]["note"] == "ended at its time limit, 4 s"
    assert results["failing"]["note"] == "ValueError: what is wrong"
    assert results["crashing"]["note"] == "its process ended with exit code 3"
    assert results["failing"]["first"] == results["crashing"]["first"] == 1
    assert results["quick"]["number"] == 5
    assert results["quick"]["states"] == [NOT_FINISHED, FAILED, FAILED, NOT_FINISHED]
    assert json.loads(written[0])["slow"] == {"state": NOT_FINISHED}
    assert json.loads(written[-1]) == results
    assert "and more of it" in log.read_text() and "this line is for the log" in log.read_text()
    started = Path(f"/proc/{results['slow']['process']}/cmdline")
    wait_for(lambda: not started.exists() or not started.read_bytes())  # ended, though nobody may have asked how


def test_a_step_that_needs_too_much_memory_has_a_row_and_the_next_one_is_measured():
    def too_large():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def broken():
        raise RuntimeError("this is broken\nin many ways")

    builders = {PLAIN: too_large, "broken": broken, "good": lambda: lambda num_steps: time.sleep(0.001 * num_steps)}
    own = Namespace(rounds=1, steps=None)
    rows = dict(measured_rows(builders, {}, parse("--batch-size", 4), own, world(), 1e-6))
    assert rows[PLAIN] == {"error": "out of memory"}
    assert rows["broken"] == {"error": "RuntimeError: this is broken"}
    assert rows["good"]["ms"] >= 1 and rows["good"]["to_plain"] is None


def test_the_report_of_a_gpu_reads_well():
    """Made-up results: a test that failed, a step that needs too much memory, a part that was ended."""
    row = {"ms": 85.3, "images_per_s": 12004.7, "to_plain": 1.031, "peak_mib": 45678.9, "utilisation": 0.41}
    row |= {"host_syncs": 0.0, "first_step_s": 41.2}
    table = {"model": "deit", "batch_size": 1024, "flops_per_image": 27.5e9, "rows": {}}
    table["rows"] = {PLAIN: row | {"to_plain": 1.0}, DIVERSIFIED: row, TEXTBOOK: {"error": "out of memory"}}
    test = {"name": "test_a", "outcome": "failed", "seconds": 2.0, "lines": ["E   assert 1 == 2", "test_cuda.py:7"]}
    speeds = {AS_IS: 200.0, ALL: 400.0}
    parts = {
        "card": {"name": "NVIDIA H100", "memory_gib": 79.2, "multiprocessors": 132, "cuda": "13.0", "driver": "580.1"},
        "tests": {"tests": [test, test | {"outcome": "passed"}]},
        "steps": {"tables": [table, table | {"rows": {}}], "rounds": 7},
        "kernels": {"state": NOT_FINISHED, "seconds": 48.0, "note": "ended at its time limit, 48 s"},
        "loader": {"source": "DATA", "workers": 16, "batch_size": 128, "images_per_s_of_a_core": speeds},
    }
    parts = {name: {"state": FINISHED, "seconds": 7.2} | part for name, part in parts.items()}
    parts["card"] |= {"copy_bytes_per_second": 3e12, "precision": "bfloat16", "matmul_flops_per_second": 798e12}
    heading = {"command": ["gpu"], "environment": ["torch"], "cores": 16, "device": "cuda", "minutes": 8}
    lines = [" ".join(line.split()) for line in markdown_report(heading | {"parts": parts}).splitlines()]
    for line in (
        "# Benchmark of NVIDIA H100",
        "| kernels | not finished | 48 | ended at its time limit, 48 s |",
        "| product of large bfloat16 matrices, TFLOP/s | 798 |",
        "1 passed, 1 failed, 0 skipped. The slowest is `test_a` with 2 s.",
        "E assert 1 == 2",
        "### deit, batch 1024, 27.5 GFLOP an image",
        f"| {DIVERSIFIED} | 85.3 | 12,005 | 1.031 | 45,679 | 41.0% | 0 | 41.2 | |",
        f"| {TEXTBOOK} | | | | | | | | out of memory |",
        "| diversified step of deit, batch 1024 | 12,005 |",
        "The training step needs 30.0 cores that read for it.",
    ):
        assert line in lines, line


def test_an_output_folder_that_cannot_serve_is_refused_in_one_line():
    with pytest.raises(SystemExit, match="error: --output /dev/null/r cannot be written: Not a directory"):
        use_scratch("/dev/null/r")
    with pytest.raises(SystemExit, match=r"error: --output /a+ is 37 characters too long for the sockets"):
        use_scratch("/" + 99 * "a")
