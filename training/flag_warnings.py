"""Flags that have no effect in a run, and settings that a run hardly can mean: one line each."""

import contextlib
from argparse import Namespace

import torch

from diversity import REGULARIZERS
from models.weights import local_file, origin
from pipeline.sources import SOURCE_FLAGS, find_source
from training import arguments
from training.parsing import flag_of
from training.preprocessing import normalisation_warnings


def run_warnings(args: Namespace, amp_dtype: torch.dtype | None, lr: float, num_steps: int) -> list[str]:
    """One line for each setting that has no effect, or that a run hardly can mean."""
    lines = [*without_effect(args, amp_dtype), *normalisation_warnings(args)]
    if args.freeze == "backbone" and not (args.finetune or args.resume):
        lines.append("--freeze backbone keeps random weights: --finetune names no trained ones")
    if args.val_fraction and args.finetune:
        with contextlib.suppress(ValueError):  # the run is resumed, and the file is gone
            lines.append(arguments.seen_in_training(args, origin(local_file(args.finetune)).flags))
    return [*filter(None, lines), *unusual_settings(args, lr, num_steps)]


def unusual_settings(args: Namespace, lr: float, num_steps: int) -> list[str]:
    """One line for each setting of the schedule or the average that a run of this length and rate hardly can mean.

    Args:
        lr: `--lr`, scaled to the global batch.
        num_steps: optimizer steps of an epoch.
    """
    has_min_lr = args.sched not in ("step", "constant") or args.cooldown_epochs
    num_epochs = args.epochs + args.cooldown_epochs
    steps = num_steps * num_epochs
    initial = args.model_ema_decay**steps
    rules = [
        (args.warmup_epochs >= max(args.epochs - 1, 1),
         f"--warmup-epochs {args.warmup_epochs} is too long for --epochs {args.epochs}: no epoch has the rate {lr:g}"),
        (args.warmup_epochs and args.warmup_lr > lr,
         f"--warmup-lr {args.warmup_lr:g} is above the learning rate {lr:g}"),
        (has_min_lr and args.min_lr > lr,
         f"--min-lr {args.min_lr:g} is above the learning rate {lr:g}"),
        (args.compile_mode != "default" and args.grad_checkpointing and (args.drop or args.drop_path),
         f"--compile-mode {args.compile_mode} is cut into many CUDA graphs by the random numbers of blocks that "
         "--grad-checkpointing computes again; --drop 0 --drop-path 0 avoids it"),
        (args.diversity_warmup >= num_epochs,
         f"--diversity-warmup {args.diversity_warmup} is too long for {num_epochs} epochs: none has full coefficients"),
        (args.diversity_until is not None and args.diversity_until >= num_epochs,
         f"--diversity-until {args.diversity_until} is not reached in {num_epochs} epochs"),
        (args.model_ema and not args.model_ema_warmup and initial > 0.1,
         f"--model-ema-decay {args.model_ema_decay:g}: {steps} steps leave {100 * initial:.0f} % of the first weights "
         "in the average"),
    ]  # fmt: skip
    return [line for condition, line in rules if condition]


