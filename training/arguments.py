"""Every flag of main.py, in groups, with its unit, default and off value; and the checks across flags.

The names are DeiT's and the released code's. `--output_dir` and `--output-dir` are the same flag; `--x/--no-x` switch.
"""

import argparse
import sys

import timm.optim
import torch

from diversity import ALIASES, MIXING_BALANCES, PRESETS, REGULARIZERS, WEIGHT_GROUPS, resolve_aliases
from diversity.mixing import MODES
from diversity.objective import MIXING
from diversity.spelling import did_you_mean
from pipeline.sources import SOURCE_FLAGS, find_source, sources_help
from training.parsing import (
    KeyValues,
    Parser,
    below_one,
    coefficient,
    count,
    device,
    flag_of,
    layers,
    literal,
    or_none,
    positive,
    seed,
    share,
    weight_groups,
    whole,
)

DISTILLATION_TYPES = ("none", "soft", "hard")
HAVE_FLAGS = {
    "img_size": "--input-size",
    "input_size": "--input-size",
    "patch_size": "--patch-size",
    "num_classes": "--num-classes",
    "drop": "--drop",
    "drop_rate": "--drop",
    "drop_path": "--drop-path",
    "drop_path_rate": "--drop-path",
    "pretrained": "--finetune",
    "checkpoint_path": "--finetune",
    "name": "--model",
    "flag": "--model",
}  # what --model-kwargs may not hold
NOT_REPEATED = ("config", "resume", "start_epoch", "local_rank")  # left out of args.yaml, which starts the run anew


def parse_args(argv: list[str] | None = None, config: dict | None = None) -> argparse.Namespace:
    """Flags from the command line, over those of `--config` or `config`, over the defaults; checked.

    Raises:
        SystemExit: an unknown flag, a value out of range, or flags that contradict each other.
    """
    parser = build_parser()
    args = parser.parse(sys.argv[1:] if argv is None else argv, config)
    _check(parser, args)
    return args


def coefficients(args: argparse.Namespace) -> dict[str, float]:
    """{term: coefficient} for every term and for mixing."""
    return resolve_aliases({name: getattr(args, f"{name}_coef") for name in (MIXING, *REGULARIZERS, *ALIASES)})


def term_options(args: argparse.Namespace) -> dict[str, object]:
    """{option: value} for every setting that some term has."""
    values = {option: getattr(args, option) for term in REGULARIZERS.values() for option in term.options}
    return {option: tuple(value) if isinstance(value, list) else value for option, value in values.items()}


def repeatable(args: argparse.Namespace) -> dict[str, object]:
    """The flags that start the same run anew, for args.yaml."""
    return {name: value for name, value in vars(args).items() if name not in NOT_REPEATED}


