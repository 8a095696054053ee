"""What a run writes and prints when it begins and when it ends."""

import datetime
from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.run_data import Data
from training.changes import Change
from training.checkpoint import TrainState
from training.log import RunLog, accuracy_line, final_records, terms_table
from training.predictions import Predictions, write_predictions
from training.provenance import add_start, environment_lines
from training.resuming import Start
from training.run_folder import write_description, write_summary
from utils import World


def begin_run(
    folder: Path | None, world: World, state: TrainState, data: Data, start: Start, changes: Sequence[Change],
    flags: dict, numbers: dict, lines: Sequence[str], tables: str,
) -> RunLog:  # fmt: skip
    """Write what describes the run, and print it; returns the log of its epochs. Every process calls it.

    Args:
        folder: what `lock_run_folder` yields.
        flags: to start the same run anew.
        numbers: what follows from them: global_batch, accum_steps, learning_rate, precision.
        lines: about the run, to be printed.
        tables: the terms and what they read.

    Raises:
        SystemExit: on all processes, if the folder cannot be written.
    """
    since = {"epoch": state.epoch, "step": state.step}
    write_description(folder, flags, tables, world, [since | change._asdict() for change in changes])
    notes = add_start(folder, world, data, flags["data_set"], flags["data_path"], **since, **numbers)
    # After the last step of an epoch was saved, its line and its points are written again.
    first_step = state.epoch * data.num_steps + min(state.step, data.num_steps - 1)
    log = RunLog(folder, world, flags["tensorboard"], state.epoch, first_step, start.unwritten_log)
    from_step = f" (from step {state.step} of {data.num_steps} on)" if state.step else ""
    autocast = numbers["precision"] if numbers["precision"] != "float32" else "off"
    log.print("\n".join([
        *environment_lines(world, flags["seed"]),
        f"model {flags['model']}: {state.num_parameters:,} parameters, {data.num_classes} classes, autocast {autocast}",
        *data.lines(),
        f"{numbers['global_batch']} images per optimizer step, learning rate {numbers['learning_rate']:g}, "
        f"epochs {state.epoch}{from_step} to {state.scheduler.num_epochs - 1}",
        *start.notes,
        *(f"warning: {note}" for note in notes),
        *(f"changed since the checkpoint: {change}" for change in changes),
        *lines,
        tables,
    ]))  # fmt: skip
    log.texts(
        {"flags": "\n".join(f"{name}: {value}" for name, value in flags.items()), "objective": tables}, first_step
    )
    return log


def end_run(
    folder: Path | None, log: RunLog, state: TrainState, data: Data, flags: dict, draw_curves: Callable[[Path], None],
    record: dict, test_stats: dict[str, float], predictions: Predictions | None = None,
):  # fmt: skip
    """Print the last epoch's terms and accuracies, and write the records that only a finished run has.

    Args:
        draw_curves: draws the curves of a run folder.
        record: of the last epoch; empty if this process trained none.
        predictions: of the last evaluation, to be saved; every process has them.
    """
    seconds, num_epochs = round(state.seconds), state.scheduler.num_epochs
    lines = [terms_table(record), f"training time {datetime.timedelta(seconds=seconds)}", accuracy_line(test_stats)]
    log.print("\n".join(filter(None, lines)))
    arrays = predictions and predictions.gather()
    if folder:
        with final_records(folder):
            log.hyperparameters(flags, test_stats, num_epochs * data.num_steps - 1)
            log.close()
            draw_curves(folder)
            if arrays:
                write_predictions(arrays, folder, num_epochs - 1)
            write_summary(folder, num_epochs, seconds, test_stats)
        log.print(f"run folder: {folder}")
