"""The flags of a run: parsed, checked, and what follows from them."""

import argparse
import shlex
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import timm.optim

from diversity import ALIASES, REGULARIZERS, resolve_aliases
from diversity.classification import MIXING
from diversity.spelling import did_you_mean
from models.flag_types import with_hyphens
from models.remedies import settings_of
from pipeline.sources import find_source
from training.changes import MODEL, REMEDIES
from training.flag_actions import HAVE_FLAGS
from training.flags import build_parser
from training.parsing import as_typed, flag_of, with_lists, words_of
from training.preprocessing import fill_preprocessing

NOT_REPEATED = ("config", "resume", "resume_with_changes", "start_epoch", "local_rank")
"""Flags that args.yaml leaves out, since it describes how to start the run anew."""

NOT_OF_AN_EVALUATION = (
    *("eval", "output_dir", "finetune", "checkpoint_key", "device", "num_workers", "dist_url", "distillation_type"),
    "save_predictions",
)
"""Further flags that an evaluation does not take from a checkpoint."""


def parse_args(argv: list[str] | None = None, config: dict | None = None) -> argparse.Namespace:
    """Flags from the command line, over those of `--config`, over those of `config`, over the defaults, and checked.

    Raises:
        SystemExit: an unknown flag, a value out of range, or flags that contradict each other.
    """
    parser = build_parser()
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse(argv, config)
    _check(parser, args, on_command_line={with_hyphens(word).partition("=")[0] for word in argv})
    fill_preprocessing(args)
    return args


def defaults() -> dict[str, object]:
    """{flag: default}."""
    return vars(parse_args([]))


def parse_evaluation(argv: list[str] | None, stored: dict, classes: Sequence[str] = ()) -> argparse.Namespace:
    """The flags of an evaluation: those that the checkpoint was trained with, under those of `--config` and `argv`.

    Args:
        stored: flags that the checkpoint was trained with.
        classes: their names in the checkpoint; empty if it does not know them.

    Raises:
        SystemExit: the command line asks for another model than the checkpoint's, or for another number of classes.
    """
    config = {name: value for name, value in stored.items() if name not in (*NOT_REPEATED, *NOT_OF_AN_EVALUATION)}
    args = parse_args(argv, config)
    check_model(args, stored, (*MODEL, *REMEDIES), "the checkpoint's model")
    num_outputs = stored.get("num_classes") or len(classes)
    if classes and args.num_classes not in (None, num_outputs):
        raise SystemExit(
            f"error: --num-classes is {args.num_classes}, but the checkpoint's model has {num_outputs} classes; "
            "leave the flag out: images of some of them are matched by name"
        )
    check_val_fraction(args, stored)
    return args


def check_model(args: argparse.Namespace, stored: dict, names: tuple[str, ...], owner: str):
    """Raise SystemExit if flags `names` are not those that a model was trained with, `stored`, where that is known."""
    known = {**defaults(), **stored} if stored else {}  # an earlier version lacks flags, which were at their defaults
    for name in names:
        if name in known and with_lists(getattr(args, name)) != with_lists(known[name]):
            raise SystemExit(
                f"error: {flag_of(name)} is {as_typed(getattr(args, name))}, but {owner} has {as_typed(known[name])}; "
                "leave the flag out, also of a --config"
            )


def check_val_fraction(args: argparse.Namespace, stored: dict):
    """Raise SystemExit if weights trained with the flags `stored` would be evaluated on images of their training."""
    if line := seen_in_training(args, stored):
        raise SystemExit(f"error: {line}; leave --val-fraction out, or give 0 to evaluate on --val-split")


def seen_in_training(args: argparse.Namespace, stored: dict) -> str:
    """A line if the validation part has images of the training with the flags `stored`; otherwise empty."""
    ours, theirs = args.val_fraction, stored.get("val_fraction", 0.0)
    is_same_set = all(getattr(args, name) == stored.get(name) for name in ("data_set", "train_split"))
    if not is_same_set or ours in (0, theirs):
        return ""
    line = f"--val-fraction {ours} has images that the weights were trained on, with --val-fraction {theirs}"
    path, other = args.data_path, stored.get("data_path", args.data_path)
    is_same_folder = Path(path).name == Path(other).name  # it may have moved
    return line if is_same_folder else f"{line}, if --data-path {path} has the images of {other}"


