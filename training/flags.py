"""Every flag of main.py, in groups, with its unit, default and off value.

The names are DeiT's and the released code's. `--output_dir` and `--output-dir` are the same flag; `--x/--no-x` switch.
"""

import argparse
from argparse import BooleanOptionalAction as Switch

from diversity import ALIASES, MIXING_BALANCES, MIXING_WHERE, PRESETS, REGULARIZERS, REMEDIES, WEIGHT_GROUPS
from diversity.classification import MIXING
from models.flag_types import KeyValues, positive_float, positive_int
from training.data_flags import add_augmentation, add_data, add_preprocessing
from training.flag_actions import names_of
from training.optimizer_flags import add_finetuning, add_optimizer, add_schedule
from training.parsing import (
    Parser,
    device_name,
    flag_of,
    fraction,
    fraction_below_one,
    group_list,
    layer_list,
    literal,
    none_or_text,
    nonneg_float,
    nonneg_int,
    seed_int,
)

REMOVED = {
    "--fused-opt": "AdamW and Adam always take a step in one kernel",
    "--decode-once": "an image is always decoded once for its repeated augmentations in a batch",
}

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")

DEIT_3 = ("--bce-loss", "--ThreeAugment", "--src", "--attn-only", "--cosub")
"""Flags of later recipes in DeiT's repository, which are refused by name."""


def build_parser() -> Parser:
    """The parser of every flag, with the presets' defaults."""
    parser = Parser(
        prog="main.py",
        description="Train or evaluate a timm vision transformer with diversity regularizers.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
        presets={
            name: {f"{term}_coef": coef for term, coef in preset.coefs.items()} | preset.settings
            for name, preset in PRESETS.items()
        },
        removed=REMOVED,
        refused=dict.fromkeys(DEIT_3, "it belongs to DeiT III; this program has the recipe of DeiT of 2021"),
    )
    for add_group in (
        _run, _speed, _model, _diversity, add_optimizer, add_finetuning, add_schedule, add_augmentation,
        add_preprocessing, _distillation, add_data, _launcher,
    ):  # fmt: skip
        add_group(parser)
    return parser


def _run(parser):
    add = parser.add_argument_group("run").add_argument
    add("--config", metavar="YAML",
        help="flags from a file such as a recipe or a run's args.yaml; the command line overrides it")  # fmt: skip
    add("--output-dir", default="", metavar="DIR",
        help="run folder for log, checkpoints and curves; empty = nothing saved")  # fmt: skip
    add("--resume", default="", metavar="FILE",
        help="continue from a checkpoint.pth (or evaluate it, with --eval); "
        "auto = the newest undamaged one of --output-dir, or start if there is none")  # fmt: skip
    add("--resume-with-changes", action=Switch, default=False,
        help="continue although flags or images differ that change the training; changes.jsonl keeps them")  # fmt: skip
    add("--save-every-steps", type=nonneg_int, default=0, metavar="STEPS",
        help="optimizer steps between saves within an epoch; 0 = none")  # fmt: skip
    add("--save-every-minutes", type=nonneg_float, default=10.0, metavar="MINUTES",
        help="minutes between saves within an epoch; 0 = none")  # fmt: skip
    add("--keep-checkpoints", type=positive_int, default=2, metavar="N", help="checkpoint.pth and the N - 1 before it")
    add("--eval", action=Switch, default=False, help="evaluate only")
    add("--check-data", action=Switch, default=False,
        help="read all images of both splits once, list those that cannot be read, and stop")  # fmt: skip
    add("--dry-run", action=Switch, default=False,
        help="build everything, take a step, evaluate all validation images and stop; nothing is written")  # fmt: skip
    add("--epochs", type=positive_int, default=300, help="epochs of the schedule, before any cool-down")
    add("--start-epoch", type=nonneg_int, default=0, help="first epoch; --resume sets it")
    add("--batch-size", type=positive_int, default=64, help="images per process and step")
    add("--accum-steps", type=positive_int, default=1, help="batches accumulated per optimizer step; 1 = off")
    add("--seed", type=seed_int, default=0,
        help="of weights, data order, augmentation, mixing, dropout and start vectors")  # fmt: skip
    add("--deterministic", action=Switch, default=False,
        help="repeat a run bit for bit on a GPU too, more slowly")  # fmt: skip
    add("--device", type=device_name, default="auto", metavar="{auto,cuda,cpu}", help="auto = cuda where there is one")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto",
        help="autocast; auto = bf16 on a GPU that has it, fp16 on another, off on CPU")  # fmt: skip
    add("--model-ema", action=Switch, default=True, help="keep and evaluate averaged weights")
    add("--model-ema-decay", type=fraction, default=0.99996, help="decay of the average per optimizer step")
    add("--model-ema-warmup", action=Switch, default=False,
        help="begin with a small decay that grows with the steps, as timm's ModelEmaV3 does")  # fmt: skip
    add("--model-ema-force-cpu", action=Switch, default=False,
        help="keep and evaluate the average on the CPU")  # fmt: skip
    add("--max-nonfinite-steps", type=nonneg_int, default=100, help="skipped non-finite steps before training stops")
    add("--log-interval", type=nonneg_int, default=50, help="steps between console lines; 0 = one line an epoch")
    add("--redundancy-every", type=nonneg_int, default=0, metavar="EPOCHS",
        help="epochs between measurements of redundancy on fixed validation images; 0 = off")  # fmt: skip
    add("--grad-norms-every", type=nonneg_int, default=0, metavar="EPOCHS",
        help="epochs between measurements of each term's gradient norm, on the first batch of the epoch; each takes a "
        "forward pass and a backward pass per term, with the paper's five terms about four steps; 0 = off")  # fmt: skip
    add("--save-predictions", action=Switch, default=False,
        help="save the predicted class of each validation image, its confidence and loss after the last epoch: "
        "predictions.npz")  # fmt: skip
    add("--tensorboard", action=Switch, default=True, help="write events into the run folder")