def without_effect(args: argparse.Namespace, amp_dtype: torch.dtype | None = torch.bfloat16) -> list[str]:
    """One line for each flag that was set and has no effect beside another flag, or beside the autocast dtype."""
    default = build_parser().parse(["--preset", args.preset or "none"])
    cutmix = args.cutmix > 0 or args.cutmix_minmax
    small = args.input_size <= 32
    optimizer = _optimizer_info(args.opt)
    source = find_source(args.data_set)
    active = [term for name, term in REGULARIZERS.items() if coefficients(args)[name] > 0]
    reads = {tap for term in active for tap in term.reads}
    idle = [
        (not args.mixing_coef, "mixing_balance", "--mixing-coef is 0"),
        ("last" not in reads, "emb_layers", "no term that reads chosen embeddings is on"),
        ("attention" not in reads, "attn_layers", "no term that reads chosen attention maps is on"),
        ("weights" not in reads, "weight_groups", "no term on weights is on"),
        *((not any(option in term.options for term in active), option, "no term that has it is on")
          for option in term_options(args)),
        (args.distillation_type == "none", "teacher_model teacher_path distillation_alpha distillation_tau",
         "--distillation-type is none"),
        (args.distillation_type == "hard", "distillation_tau", "only soft distillation has a temperature"),
        (not args.model_ema, "model_ema_decay model_ema_force_cpu", "--no-model-ema"),
        (not (args.mixup or cutmix), "mixup_prob mixup_mode", "--mixup and --cutmix are 0"),
        (not (args.mixup and cutmix), "mixup_switch_prob", "--mixup or --cutmix is 0"),
        (args.cutmix_minmax, "cutmix", "--cutmix-minmax takes its place"),
        (args.accum_steps > 1, "static_graph", "--accum-steps keeps some gradients local"),
        (args.device == "cpu", "tf32", "--device is cpu"),
        (amp_dtype != torch.bfloat16, "residual_dtype", "autocast is not bfloat16"),
        (not args.repeated_aug, "aug_repeats decode_once repeats_together", "--no-repeated-aug"),
        (source.is_stream,
         "repeated_aug aug_repeats decode_once repeats_together max_bad_images dist_eval",
         "--data-set streams: its reader skips unreadable images"),
        (args.resume, "start_epoch", "--resume sets it"),
        (not args.output_dir, "tensorboard redundancy_every save_every_steps save_every_minutes keep_checkpoints",
         "nothing is written without --output-dir"),
        (args.reprob == 0, "remode recount", "--reprob is 0"),
        (args.aa and args.aa.startswith("rand"), "color_jitter", "RandAugment (--aa) takes its place"),
        (small, "scale ratio eval_crop_ratio fast_crop", "inputs up to 32 px are resized whole"),
        *((flag not in source.flags, flag, f"--data-set is {args.data_set}") for flag in SOURCE_FLAGS),
        (args.lr_noise is None, "lr_noise_pct lr_noise_std", "--lr-noise is off"),
        (args.sched != "step" and args.sched != "plateau", "decay_rate", f"--sched is {args.sched}"),
        (args.sched != "step", "decay_epochs", f"--sched is {args.sched}"),
        (args.sched != "plateau", "patience_epochs", f"--sched is {args.sched}"),
        (args.warmup_epochs == 0, "warmup_lr", "--warmup-epochs is 0"),
        (not optimizer.has_momentum, "momentum", f"--opt is {args.opt}"),
        (not optimizer.has_eps, "opt_eps", f"--opt is {args.opt}"),
        (not optimizer.has_betas, "opt_betas", f"--opt is {args.opt}"),
        (True, "resplit", "there are no augmentation splits"),
        (True, "world_size", "torchrun decides the number of processes"),
    ]  # fmt: skip
    return [
        f"{flag_of(name)} has no effect: {reason}"
        for condition, names, reason in idle
        if condition
        for name in names.split()
        if getattr(args, name) != getattr(default, name)
    ]


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
    )
    for add_group in (
        _run, _speed, _model, _diversity, _optimizer, _schedule, _augmentation, _distillation, _data, _launcher
    ):  # fmt: skip
        add_group(parser)
    return parser


def _run(parser):
    add = parser.add_argument_group("run").add_argument
    add("--config", metavar="YAML", help="flags from a file such as a run's args.yaml; the command line wins")
    add(
        "--output-dir",
        default="",
        metavar="DIR",
        help="run folder for log, checkpoints and curves; empty = nothing saved",
    )
    add("--resume", default="", metavar="FILE",
        help="continue from a checkpoint.pth (or evaluate it, with --eval); "
        "auto = the newest whole one of --output-dir, or start if there is none")  # fmt: skip
    add("--save-every-steps", type=whole, default=0, metavar="STEPS",
        help="optimizer steps between saves within an epoch; 0 = none")  # fmt: skip
    add("--save-every-minutes", type=coefficient, default=10.0, metavar="MINUTES",
        help="minutes between saves within an epoch; 0 = none")  # fmt: skip
    add("--keep-checkpoints", type=count, default=2, metavar="N", help="checkpoint.pth and the N - 1 before it")
    add("--finetune", default="", metavar="FILE", help="start from these weights; a head of another size is dropped")
    add("--eval", action=argparse.BooleanOptionalAction, default=False, help="evaluate only")
    add("--epochs", type=count, default=300, help="epochs of the schedule, before any cool-down")
    add("--start-epoch", type=whole, default=0, help="first epoch; --resume sets it")
    add("--batch-size", type=count, default=64, help="images per process and step")
    add("--accum-steps", type=count, default=1, help="batches accumulated per optimizer step; 1 = off")
    add("--seed", type=seed, default=0, help="of weights, data order, augmentation, mixing, dropout and probes")
    add("--deterministic", action=argparse.BooleanOptionalAction, default=False,
        help="have a GPU repeat a run bit for bit, more slowly; a CPU does so anyway")  # fmt: skip
    add("--device", type=device, default="auto", metavar="{auto,cuda,cpu}", help="auto = cuda where there is one")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto",
        help="autocast; auto = bf16 on a GPU that has it, fp16 on another, off on CPU")  # fmt: skip
    add("--model-ema", action=argparse.BooleanOptionalAction, default=True, help="keep and evaluate averaged weights")
    add("--model-ema-decay", type=share, default=0.99996, help="per optimizer step")
    add("--model-ema-force-cpu", action=argparse.BooleanOptionalAction, default=False,
        help="keep the average in main memory; it is evaluated there too")  # fmt: skip
    add("--max-nonfinite-steps", type=whole, default=100, help="skipped non-finite steps before training stops")
    add("--log-interval", type=whole, default=50, help="optimizer steps between console lines; 0 = one line an epoch")
    add("--redundancy-every", type=whole, default=0, metavar="EPOCHS",
        help="epochs between measurements of redundancy on fixed validation images, and the last; 0 = off")  # fmt: skip
    add("--tensorboard", action=argparse.BooleanOptionalAction, default=True, help="write events into the run folder")