def without_effect(args: Namespace, amp_dtype: torch.dtype | None = torch.bfloat16) -> list[str]:
    """One line for each flag that was set and has no effect beside another flag, or beside the autocast dtype."""
    default = arguments.parse_args(["--preset", args.preset or "none"])
    cutmix = args.cutmix > 0 or args.cutmix_minmax
    cuts = cutmix and args.mixup_prob > 0 and (args.mixup == 0 or args.mixup_switch_prob > 0)
    small = args.input_size <= 32
    optimizer = arguments.optimizer_info(args.opt)
    source = find_source(args.data_set)
    active = [term for name, term in REGULARIZERS.items() if arguments.coefficients(args)[name] > 0]
    reads = {tap for term in active for tap in term.reads}
    on_cpu = args.device == "cpu" or (args.device == "auto" and not torch.cuda.is_available())
    rules = [
        (not args.mixing_coef, "mixing_balance mixing_where", "--mixing-coef is 0"),
        (not any(arguments.coefficients(args).values()), "diversity_warmup diversity_until", "no term is on"),
        ("last" not in reads, "emb_layers", "no term that reads chosen embeddings is on"),
        ("attention" not in reads, "attn_layers", "no term that reads chosen attention maps is on"),
        ("weights" not in reads, "weight_groups", "no term that reads chosen weights is on"),
        *((not any(option in term.options for term in active), option, "no term that has it is on")
          for option in arguments.term_options(args)),
        (args.distillation_type == "none", "teacher_model teacher_path distillation_alpha distillation_tau",
         "--distillation-type is none"),
        (not args.finetune, "checkpoint_key", "--finetune is not given"),
        (args.distillation_type == "hard", "distillation_tau", "only soft distillation has a temperature"),
        (not args.model_ema, "model_ema_decay model_ema_warmup model_ema_force_cpu", "--no-model-ema"),
        (not (args.mixup or cutmix), "mixup_prob mixup_mode", "--mixup and --cutmix are 0"),
        (not (args.mixup and cutmix), "mixup_switch_prob", "--mixup or --cutmix is 0"),
        (args.cutmix_minmax, "cutmix", "--cutmix-minmax replaces it"),
        (args.accum_steps > 1, "static_graph", "with --accum-steps some batches do not synchronize gradients"),
        (on_cpu, "tf32 compile_mode", "the device is a CPU"),
        (args.compile is False, "compile_mode", "--no-compile"),
        (args.compile is None and "grad" in reads, "compile_mode", "steps with a term that reads a gradient are eager"),
        (amp_dtype != torch.bfloat16, "residual_dtype", "autocast is not bfloat16"),
        (not args.repeated_aug, "aug_repeats repeats_together", "--no-repeated-aug"),
        (source.is_stream,
         "repeated_aug aug_repeats repeats_together max_bad_images dist_eval",
         "--data-set streams: its reader skips unreadable images"),
        (args.resume not in ("", "auto"), "start_epoch", "--resume determines it"),
        (not args.output_dir, "tensorboard redundancy_every save_every_steps save_every_minutes keep_checkpoints "
         "save_predictions",
         "nothing is written without --output-dir"),
        (args.cache_images == "none", "cache_size", "--cache-images is none"),
        (args.cache_images != "none", "prefetcher", f"--cache-images is {args.cache_images}"),
        (args.cache_images != "none" and not small, "fast_crop", f"--cache-images is {args.cache_images}"),
        (args.reprob == 0, "remode recount", "--reprob is 0"),
        (args.aa and "3a" not in args.aa, "color_jitter", "--aa replaces it"),
        (small, "scale ratio eval_crop_ratio crop_mode fast_crop", "images are not cropped for inputs up to 32 px"),
        *((flag not in source.flags, flag, f"--data-set is {args.data_set}") for flag in SOURCE_FLAGS),
        (args.val_fraction and "val_split" in source.flags, "val_split", "--val-fraction replaces it"),
        (args.lr_noise is None, "lr_noise_pct lr_noise_std", "--lr-noise is off"),
        (args.sched not in ("step", "plateau", "poly"), "decay_rate", f"--sched is {args.sched}"),
        (args.sched in ("step", "constant") and not args.cooldown_epochs, "min_lr", f"--sched is {args.sched}"),
        (args.sched != "step", "decay_epochs", f"--sched is {args.sched}"),
        (args.sched != "plateau", "patience_epochs", f"--sched is {args.sched}"),
        (args.freeze == "backbone", "layer_decay drop_path grad_checkpointing",
         "--freeze backbone trains the head alone"),
        (args.warmup_epochs == 0, "warmup_lr", "--warmup-epochs is 0"),
        (not optimizer.has_momentum, "momentum", f"--opt is {args.opt}"),
        (not optimizer.has_eps, "opt_eps", f"--opt is {args.opt}"),
        (not optimizer.has_betas, "opt_betas", f"--opt is {args.opt}"),
        (True, "resplit", "there are no augmentation splits"),
        (True, "scale_lr_flag", "--lr is scaled unless --unscale-lr is given"),
        (True, "world_size", "torchrun decides the number of processes"),
    ]  # fmt: skip
    lines = [
        f"{flag_of(name)} has no effect: {reason}"
        for condition, names, reason in rules
        if condition
        for name in names.split()
        if getattr(args, name) != getattr(default, name)
    ]
    if args.mixing_coef and args.mixing_where == "cutmix" and not cuts:  # also where a preset has set the coefficient
        lines.append("--mixing-coef has no effect: --mixing-where is cutmix, and no batch gets CutMix")
    return lines
