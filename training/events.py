"""TensorBoard's events of a run, without the thread of its writer, which ends at the first error of a disk."""

import io
import os
import re
import socket
import time
from pathlib import Path

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary

from training.records import GrowingFile

FLUSH_SECONDS = 60.0


class Events(GrowingFile):
    """A new file of events in the run folder.

    Args:
        folder: the run folder.
        step: where the run starts; TensorBoard drops what an earlier process wrote from this step on.
    """

    def __init__(self, folder: Path, step: int):
        names = [path.name for path in folder.glob("events.out.tfevents.*")]
        seconds = [int(found[1]) for name in names if (found := re.search(r"tfevents\.(\d+)", name))]
        second = max([int(time.time()), *(second + 1 for second in seconds)])  # files are read in the order of names
        super().__init__(folder / f"events.out.tfevents.{second:010d}.{socket.gethostname()}.{os.getpid()}.0")
        self.flushed = time.monotonic()
        self._add_event(Event(file_version="brain.Event:2"))
        self._add_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))

    def add_scalar(self, name: str, value: float, step: int):
        self.add_summary(summary.scalar(name, value), step)

    def add_figure(self, name: str, figure, step: int):
        """Add a figure of matplotlib, and close it."""
        from matplotlib import pyplot as plt  # here, as the import takes a second

        figure.canvas.draw()
        self.add_summary(summary.image(name, np.asarray(figure.canvas.buffer_rgba()), dataformats="HWC"), step)
        plt.close(figure)

    def add_texts(self, texts: dict[str, str], step: int):
        for name, text in texts.items():
            self.add_summary(summary.text(name, f"```\n{text}\n```"), step)

    def add_hyperparameters(self, flags: dict, metrics: dict[str, float], step: int):
        """Flags without those that are None, and the names of scalars whose last values are the results."""
        values = {name: value if isinstance(value, bool | int | float | str) else str(value)
                  for name, value in flags.items() if value is not None}  # fmt: skip
        for content in summary.hparams(values, metrics):
            self.add_summary(content, step)

    def add_summary(self, content: Summary, step: int):
        """Add what a function of torch.utils.tensorboard.summary returns; it is written within a minute or so."""
        self._add_event(Event(summary=content, step=step))
        if time.monotonic() - self.flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self):
        self.flushed = time.monotonic()
        super().flush()

    def _add_event(self, event: Event):
        event.wall_time = time.time()
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        self.add(record.getvalue())