def _speed(parser):
    add = parser.add_argument_group("speed", "the same training, faster or in less memory").add_argument
    switch = argparse.BooleanOptionalAction
    add("--compile", action=switch, default=None,
        help="torch.compile, model and objective in one graph; None = on GPUs if no term reads gradients, and in eager "
        "mode where it fails")  # fmt: skip
    add("--fused-attn", action=switch, default=True,
        help="scaled-dot-product attention in every block whose maps no term reads")  # fmt: skip
    add("--fused-opt", action=switch, default=True, help="one kernel for a step of AdamW and Adam")
    add("--residual-dtype", choices=("float32", "bfloat16"), default="float32",
        help="of tokens between blocks under bfloat16 autocast; bfloat16 moves fewer bytes, and rounds")  # fmt: skip
    add("--patch-product", action=switch, default=False,
        help="the patch embedding as one matrix product, not a convolution; same numbers up to rounding")  # fmt: skip
    add("--channels-last", action=switch, default=False,
        help="images and weights of convolutions in memory pixel by pixel; same numbers up to rounding")  # fmt: skip
    add("--tf32", action=switch, default=False,
        help="products of float32 matrices on a GPU with 10 bits of mantissa: --amp off, terms on weights")  # fmt: skip
    add("--prefetcher", action=switch, default=None,
        help="send bytes to the device ahead of the step; normalise and erase there; None = on a GPU")  # fmt: skip
    add("--static-graph", action=switch, default=True,
        help="DistributedDataParallel's static graph; off with --accum-steps")  # fmt: skip
    add("--grad-checkpointing", action=switch, default=False,
        help="compute activations again in the backward pass: less memory, more time")  # fmt: skip
    add("--fast-crop", action=switch, default=True,
        help="resize training crops by torch's kernel for bytes; some values differ by 1 or 2 of 255")  # fmt: skip
    add("--decode-once", action=switch, default=True,
        help="decode an image once for those of its repeated augmentations that are in one batch")  # fmt: skip
    add("--repeats-together", action=switch, default=False,
        help="put an image's repeated augmentations on one rank, not on one each; same global batches")  # fmt: skip


def _model(parser):
    add = parser.add_argument_group("model").add_argument
    add("--model", default="deit_base_patch16_224", help="any timm name; the paper's end in _diverse")
    add("--input-size", type=count, default=224, help="side of the square input in pixels")
    add("--patch-size", type=count, default=None, help="side of a patch in pixels; None = the model's own")
    add("--model-kwargs", nargs="*", action=KeyValues, default={}, metavar="KEY=VALUE",
        help="further arguments of the timm model, e.g. depth=6 embed_dim=96")  # fmt: skip
    add("--drop", type=below_one, default=0.0, help="dropout rate; 0 = off")
    add("--drop-path", type=below_one, default=0.1, help="stochastic depth rate; 0 = off")


