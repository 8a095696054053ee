"""Standard output and error that cannot be written: a run continues, another program ends with an error."""

import errno
import os
import pty
import sys
import textwrap

import pytest
import torch
from forking import exit_code, receive
from helpers import TINY, few_digits, log_of, run_main, run_process

import reports.figures  # noqa: F401  once, not in each forked process
from training.checkpoint import LAST
from training.output import tolerant_output
from training.stopping import RESUMABLE
from utils import run_command


@pytest.fixture(scope="module", autouse=True)
def digits():
    """Imported once, for all forked processes."""
    with few_digits():
        yield


def full():
    return os.open("/dev/full", os.O_WRONLY)


def broken_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def closed():
    return None


def spoil(number, how):
    """Give standard output (1) or error (2) of this process what `how` returns, as at its start."""
    descriptor = how()
    os.close(number) if descriptor is None else os.dup2(descriptor, number)
    if descriptor is not None:
        os.close(descriptor)
    name = {1: "stdout", 2: "stderr"}[number]
    setattr(sys, name, None if descriptor is None else os.fdopen(os.dup(number), "w", buffering=1))


def run(pipe, command, number, how):
    """`run_command`, and then what Python does at its exit; sends the exit code."""
    spoil(number, how)
    code = 0
    try:
        run_command(command)
    except SystemExit as stop:
        code = stop.code
    sys.stdout.flush()
    sys.stderr.flush()
    pipe.send((code, [os.readlink(f"/proc/self/fd/{number}") for number in (1, 2)]))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a Linux device")
@pytest.mark.parametrize(("how", "number"), [(full, 1), (broken_pipe, 2), (closed, 1)])
def test_a_run_continues_and_ends_well(how, number, fork, tmp_path):
    def command():
        run_main(*TINY, "--log-interval", 1, "--output-dir", tmp_path / "run")

    process, pipe = fork(run, command, number, how)
    code, files = receive(pipe, 60)
    assert (code, exit_code(process)) == (0, 0)
    assert [record["epoch"] for record in log_of(tmp_path / "run")] == [0]
    assert (tmp_path / "run" / "summary.json").exists()
    assert how is not closed or files[number - 1] == os.devnull  # no file of the run has its number


def test_a_run_whose_terminal_is_closed_saves_and_stops(tmp_path):
    """The system sends SIGHUP, and the terminal takes no more text and no progress bar."""

    def command():
        run_main(*TINY, "--epochs", 1000, "--log-interval", 1, "--output-dir", tmp_path / "run")

    pid, terminal = pty.fork()
    if pid == 0:
        code = 0
        try:
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            run_command(command)
        except SystemExit as stop:
            code = stop.code
        finally:
            os._exit(code)
    text = b""
    while b"epoch 1 " not in text:
        text += os.read(terminal, 1000)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == RESUMABLE
    assert torch.load(tmp_path / "run" / LAST, weights_only=True)["epoch"] >= 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a Linux device")
@pytest.mark.parametrize("length", [10, 100_000])  # an error at the end, or within
@pytest.mark.parametrize(
    ("how", "line"), [(full, "error: standard output cannot be written: No space left on device\n"), (broken_pipe, "")]
)
def test_another_program_whose_output_is_lost_ends_with_an_error(how, line, length, fork, capfd):
    process, pipe = fork(run, lambda: sys.stdout.write("x" * length), 1, how)
    assert receive(pipe)[0] == 1
    assert exit_code(process) == 0
    assert capfd.readouterr().err == line


@pytest.mark.parametrize("code", [0, 75, "error: a line"])
def test_another_error_keeps_its_exit_code(code, fork, capfd):
    def command():
        print("lost", end="")
        sys.exit(code)

    process, pipe = fork(run, command, 1, broken_pipe)
    assert receive(pipe)[0] == (75 if code == 75 else 1)
    assert exit_code(process) == 0
    assert capfd.readouterr().err == ("error: a line\n" if code == "error: a line" else "")


def test_an_error_of_another_file_keeps_its_traceback():
    def command():
        raise OSError(errno.EIO, "of a file")

    with pytest.raises(OSError, match="of a file"):
        run_command(command)


class Refusing:
    """A stream that takes `room` characters."""

    def __init__(self, room):
        self.room, self.text = room, ""

    def write(self, text):
        if len(self.text) + len(text) > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.text += text

    def flush(self):
        pass


def test_the_first_loss_is_reported_and_later_text_is_written_where_it_can_be(monkeypatch):
    out, err = Refusing(8), Refusing(1000)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with tolerant_output():
        for text in ("first ", "second ", "third ", "4"):
            assert sys.stdout.write(text) == len(text)
        assert sys.stdout.text == "first 4"  # other attributes are the stream's
    assert err.text == "warning: standard output cannot be written: No space left on device; training continues\n"
    assert (sys.stdout, sys.stderr) == (out, err)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a Linux device")
def test_a_real_process_with_both_streams_full_ends_with_the_code_of_its_stop():
    program = """
        import os
        from training.output import tolerant_output
        from utils import run_command

        def command():
            with tolerant_output():
                print("lost")
                raise SystemExit(75)

        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, 1)
        os.dup2(full, 2)
        run_command(command)
    """
    assert run_process("-c", textwrap.dedent(program)).returncode == 75
