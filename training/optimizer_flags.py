"""The flags of main.py about the update of the weights: optimizer, fine-tuning, learning rate."""

from argparse import BooleanOptionalAction as Switch

from models.flag_types import positive_float
from models.freezing import FREEZE
from training.parsing import fraction, nonneg_float, nonneg_int, positive_fraction


def add_optimizer(parser):
    """Add the group of the optimizer to a parser."""
    add = parser.add_argument_group("optimizer").add_argument
    add("--opt", default="adamw", help="any timm optimizer")
    add("--opt-eps", type=positive_float, default=1e-8, help="epsilon of Adam-like optimizers")
    add("--opt-betas", type=float, nargs="+", default=None, metavar="BETA", help="None = the optimizer's default")
    add("--momentum", type=fraction, default=0.9, help="momentum of SGD-like optimizers")
    add("--weight-decay", type=nonneg_float, default=0.05, help="not applied to biases, norms and tokens; 0 = off")
    add("--clip-grad", type=positive_float, default=None, metavar="NORM", help="largest gradient norm; None = off")


def add_finetuning(parser):
    """Add the group of fine-tuning to a parser."""
    add = parser.add_argument_group(
        "fine-tuning", "which weights a run starts from, and how they are trained"
    ).add_argument
    add("--finetune", default="", metavar="FILE", help="start from these weights; a head of another size is dropped")
    add("--checkpoint-key", default="", metavar="KEY",
        help="which weights of a --finetune file that has several, such as teacher or student: a key of the file, or "
        "the beginning of their names; empty = the teacher, or the only ones")  # fmt: skip
    add("--freeze", choices=[*FREEZE], default="none",
        help="; ".join(f"{name} = {doc}" for name, doc in FREEZE.items()))  # fmt: skip
    add("--head-init", type=nonneg_float, default=None, metavar="STD",
        help="a new head, also where --finetune has one: standard deviation of its weights, its biases are 0; 0 = all "
        "weights are 0; None = the model's own initial values, or the head of --finetune")  # fmt: skip
    add("--layer-decay", type=positive_fraction, default=None, metavar="FACTOR",
        help="of the learning rate from each layer to the one before it; the head has --lr; None = one rate for all "
        "layers")  # fmt: skip


def add_schedule(parser):
    """Add the group of the learning rate to a parser."""
    add = parser.add_argument_group(
        "schedule", "stepped after each epoch, as DeiT does: epoch 1 repeats epoch 0's rate"
    ).add_argument
    add("--lr", type=positive_float, default=5e-4, help="learning rate at 512 images per step, scaled linearly")
    add("--unscale-lr", action=Switch, default=False, help="do not scale --lr")
    add("--sched", choices=("cosine", "tanh", "step", "poly", "plateau", "constant"), default="cosine",
        help="timm schedule")  # fmt: skip
    add("--warmup-lr", type=nonneg_float, default=1e-6, help="learning rate at the start of warm-up, not scaled")
    add("--warmup-epochs", type=nonneg_int, default=5, help="epochs of linear warm-up; 0 = off")
    add("--min-lr", type=nonneg_float, default=1e-5,
        help="lowest learning rate, not scaled; --sched step and constant have it in the cool-down only")  # fmt: skip
    add("--cooldown-epochs", type=nonneg_int, default=0, help="epochs at --min-lr after the schedule; 0 = off")
    add("--decay-epochs", type=positive_float, default=30, help="epochs between decays of --sched step")
    add("--decay-rate", "--dr", type=fraction, default=0.1, help="factor of --sched step and plateau; power of poly")
    add("--patience-epochs", type=nonneg_int, default=10, help="epochs without gain before --sched plateau decays")
    add("--lr-noise", type=fraction, nargs="+", default=None, metavar="FRACTION",
        help="where noise starts (and ends), as fractions of the epochs; None = off")  # fmt: skip
    add("--lr-noise-pct", type=fraction, default=0.67, help="limit of the noise as a fraction of the learning rate")
    add("--lr-noise-std", type=nonneg_float, default=1.0, help="standard deviation of the noise")