def _diversity(parser):
    group = parser.add_argument_group(
        "diversity", "coefficients, finite and >= 0; 0 = not computed. In brackets the paper's value."
    )
    add = group.add_argument
    presets = "; ".join(f"{name} = {preset.doc}" for name, preset in PRESETS.items())
    add("--preset", type=_preset, default=None, help=f"defaults for the flags of this group: {presets}; None = all off")
    add(f"--{MIXING}-coef", type=coefficient, default=0.0, metavar="COEF",
        help="patch mixing: weight of each patch token's loss beside the class token's [1]")  # fmt: skip
    add("--mixing-balance", choices=MIXING_BALANCES, default="tokens",
        help="tokens = all tokens weigh alike, as released; equal = the patches' mean as the class token")  # fmt: skip
    for term in REGULARIZERS.values():
        paper = f"[{term.coef:g}]" if term.coef else "[off]"
        add(
            flag_of(f"{term.name}_coef"),
            type=coefficient,
            default=0.0,
            metavar="COEF",
            help=f"{term.formula} {paper}".replace("%", "%%"),
        )
    for alias, name in ALIASES.items():
        add(flag_of(f"{alias}_coef"), type=coefficient, default=0.0, metavar="COEF",
            help=f"another name of {flag_of(f'{name}_coef')}")  # fmt: skip
    add("--emb-layers", type=layers, default="last", metavar="LAYERS",
        help="blocks whose output embedding terms read: first, last, all, or a list such as 0,5,11")  # fmt: skip
    add("--attn-layers", type=layers, default="first", metavar="LAYERS",
        help="blocks whose maps attention terms read, likewise; cross-layer terms take first and last")  # fmt: skip
    add("--weight-groups", type=weight_groups, default="qkv", metavar="GROUPS",
        help=f"matrices that weight terms read, some of {','.join(WEIGHT_GROUPS)}")  # fmt: skip
    options = {option: term for term in reversed(REGULARIZERS.values()) for option in term.options}
    for option, term in options.items():
        add(flag_of(option), help=term.option_help(option).replace("%", "%%"), **_option(term.options[option]))


def _option(default: object) -> dict[str, object]:
    """Arguments of `add_argument` for an option of a term with this default, which says its type."""
    match default:
        case bool():
            return {"default": default, "action": argparse.BooleanOptionalAction}
        case int():
            return {"default": default, "type": count if default >= 1 else int}
        case float():
            return {"default": default, "type": coefficient if default >= 0 else float}
        case str():
            return {"default": default, "type": str}
        case tuple():
            return {"default": [*default], "type": literal, "nargs": "*"}
        case _:
            return {"default": default, "type": literal}


def _preset(text: str) -> str | None:
    name = or_none(text)
    if name not in (None, *PRESETS):
        raise argparse.ArgumentTypeError(f"unknown preset {text!r}; there are {', '.join(PRESETS)}")
    return name


def _optimizer(parser):
    add = parser.add_argument_group("optimizer").add_argument
    add("--opt", default="adamw", help="any timm optimizer")
    add("--opt-eps", type=positive, default=1e-8, help="epsilon of Adam-like optimizers")
    add("--opt-betas", type=float, nargs="+", default=None, metavar="BETA", help="None = the optimizer's own")
    add("--momentum", type=share, default=0.9, help="of SGD-like optimizers")
    add("--weight-decay", type=coefficient, default=0.05, help="none on biases, norms and tokens; 0 = off")
    add("--clip-grad", type=positive, default=None, metavar="NORM", help="largest gradient norm; None = no clipping")


def _schedule(parser):
    add = parser.add_argument_group(
        "schedule", "stepped after each epoch, as DeiT does: epoch 1 repeats epoch 0's rate"
    ).add_argument
    add("--lr", type=positive, default=5e-4, help="learning rate at 512 images per optimizer step; scaled linearly")
    add("--unscale-lr", action=argparse.BooleanOptionalAction, default=False, help="take --lr as it is")
    add(
        "--sched",
        choices=("cosine", "tanh", "step", "poly", "plateau", "constant"),
        default="cosine",
        help="timm schedule",
    )
    add("--warmup-lr", type=coefficient, default=1e-6, help="rate at the start of warm-up, not scaled")
    add("--warmup-epochs", type=whole, default=5, help="0 = off")
    add("--min-lr", type=coefficient, default=1e-5, help="lowest rate, not scaled")
    add("--cooldown-epochs", type=whole, default=0, help="epochs at --min-lr after the schedule; 0 = off")
    add("--decay-epochs", type=positive, default=30, help="epochs between decays of --sched step")
    add("--decay-rate", "--dr", type=share, default=0.1, help="factor of --sched step and plateau")
    add("--patience-epochs", type=whole, default=10, help="epochs without gain before --sched plateau decays")
    add("--lr-noise", type=float, nargs="+", default=None, metavar="SHARE",
        help="where noise starts (and ends) as shares of the epochs; None = off")  # fmt: skip
    add("--lr-noise-pct", type=coefficient, default=0.67, help="limit of the noise as a share of the rate")
    add("--lr-noise-std", type=coefficient, default=1.0, help="standard deviation of the noise")