def coefficients(args: argparse.Namespace) -> dict[str, float]:
    """{term: coefficient} for every term and for mixing."""
    return resolve_aliases({name: getattr(args, f"{name}_coef") for name in (MIXING, *REGULARIZERS, *ALIASES)})


def term_options(args: argparse.Namespace) -> dict[str, object]:
    """{option: value} for every setting that some term has."""
    options = {option: getattr(args, option) for term in REGULARIZERS.values() for option in term.options}
    options = {option: tuple(value) if isinstance(value, list) else value for option, value in options.items()}
    if args.cond_orth_exact:  # takes no power steps; those are a preset's
        options["cond_orth_steps"] = 1
    return options


def repeatable(args: argparse.Namespace) -> dict[str, object]:
    """The flags that start the same run anew, for args.yaml."""
    return {name: value for name, value in vars(args).items() if name not in NOT_REPEATED}


def config_lines(args: argparse.Namespace) -> list[str]:
    """What a run with `--config` resolved to: the flags that differ from the defaults, as words of a command line."""
    if not args.config:
        return []
    default = vars(parse_args(["--preset", args.preset or "none"])) | {"preset": None}
    words = [
        word
        for name, value in repeatable(args).items()
        if name != "output_dir" and value != default[name]
        for word in words_of(name, value)
    ]
    text = f"config {args.config}: {shlex.join(words) or 'all flags have their defaults'}"
    return textwrap.wrap(text, 100, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _check(parser, args, on_command_line: set[str]):
    """Flags that contradict each other."""
    _check_model(parser, args)
    _check_data(parser, args, on_command_line)
    _check_weights(parser, args, on_command_line)
    _check_schedule(parser, args)


def _check_model(parser, args):
    """Optimizer, terms, remedies and arguments of the model."""
    try:
        optimizer = optimizer_info(args.opt)
    except ValueError:
        hint = did_you_mean(args.opt, timm.optim.list_optimizers(), "; timm.optim.list_optimizers() lists them")
        parser.error(f"--opt {args.opt} is unknown{hint}")
    try:
        coefficients(args)
    except ValueError as error:
        parser.error(f"coefficients: {error}")
    without_gradient = [flag_of(f"{name}_coef") for name, coef in coefficients(args).items() if coef and name != MIXING]
    if args.freeze == "backbone" and without_gradient and not args.eval:
        parser.error(
            f"--freeze backbone leaves no gradient to {', '.join(without_gradient)}, which read the backbone alone; "
            "leave them out (--preset none), or train the backbone"
        )
    if args.cond_orth_exact and args.cond_orth_steps not in (1, parser.get_default("cond_orth_steps")):
        parser.error(f"--cond-orth-exact takes no power steps; leave out --cond-orth-steps {args.cond_orth_steps}")
    for name in args.model_kwargs:
        if name in HAVE_FLAGS:
            parser.error(f"--model-kwargs {name}: use {HAVE_FLAGS[name]}")
    try:
        settings_of(args.remedy, args.remedy_kwargs)
    except ValueError as error:
        parser.error(f"--remedy-kwargs: {error}")
    if args.residual_dtype == "bfloat16" and args.amp in ("fp16", "off"):
        parser.error(f"--residual-dtype bfloat16 needs --amp bf16, not --amp {args.amp}")
    if optimizer.second_order:
        parser.error(f"--opt {args.opt} needs second derivatives, which the training step does not keep")
    if args.patch_size and args.input_size % args.patch_size:
        parser.error(f"--input-size {args.input_size} is not divisible by --patch-size {args.patch_size}")
    if args.distillation_type != "none" and not args.teacher_path:
        parser.error(f"--distillation-type {args.distillation_type} needs --teacher-path")


def _check_data(parser, args, on_command_line: set[str]):
    """Batches, augmentation, and what a data set must have."""
    if not args.eval and args.batch_size % 2 and (args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax):
        parser.error(
            f"--batch-size {args.batch_size} is odd, but --mixup and --cutmix pair images; "
            "take an even size or --mixup 0 --cutmix 0"
        )
    if args.cache_images != "none" and find_source(args.data_set).is_stream and not args.eval:
        parser.error(f"--cache-images needs images with numbers, but --data-set {args.data_set} streams")
    if args.val_fraction and find_source(args.data_set).is_stream:
        parser.error(f"--val-fraction needs images with numbers, but --data-set {args.data_set} streams")
    if args.val_fraction and on_command_line & {"--val-split", "--val-dir"} and "--val-fraction" not in on_command_line:
        parser.error(
            f"--val-split {args.val_split} is replaced by the --val-fraction {args.val_fraction} of the --config or "
            "checkpoint; leave it out, or give --val-fraction 0, too"
        )
    if args.cutmix_minmax and args.cutmix_minmax[0] >= args.cutmix_minmax[1]:
        parser.error(f"--cutmix-minmax needs LOW < HIGH; got {args.cutmix_minmax[0]} {args.cutmix_minmax[1]}")
    for name in ("scale", "ratio"):
        low, high = getattr(args, name)
        if low > high:
            parser.error(f"--{name} needs LOW <= HIGH; got {low} {high}")


def _check_weights(parser, args, on_command_line: set[str]):
    """What a run starts from, and what an evaluation or a dry run does not have."""
    if args.dry_run and (args.eval or args.check_data):
        parser.error(f"--dry-run takes a step of training; leave out {'--eval' if args.eval else '--check-data'}")
    if args.eval_sets and not args.eval:
        parser.error("--eval-sets belongs to an evaluation; add --eval")
    if args.save_predictions and args.eval and not args.eval_sets:
        parser.error("--save-predictions belongs to training and to --eval-sets; leave it out with --eval alone")
    if args.save_predictions and args.eval and not args.output_dir:
        parser.error("--save-predictions needs --output-dir, the folder for the files")
    if args.save_predictions and find_source(args.data_set).is_stream:
        parser.error(f"--save-predictions needs images with numbers, but --data-set {args.data_set} streams")
    if args.eval and not (args.resume or args.finetune):
        parser.error("--eval needs the weights to evaluate: --resume or --finetune")
    if args.resume == "auto" and not args.output_dir:
        parser.error("--resume auto searches --output-dir; give one")
    continues_fine_tuning = on_command_line & {"--resume", "--finetune"} == {"--resume"}  # with a run's args.yaml
    if args.resume not in ("", "auto") and args.finetune and not continues_fine_tuning:
        parser.error("--resume and --finetune both name weights; give one (--resume auto accepts --finetune)")


def _check_schedule(parser, args):
    """Learning rate and epochs."""
    if args.scale_lr_flag and args.unscale_lr:
        parser.error("--scale-lr-flag and --unscale-lr contradict each other; leave one of them out")
    if args.diversity_until is not None and args.diversity_until <= args.diversity_warmup:
        parser.error(
            f"--diversity-until {args.diversity_until} needs an epoch above --diversity-warmup {args.diversity_warmup}"
        )
    if args.lr_noise and len(args.lr_noise) > 2:
        parser.error(f"--lr-noise takes where noise starts and where it ends; got {len(args.lr_noise)} values")
    if args.lr_noise and args.lr_noise[0] >= (*args.lr_noise, 1.0)[1]:
        parser.error(f"--lr-noise needs START < END, at most 1; got {' '.join(map(str, args.lr_noise))}")
    if args.lr_noise and args.lr_noise_pct <= args.lr_noise_std / 1000:  # timm draws until a value is within the limit
        parser.error(f"--lr-noise-pct {args.lr_noise_pct} is too small for --lr-noise-std {args.lr_noise_std}")
    if args.start_epoch >= args.epochs + args.cooldown_epochs and not args.eval:
        parser.error(f"--start-epoch {args.start_epoch} leaves nothing of --epochs {args.epochs} to train")


def optimizer_info(name: str) -> timm.optim.OptimInfo:
    """timm's description of an optimizer, of the inner one for `lookahead_`."""
    return timm.optim.get_optimizer_info(name.lower().removeprefix("lookahead_"))
