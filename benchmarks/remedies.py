"""`benchmark.py remedies`: the cost of a plain training step with each remedy, and with those of stock timm."""

from argparse import Namespace

from diversity import REMEDIES
from engine import autocast_dtype
from reports.tables import print_rows
from utils import World

from . import training_steps
from .steps import PLAIN, STEP_COLUMNS, measured_rows
from .training_steps import with_flags

STOCK = {"attn_layer": "diff", "reg_tokens": 4, "init_values": 1e-5}
"""Arguments of timm's models that are answers to redundancy, one for each row; a further row has another optimizer."""

COLUMNS = ("ms", "time / plain", "peak memory, MiB", "first step, s")


def compare_remedies(own: Namespace, args: Namespace, world: World) -> dict:
    """The plain step, and in turns with it the plain step with each remedy at its defaults.

    A remedy that does not serve the model has a row with the reason.
    """
    precision = str(autocast_dtype(args.amp, world.device) or "torch.float32").removeprefix("torch.")
    rounds = f"medians of {own.rounds} rounds in turns with the plain step"
    print(f"{args.model}, batch {args.batch_size}, {precision}, {rounds}\n")
    args = with_flags(args, remedy=[], remedy_kwargs={})
    choices = {PLAIN: args} | {f"`{name}`": with_flags(args, remedy=[name]) for name in REMEDIES}
    for key, value in STOCK.items():
        choices[f"`--model-kwargs {key}={value}`"] = with_flags(args, model_kwargs={**args.model_kwargs, key: value})
    choices |= {"`--opt muon`": with_flags(args, opt="muon")} | own.variants
    builders = {name: lambda flags=flags: training_steps.plain(flags, world) for name, flags in choices.items()}
    rows = measured_rows(builders, args.batch_size, 0.0, own.rounds, own.steps, world.device)
    return {"remedies": print_rows("step", [*builders], rows, {name: STEP_COLUMNS[name] for name in COLUMNS})}