def _augmentation(parser):
    add = parser.add_argument_group("augmentation").add_argument
    add("--aa", type=or_none, default="rand-m9-mstd0.5-inc1", metavar="NAME", help="timm auto-augment; none = off")
    add("--color-jitter", type=coefficient, default=0.4, help="where --aa is not RandAugment; 0 = off")
    add("--train-interpolation", choices=("random", "bilinear", "bicubic"), default="bicubic", help="of training crops")
    add("--scale", type=share, nargs=2, default=[0.08, 1.0], metavar=("LOW", "HIGH"), help="area of random crops")
    add(
        "--ratio",
        type=positive,
        nargs=2,
        default=[0.75, 4 / 3],
        metavar=("LOW", "HIGH"),
        help="aspect of random crops",
    )
    add("--hflip", type=share, default=0.5, help="probability of a horizontal flip; 0 = off")
    add("--repeated-aug", action=argparse.BooleanOptionalAction, default=True,
        help="show each drawn image several times, differently augmented")  # fmt: skip
    add("--aug-repeats", type=count, default=3, help="copies of each image under --repeated-aug")
    add("--reprob", type=share, default=0.25, help="probability of random erasing; 0 = off")
    add("--remode", choices=("const", "rand", "pixel"), default="pixel", help="what random erasing fills with")
    add("--recount", type=count, default=1, help="most boxes erased per image")
    add("--smoothing", type=below_one, default=0.1, help="label smoothing; 0 = off")
    add("--mixup", type=coefficient, default=0.8, metavar="ALPHA", help="0 = off")
    add("--cutmix", type=coefficient, default=1.0, metavar="ALPHA", help="0 = off")
    add("--cutmix-minmax", type=share, nargs=2, default=None, metavar=("LOW", "HIGH"),
        help="side of the CutMix box as a share of the image's, in place of --cutmix")  # fmt: skip
    add("--mixup-prob", type=share, default=1.0, help="probability of mixing at all")
    add("--mixup-switch-prob", type=share, default=0.5, help="probability of CutMix where both are on")
    add("--mixup-mode", choices=MODES, default="batch", help="one draw per batch, pair or element")


def _distillation(parser):
    add = parser.add_argument_group("distillation").add_argument
    add("--distillation-type", choices=DISTILLATION_TYPES, default="none", help="none = off")
    add("--teacher-model", default="regnety_160", help="timm name of the teacher")
    add("--teacher-path", default="", metavar="FILE", help="weights of the teacher")
    add("--distillation-alpha", type=share, default=0.5, help="share of the teacher in the classification loss")
    add("--distillation-tau", type=positive, default=1.0, help="temperature of soft distillation")


def _data(parser):
    add = parser.add_argument_group("data").add_argument
    add("--data-set", default="IMNET", metavar="NAME", help=sources_help())
    add("--data-path", default="", metavar="DIR", help="folder that holds the data; not needed by DIGITS and FAKE")
    add("--train-split", "--train-dir", default="train", metavar="NAME", help="sub-folder or split to train on")
    add("--val-split", "--val-dir", default=None, metavar="NAME",
        help="sub-folder or split to evaluate on; None = val (folders) or validation (timm names)")  # fmt: skip
    add("--num-classes", type=count, default=None, help="None = counted; needed where a data set does not say")
    add("--inat-category", default="name", help="iNaturalist label",
        choices=("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name"))  # fmt: skip
    add("--eval-crop-ratio", type=positive, default=0.875, help="centre crop over resized side, above 32 px")
    add(
        "--max-bad-images",
        type=whole,
        default=100,
        help="unreadable training images a process replaces before training stops",
    )
    add(
        "--num-workers",
        type=whole,
        default=None,
        help="loader processes per rank, and half as many for evaluation; None = cores this process may use, on a GPU "
        "less two, / local ranks; at least 1",
    )
    add("--loader-timeout", type=whole, default=600, metavar="SECONDS",
        help="longest wait for a loader process before the run ends with an error; 0 = no limit")  # fmt: skip
    add("--pin-mem", action=argparse.BooleanOptionalAction, default=True, help="page-locked batches, on CUDA")
    add("--dist-eval", action=argparse.BooleanOptionalAction, default=True,
        help="share the evaluation among the ranks; exact, no padding is counted")  # fmt: skip


