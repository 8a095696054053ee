"""`benchmark.py host`: what the host does in a training step, for models whose step is no longer than that."""

import contextlib
import pkgutil
import statistics
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from unittest import mock

from reports.tables import print_rows
from utils import World

from . import training_steps
from .measure import clock, now

PARTS = {
    "draws of mixing and erasing": ["pipeline.batch_augmentation.BatchAugmentation.draw"],
    "seeds of the step": ["engine.reseed"],
    "forward pass": ["diversity.loss.DiverseLoss.forward"],
    "backward pass": ["torch.Tensor.backward"],
    "norm of the gradients": ["torch.nn.utils.get_total_norm"],
    "check for non-finite values": ["training.guard.FiniteGuard.check", "training.guard.FiniteGuard.report_pending"],
    "optimizer": ["training.update.step_if", "torch.optim.Optimizer.zero_grad"],
    "average of the weights": ["torch._foreach_lerp_"],
    "means and console": ["training.meters.EpochTotals.add", "training.progress.Progress.end_step"],
}
"""{part: functions that it consists of}; what else a step does is in the last row of the table."""

OTHER, ALL = "everything else", "all"
WARM_UP = 5  # steps, which compile and record CUDA graphs


def compare_host_work(own: Namespace, args: Namespace, world: World) -> dict:
    """Microseconds of the host for each part of a step.

    Each step begins when the device has finished the one before, so on a GPU this is the time of launches alone; on a
    CPU the parts compute too.
    """
    spent, times = Counter(), {name: [] for name in (*PARTS, OTHER, ALL)}
    num_steps = own.steps or 30
    begin = 0.0

    def after_step():
        nonlocal begin
        spent[ALL] = clock() - begin
        spent[OTHER] = spent[ALL] - sum(spent[name] for name in PARTS)
        for name, values in times.items():
            values.append(1e6 * spent[name])
        spent.clear()
        begin = now(world.device)

    with timed(spent):
        training_steps.diversified(args, world, after_step=after_step)(WARM_UP + own.rounds * num_steps)
    print(f"{args.model}, batch {args.batch_size}, medians of {own.rounds * num_steps} steps\n")
    rows = {name: {"us": statistics.median(values[WARM_UP:])} for name, values in times.items()}
    columns = {"microseconds": ("us", "{:,.0f}".format), "of all": ("us", lambda us: f"{us / rows[ALL]['us']:.1%}")}
    return {"host": print_rows("part", [*rows], rows.values(), columns)}


@contextlib.contextmanager
def timed(spent: Counter) -> Iterator[None]:
    """Within, the seconds of each of `PARTS` are added to `spent`."""

    def stopwatch(function: Callable, name: str) -> Callable:
        def run(*args, **kwargs):
            start = clock()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += clock() - start

        return run

    with contextlib.ExitStack() as stack:
        for name, functions in PARTS.items():
            for function in functions:
                original = pkgutil.resolve_name(function)
                stack.enter_context(mock.patch(function, stopwatch(original, name)))
        yield