def _speed(parser):
    add = parser.add_argument_group("speed", "the same training, faster or in less memory").add_argument
    add("--compile", action=Switch, default=None,
        help="torch.compile, model and objective in one graph; None = on GPUs if no term reads gradients, and in eager "
        "mode where it fails")  # fmt: skip
    add("--compile-mode", choices=COMPILE_MODES, default="default",
        help="of torch.compile, on a GPU: reduce-overhead = launch the step as CUDA graphs, for small models, whose "
        "time is that of launches; max-autotune = this, and choose kernels by timing, for minutes")  # fmt: skip
    add("--fused-attn", action=Switch, default=True,
        help="scaled-dot-product attention in every block whose maps no term reads")  # fmt: skip
    add("--residual-dtype", choices=("float32", "bfloat16"), default="float32",
        help="of the tokens between blocks under bfloat16 autocast; bfloat16 moves fewer bytes and rounds")  # fmt: skip
    add("--patch-product", action=Switch, default=False,
        help="patch embedding as one matrix product instead of a convolution; equal up to rounding")  # fmt: skip
    add("--channels-last", action=Switch, default=False,
        help="images and weights of convolutions in channels-last memory format; equal up to rounding")  # fmt: skip
    add("--tf32", action=Switch, default=False,
        help="TF32 products of float32 matrices on a GPU: with --amp off, and in terms on weights")  # fmt: skip
    add("--prefetcher", action=Switch, default=None,
        help="send bytes to the device ahead of the step; normalise and erase there; None = on a GPU")  # fmt: skip
    add("--static-graph", action=Switch, default=True,
        help="DistributedDataParallel's static graph; off with --accum-steps")  # fmt: skip
    add("--grad-checkpointing", action=Switch, default=False,
        help="recompute activations in the backward pass: less memory, more time")  # fmt: skip
    add("--fast-crop", action=Switch, default=True,
        help="resize training crops with torch's kernel for bytes; some values differ by 1 or 2 of 255")  # fmt: skip
    add("--repeats-together", action=Switch, default=False,
        help="all repeated augmentations of an image on one rank, not one on each; same global batches")  # fmt: skip


def _model(parser):
    add = parser.add_argument_group("model").add_argument
    add("--model", default="deit_base_patch16_224", help="any timm name; those of the paper's models end in _diverse")
    add("--input-size", type=positive_int, default=224, help="side of the square input in pixels")
    add("--patch-size", type=positive_int, default=None, help="side of a patch in pixels; None = the model's default")
    add("--model-kwargs", nargs="*", action=KeyValues, default={}, metavar="KEY=VALUE",
        help="further arguments of the timm model, e.g. depth=6 embed_dim=96")  # fmt: skip
    formulas = "; ".join(f"{remedy.name} = {remedy.formula.rstrip('.')}" for remedy in REMEDIES.values())
    add("--remedy", nargs="*", action=names_of(REMEDIES), default=[], metavar="NAME",
        help=f"other papers' changes of attention and residual branches: {formulas}".replace("%", "%%"))  # fmt: skip
    settings = (
        f"{setting} of {remedy.name} ({default}): {remedy.setting_help(setting)}"
        for remedy in REMEDIES.values()
        for setting, default in remedy.settings.items()
    )
    add("--remedy-kwargs", nargs="*", action=KeyValues, default={}, metavar="KEY=VALUE",
        help=f"settings of the chosen remedies: {'; '.join(settings)}".replace("%", "%%"))  # fmt: skip
    add("--drop", type=fraction_below_one, default=0.0, help="dropout rate; 0 = off")
    add("--drop-path", type=fraction_below_one, default=0.1, help="stochastic depth rate; 0 = off")