def _launcher(parser):
    add = parser.add_argument_group(
        "launcher", "kept for DeiT's command lines; torchrun's variables decide"
    ).add_argument
    add("--dist-url", default="env://", help="rendezvous of the process group")
    add("--world-size", type=count, default=1, help="no effect")
    add("--local-rank", type=int, default=None, help=argparse.SUPPRESS)
    add("--resplit", action=argparse.BooleanOptionalAction, default=False, help="no effect")


def _check(parser, args):
    """Flags that contradict each other."""
    try:
        optimizer = _optimizer_info(args.opt)
    except ValueError:
        hint = did_you_mean(args.opt, timm.optim.list_optimizers(), "; timm.optim.list_optimizers() lists them")
        parser.error(f"--opt {args.opt} is unknown{hint}")
    try:
        coefficients(args)
    except ValueError as error:
        parser.error(f"coefficients: {error}")
    if not args.eval and args.batch_size % 2 and (args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax):
        parser.error(
            f"--batch-size {args.batch_size} is odd, but --mixup and --cutmix pair images; "
            "take an even size or --mixup 0 --cutmix 0"
        )
    if args.cond_orth_exact and args.cond_orth_steps == parser.get_default("cond_orth_steps"):
        args.cond_orth_steps = 1  # a preset's
    if args.cond_orth_exact and args.cond_orth_steps > 1:
        parser.error(f"--cond-orth-exact takes no power steps; leave out --cond-orth-steps {args.cond_orth_steps}")
    for name in args.model_kwargs:
        if name in HAVE_FLAGS:
            parser.error(f"--model-kwargs {name}: say it with {HAVE_FLAGS[name]}")
    if args.residual_dtype == "bfloat16" and args.amp in ("fp16", "off"):
        parser.error(f"--residual-dtype bfloat16 goes with --amp bf16, not with --amp {args.amp}")
    if optimizer.second_order:
        parser.error(f"--opt {args.opt} needs second derivatives, which the training step does not keep")
    if args.patch_size and args.input_size % args.patch_size:
        parser.error(f"--input-size {args.input_size} is not divisible by --patch-size {args.patch_size}")
    if args.distillation_type != "none" and not args.teacher_path:
        parser.error(f"--distillation-type {args.distillation_type} needs --teacher-path")
    if args.eval and not (args.resume or args.finetune):
        parser.error("--eval needs the weights to evaluate: --resume or --finetune")
    if args.resume == "auto" and not args.output_dir:
        parser.error("--resume auto looks into --output-dir; give one")
    if args.resume not in ("", "auto") and args.finetune:
        parser.error("--resume and --finetune both say where to start; give one (--resume auto goes with --finetune)")
    if args.cutmix_minmax and args.cutmix_minmax[0] >= args.cutmix_minmax[1]:
        parser.error(f"--cutmix-minmax needs LOW < HIGH; got {args.cutmix_minmax[0]} {args.cutmix_minmax[1]}")
    if args.lr_noise and len(args.lr_noise) > 2:
        parser.error(f"--lr-noise takes where noise starts and where it ends; got {len(args.lr_noise)} values")
    for name in ("scale", "ratio"):
        low, high = getattr(args, name)
        if low > high:
            parser.error(f"--{name} needs LOW <= HIGH; got {low} {high}")
    if args.start_epoch >= args.epochs + args.cooldown_epochs and not args.eval:
        parser.error(f"--start-epoch {args.start_epoch} leaves nothing of --epochs {args.epochs} to train")


def _optimizer_info(name: str) -> timm.optim.OptimInfo:
    return timm.optim.get_optimizer_info(name.lower().removeprefix("lookahead_"))
