"""A run of several ranks during which the disk is full: python full_disk.py FROM UNTIL SIGNAL FLAGS of main.py...

FROM and UNTIL are moments of `cutting.InputRecorder`, such as step:EPOCH:STEP, or never; UNTIL may be failure:NUMBER.
The last rank sends itself the signal, such as TERM or none, when the disk becomes full. Every file of the run, which
is flushed before it counts, then fails.
"""

import errno
import os
import signal
import sys
from unittest import mock

from cutting import InputRecorder
from helpers import few_digits, run_main


class Disk:
    """Whether the disk is full, and the moments when that changes.

    Args:
        full, free: moments.
        at_full: called when the disk becomes full.
    """

    def __init__(self, full: str, free: str, at_full=lambda: None):
        self.changes, self.is_full, self.at_full, self.fsync = {full: True, free: False}, False, at_full, os.fsync
        self.failures = 0

    def at(self, *moment):
        """Of `InputRecorder`."""
        change = self.changes.pop(":".join(map(str, moment)), self.is_full)
        if change and not self.is_full:
            self.at_full()
        self.is_full = change

    def flush(self, file):
        """`os.fsync` on this disk."""
        if self.is_full:
            self.failures += 1
            self.at("failure", self.failures)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.fsync(file)


if __name__ == "__main__":
    full, free, name, *flags = sys.argv[1:]
    is_last = os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)
    sends = is_last and name != "none"
    disk = Disk(full, free, lambda: sends and os.kill(os.getpid(), signal.Signals[f"SIG{name}"]))
    InputRecorder(setattr, disk.at)
    with few_digits(), mock.patch("os.fsync", disk.flush):
        run_main(*flags)