def _diversity(parser):
    group = parser.add_argument_group(
        "diversity", "coefficients, finite and >= 0; 0 = not computed. The paper's value is in brackets."
    )
    add = group.add_argument
    presets = "; ".join(f"{name} = {preset.doc}" for name, preset in PRESETS.items())
    add("--preset", type=_preset, default=None, help=f"defaults for the flags of this group: {presets}; None = all off")
    add(f"--{MIXING}-coef", type=nonneg_float, default=0.0, metavar="COEF",
        help="patch mixing: weight of each patch token's loss beside the class token's [1]")  # fmt: skip
    add("--mixing-balance", choices=MIXING_BALANCES, default="tokens",
        help="tokens = one weight for each token, as released; equal = for class token and patches")  # fmt: skip
    add("--mixing-where", choices=MIXING_WHERE, default="always",
        help="images whose patches get a loss: always = all, as released; cutmix = those that CutMix has cut, in which "
        "the labels of the patches differ")  # fmt: skip
    add("--diversity-warmup", type=nonneg_int, default=0, metavar="EPOCHS",
        help="epochs over which all coefficients of this group grow linearly from 0; 0 = off")  # fmt: skip
    add("--diversity-until", type=positive_int, default=None, metavar="EPOCH",
        help="first epoch whose coefficients are 0; the terms are still computed and logged; None = off")  # fmt: skip
    for term in REGULARIZERS.values():
        paper = f"[{term.coef:g}]" if term.coef else "[off]"
        add(flag_of(f"{term.name}_coef"), type=nonneg_float, default=0.0, metavar="COEF",
            help=f"{term.formula} {paper}".replace("%", "%%"))  # fmt: skip
    for alias, name in ALIASES.items():
        add(flag_of(f"{alias}_coef"), type=nonneg_float, default=0.0, metavar="COEF",
            help=f"another name of {flag_of(f'{name}_coef')}")  # fmt: skip
    add("--emb-layers", type=layer_list, default="last", metavar="LAYERS",
        help="blocks whose output embedding terms read: first, last, all, or a list such as 0,5,11")  # fmt: skip
    add("--attn-layers", type=layer_list, default="first", metavar="LAYERS",
        help="blocks whose maps attention terms read; cross-layer terms read their first and last")  # fmt: skip
    add("--weight-groups", type=group_list, default="qkv", metavar="GROUPS",
        help=f"matrices that weight_mha terms read, a list of {','.join(WEIGHT_GROUPS)}")  # fmt: skip
    options = {option: term for term in reversed(REGULARIZERS.values()) for option in term.options}
    for option, term in options.items():
        add(flag_of(option), help=term.option_help(option).replace("%", "%%"), **_option(term.options[option]))


def _option(default: object) -> dict[str, object]:
    """Arguments of `add_argument` for an option of a term, of the type of its default."""
    match default:
        case bool():
            return {"default": default, "action": Switch}
        case int():
            return {"default": default, "type": positive_int if default >= 1 else int}
        case float():
            return {"default": default, "type": nonneg_float if default >= 0 else float}
        case str():
            return {"default": default, "type": str}
        case tuple():
            return {"default": [*default], "type": literal, "nargs": "*"}
        case _:
            return {"default": default, "type": literal}


def _preset(text: str) -> str | None:
    name = none_or_text(text)
    if name not in (None, *PRESETS):
        raise argparse.ArgumentTypeError(f"unknown preset {text!r}; there are {', '.join(PRESETS)}")
    return name


def _distillation(parser):
    add = parser.add_argument_group("distillation").add_argument
    add("--distillation-type", choices=("none", "soft", "hard"), default="none", help="from a teacher; none = off")
    add("--teacher-model", default="regnety_160", help="timm name of the teacher")
    add("--teacher-path", default="", metavar="FILE", help="weights of the teacher")
    add("--distillation-alpha", type=fraction, default=0.5, help="weight of the teacher in the loss, 0 to 1")
    add("--distillation-tau", type=positive_float, default=1.0, help="temperature of soft distillation")


def _launcher(parser):
    add = parser.add_argument_group(
        "launcher", "accepted for the command lines of DeiT and of the released code; torchrun's variables decide"
    ).add_argument
    add("--dist-url", default="env://", help="rendezvous of the process group")
    add("--world-size", type=positive_int, default=1, help="no effect")
    add("--local-rank", type=int, default=None, help=argparse.SUPPRESS)
    add("--scale-lr-flag", action=Switch, default=False,
        help="no effect: --lr is scaled unless --unscale-lr is given")  # fmt: skip
    add("--resplit", action=Switch, default=False, help="no effect")
