"""The process: memory, launch variables, seeds."""

import os
import re
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from helpers import REPOSITORY, TINY, run_main, run_process

from training.meters import Meters
from utils import World, cpu_count, init_world, one_line_errors

FREED = """
import torch
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
before = resident()
buffer = torch.ones(64 * 2**20 // 4)
del buffer
print(resident() - before > 60 * 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
@pytest.mark.parametrize("is_kept", [True, False])
def test_freed_memory_is_kept_with_the_variables_of_the_quickstart(is_kept):
    script = (REPOSITORY / "script" / "quickstart.sh").read_text()
    variables = dict(re.findall(r"(MALLOC_\w+)=(\d+)", script))
    assert len(variables) == 3
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    if is_kept:
        environment |= variables
    result = subprocess.run([sys.executable, "-c", FREED], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str(is_kept)


@pytest.mark.parametrize(
    "variables", [{"WORLD_SIZE": "2"}, {"RANK": "0"}, {"RANK": "a", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}]
)
def test_half_a_launch_is_refused(variables, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="torchrun"):
        init_world("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(SystemExit, match="--device cuda"):
        init_world("cuda")


def test_meters_average_over_steps():
    meters = Meters()
    for value in (1.0, 2.0, 6.0):
        meters.add(["loss"], torch.tensor([value]))
    assert meters.averages(init_world("cpu")) == {"loss": 3.0}
    assert cpu_count() >= 1


def test_meters_continue_with_other_terms():
    """As when a run is continued within an epoch with a term on or off: then the means are of what follows."""
    meters = Meters()
    meters.add(["loss", "old"], torch.tensor([1.0, 5.0]))
    meters.add(["new", "loss"], torch.tensor([4.0, 3.0]))
    assert meters.averages(init_world("cpu")) == {"new": 4.0, "loss": 3.0}


def test_the_means_of_several_ranks_are_the_same_after_a_resume(monkeypatch):
    """Each rank continues with its own sums; with another number of ranks, with their mean."""
    values = torch.tensor([[0.1, 1e8], [0.7, 3.0]])  # of two ranks; float32 sums depend on their order

    def two(rank):
        return World(rank, 2, rank, 2, torch.device("cpu"))

    def meters_of(rank):
        meters = Meters()
        for step in range(3):
            meters.add(["loss", "big"], values[rank] * (step + 1) / 3)
        return meters

    sums = torch.stack([meters_of(rank).sums for rank in range(2)])
    monkeypatch.setattr(World, "sum", lambda world, rows: rows.copy_(sums) if world.size == 2 else rows)
    state = meters_of(0).state_dict(two(0))
    assert state == meters_of(1).state_dict(two(1))
    for rank in range(2):
        restored = Meters()
        restored.load_state_dict(state, two(rank))
        assert torch.equal(restored.sums, sums[rank])
        assert restored.averages(two(rank)) == meters_of(0).averages(two(0))
    alone = Meters()
    alone.load_state_dict(state, World(0, 1, 0, 1, torch.device("cpu")))
    assert alone.averages(World(0, 1, 0, 1, torch.device("cpu"))) == pytest.approx(meters_of(0).averages(two(0)))


def test_nccl_knows_its_device_from_the_start(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    joined = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: joined.update(options, backend=backend))
    world = init_world("cuda")
    assert world.device == joined["device_id"] == torch.device("cuda:1")
    assert joined["backend"] == "nccl"


def test_a_failed_exchange_keeps_its_message(monkeypatch):
    message = "[gloo/transport/tcp/pair.cc:534]\nConnection closed by peer [127.0.0.1]:9 " + "x" * 300
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    with pytest.raises(SystemExit) as caught, one_line_errors():
        raise RuntimeError(message)
    line = str(caught.value)
    assert line.startswith("error: processes could not exchange data") and "\n" not in line
    assert line.endswith(" ".join(message.split()))


def test_a_port_in_use_is_one_line(monkeypatch):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        variables = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1"}
        for name, value in {**variables, "MASTER_PORT": listener.getsockname()[1]}.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(SystemExit, match=r"error: the 2 processes cannot meet at 127.0.0.1:\d+; .*EADDRINUSE"):
            init_world("cpu")


def test_a_notebooks_backend_of_matplotlib_is_not_used():
    code = "import utils, reports.figures, matplotlib; print(matplotlib.get_backend().lower())"
    process = run_process("-c", code, environment={"MPLBACKEND": "module://not_there"})
    assert process.stdout == "agg\n", process.stderr


@pytest.mark.parametrize("program", ["main.py", "analyze.py", "benchmark.py", "table.py"])
def test_ctrl_c_during_the_imports_is_no_traceback(program, tmp_path):
    (tmp_path / "torch.py").write_text("import os; os.kill(os.getpid(), 2); os.read(0, 1)")
    process = run_process(program, environment={"PYTHONPATH": str(tmp_path)})
    assert (process.returncode, process.stderr) == (-2, "")


def test_output_that_the_encoding_lacks_is_escaped():
    code = "from utils import run_command; run_command(lambda: print('\u2191'))"
    assert run_process("-c", code, environment={"PYTHONIOENCODING": "ascii"}).stdout == "\\u2191\n"


def test_ctrl_c_is_one_line():
    code = (
        "import os, time; from utils import run_command; run_command(lambda: (os.kill(os.getpid(), 2), time.sleep(9)))"
    )
    process = run_process("-c", code)
    assert (process.returncode, process.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize("message", ["NCCL error in: ProcessGroupNCCL.cpp:77, unhandled", "of a gloomy term"])
def test_other_errors_of_a_distributed_run_keep_their_traceback(message, monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match=message), one_line_errors():
        raise RuntimeError(message)


@pytest.mark.parametrize(("flag", "precision"), [("--tf32", "high"), ("--no-tf32", "highest")])
def test_products_of_float32_are_exact_unless_asked_otherwise(flag, precision, few_digits):
    run_main(*TINY, flag, "--emb_cos_within_coef", 1)
    assert torch.get_float32_matmul_precision() == precision
    assert torch.backends.cudnn.allow_tf32 == (flag == "--tf32")
    torch.set_float32_matmul_precision("highest")
