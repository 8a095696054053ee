"""Builds from the parsed flags what a run is made of: model, average, augmentation, loss, optimizer, schedule."""

import dataclasses
import sys
from argparse import Namespace
from functools import partial
from typing import TypeVar

import timm.optim
import torch
import torch._functorch.config
import torch._inductor
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import ModelEmaV3, random_seed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from diversity import DiverseLoss, DiversityObjective, PatchMixup, TapError
from diversity.distillation import DistillationLoss
from models import build_model
from models.execution import embed_patches_by_product, enable_grad_checkpointing, keep_residual_in_bfloat16
from models.freezing import freeze, frozen_modules, init_head
from models.weights import load_weights
from pipeline.batch_augmentation import BatchAugmentation, BatchErasing, Normalize
from pipeline.run_data import Data
from pipeline.transforms import Preprocessing
from training import arguments
from training.parsing import flag_of
from training.schedule import Schedule
from utils import World, errors_of, is_bug

T = TypeVar("T")
FUSED = (torch.optim.AdamW, torch.optim.Adam)  # not SGD: its momentum is undefined if the first step is skipped


def options_of(cls: type[T], args: Namespace) -> T:
    """A dataclass of options: each field is the flag of its name; None, or no flag, leaves a field at its default."""
    names = [
        field.name
        for field in dataclasses.fields(cls)
        if field.default is dataclasses.MISSING or getattr(args, field.name, None) is not None
    ]
    return cls(**{name: getattr(args, name) for name in names})


def build_initial(args: Namespace, num_classes: int) -> nn.Module:
    """The model with its initial weights, which are the same on every rank."""
    random_seed(args.seed)
    shape = num_classes, args.input_size, args.patch_size
    with errors_of("--model"):
        rates = args.drop, args.drop_path
        model = build_model(args.model, *shape, *rates, args.remedy, args.remedy_kwargs, **args.model_kwargs)
    changes = [
        (args.patch_product, embed_patches_by_product, "--patch-product"),
        (args.residual_dtype == "bfloat16", keep_residual_in_bfloat16, "--residual-dtype bfloat16"),
        (args.grad_checkpointing, enable_grad_checkpointing, "--grad-checkpointing"),
    ]
    for is_on, change, flag in changes:
        with errors_of(f"--model {args.model} cannot be used with {flag}:"):
            if is_on:
                change(model)
    with errors_of(f"--model {args.model} cannot be used with --head-init:"):
        if args.head_init is not None:
            init_head(model, args.head_init)
    with errors_of(f"--model {args.model} cannot be used with --freeze {args.freeze}:"):
        freeze(model, args.freeze)
    return model.to(memory_format=torch.channels_last) if args.channels_last else model


def build_ema(args: Namespace, model: nn.Module) -> ModelEmaV3 | None:
    """The average of the model's weights; made before hooks are registered, since it is a copy of the model."""
    if not args.model_ema:
        return None
    device = "cpu" if args.model_ema_force_cpu else None
    return ModelEmaV3(model, args.model_ema_decay, use_warmup=args.model_ema_warmup, device=device)


def build_diverse_loss(
    args: Namespace, world: World, model: nn.Module, num_classes: int, mixup: BatchAugmentation | None = None
) -> DiverseLoss:
    """Augmentation, model and objective, with a teacher if the flags name one.

    Args:
        mixup: None = images and labels stay unchanged.

    Raises:
        SystemExit: the model lacks what a term needs.
    """
    distillation = None
    if args.distillation_type != "none":
        with errors_of("--teacher-model"):
            teacher = build_model(args.teacher_model, num_classes, args.input_size)
        with errors_of("--teacher-path"):
            load_weights(teacher, args.teacher_path, new_head=False)
        distillation = DistillationLoss(teacher, args.distillation_type, args.distillation_alpha, args.distillation_tau)
    settings = objective_settings(args) | tap_settings(args) | {"frozen": frozen_modules(model, args.freeze)}
    try:
        return DiverseLoss(model, mixup=mixup, distillation=distillation, **settings).to(world.device)
    except TapError as error:
        flags = [flag_of(f"{name}_coef") for name in error.terms]
        if error.argument not in (None, "model"):
            flags.insert(0, f"{flag_of(error.argument)} {getattr(args, error.argument)}")
        raise SystemExit(f"error: --model {args.model} does not serve {', '.join(flags)}: {error}") from None


def objective_settings(args: Namespace) -> dict[str, object]:
    """The arguments of `DiversityObjective` that the flags set."""
    names = ("smoothing", "mixing_balance", "mixing_where", "diversity_warmup", "diversity_until")
    settings = {name: getattr(args, name) for name in names}
    return {"coefs": arguments.coefficients(args)} | settings | arguments.term_options(args)


def tap_settings(args: Namespace) -> dict[str, object]:
    """The arguments of `TappedViT` that the flags set."""
    return {name: getattr(args, name) for name in ("emb_layers", "attn_layers", "weight_groups")}


def compile_and_wrap(args: Namespace, world: World, loss_fn: DiverseLoss) -> DiverseLoss | DistributedDataParallel:
    """Compile the training step as one graph, and wrap it for several processes.

    Raises:
        SystemExit: --compile, and a term that reads a gradient.
    """
    objective = loss_fn.objective
    if args.compile and objective.differentiating:
        flag = flag_of(f"{objective.differentiating[0]}_coef")
        raise SystemExit(f"error: --compile cannot differentiate twice, as {flag} does; leave one of them out")
    if should_compile(args, world, objective):
        # The hooks of the taps need not run again when a checkpointed block is recomputed.
        torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = args.grad_checkpointing
        torch._functorch.config.force_non_lazy_backward_lowering = True  # so that its errors come in the forward pass
        on_error = partial(_on_compile_error, world, is_asked_for=bool(args.compile))
        loss_fn.compile_step(on_error, options=compile_options(args, world))
    if world.size == 1:
        return loss_fn
    ddp = DistributedDataParallel(
        loss_fn,
        device_ids=[world.device.index] if world.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        static_graph=has_static_graph(args),
    )
    ddp.broadcast_buffers = any(True for _ in loss_fn.model.buffers())  # a teacher's never change
    return ddp


def compile_options(args: Namespace, world: World) -> dict[str, object]:
    """The options of torch.compile that `--compile-mode` means; on a CPU those of its default."""
    mode = args.compile_mode if world.device.type == "cuda" else "default"
    # torch.compile takes a mode or options; fallback_random: the same random numbers as without compiling.
    return torch._inductor.list_mode_options(mode) | {"fallback_random": True}


def _on_compile_error(world: World, reason: str, is_asked_for: bool):
    if is_asked_for:
        raise SystemExit(f"error: --compile: the training step cannot be compiled: {reason}")
    line = f"warning: the training step of rank {world.rank} cannot be compiled and runs in eager mode: {reason}"
    print(line, file=sys.stderr, flush=True)


def should_compile(args: Namespace, world: World, objective: DiversityObjective) -> bool:
    """Whether model and objective are compiled: by default on a GPU, unless a term reads a gradient.

    With torch 2.14, the compiled gradient of such a term is wrong, without an error.
    """
    if args.compile is None:
        return world.device.type == "cuda" and not objective.differentiating
    return args.compile


def has_static_graph(args: Namespace) -> bool:
    """Whether every backward pass is like the first for DistributedDataParallel."""
    return args.static_graph and args.accum_steps == 1  # otherwise some passes do not synchronize gradients


def fast_path(args: Namespace, world: World, loss_fn: DiverseLoss, data: Data) -> list[str]:
    """What makes this run fast, for the log."""
    features = {
        "compiled": loss_fn.compiled is not None,
        "CUDA graphs": loss_fn.has_cuda_graphs,
        "fused attention": any(getattr(module, "fused_attn", False) for module in loss_fn.model.modules()),
        "fused optimizer": can_fuse(args.opt),
        "prefetcher": data.prefetcher is not None,
        "images in memory": args.cache_images == "memory",
        "images in device memory": args.cache_images == "device",
        "static graph": world.size > 1 and has_static_graph(args),
    }
    return [name for name, is_on in features.items() if is_on]


def build_augmentation(args: Namespace, of_bytes: bool) -> BatchAugmentation:
    """Normalisation, erasing and mixing of a batch on its device.

    Args:
        of_bytes: whether the images are bytes, which are erased here and not by the loader.
    """
    erasing = BatchErasing(args.reprob, args.remode, args.recount) if of_bytes and args.reprob else None
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    if args.patch_product:  # it copies the patches in any case
        layout = torch.preserve_format
    images = options_of(Preprocessing, args)
    return BatchAugmentation(build_mixup(args), erasing, layout, Normalize(images.mean, images.std))


def build_mixup(args: Namespace, grid: tuple[int, int] | None = None) -> PatchMixup:
    """Mixup and CutMix as the flags describe them.

    Args:
        grid: of the patches that need labels; None = the grid of the model, where labels are mixed for its patches.
    """
    settings = {"prob": args.mixup_prob, "switch_prob": args.mixup_switch_prob, "mode": args.mixup_mode}
    return PatchMixup(args.mixup, args.cutmix, cutmix_minmax=args.cutmix_minmax, grid=grid, **settings)


def build_optimizer(args: Namespace, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """timm's optimizer, without weight decay on biases, norms and what the model exempts; fused where it can be."""
    options = optimizer_kwargs(args) | {"lr": lr}
    if can_fuse(args.opt):
        options |= {"fused": True}
    if arguments.optimizer_info(args.opt).opt_class is timm.optim.Muon:
        options |= {"fallback_list": input_and_output(model), "fallback_no_weight_decay": True}
    try:
        return create_optimizer_v2(model, **options)
    except (TypeError, ValueError, IndexError, AssertionError) as error:
        if is_bug(error):
            raise
        line = f"error: --opt {args.opt} refuses its settings (--opt-betas, --opt-eps ...): {error}"
        raise SystemExit(line) from None


def input_and_output(model: nn.Module) -> list[str]:
    """Patterns of the names of the parameters that embed the image, and of those that give the logits.

    Muon updates neither of them; their AdamW does. timm names the layers in each model's configuration.
    """
    layers = [model.pretrained_cfg.get(key) or () for key in ("first_conv", "classifier")]
    layers = [(names,) if isinstance(names, str) else names for names in layers]
    return [f"{name}.*" for names in layers for name in names]


def can_fuse(opt: str) -> bool:
    """Whether one of timm's optimizers has a fused form, which can also skip a step itself."""
    return not opt.lower().startswith("lookahead_") and arguments.optimizer_info(opt).opt_class in FUSED


def build_schedule(args: Namespace, optimizer: torch.optim.Optimizer) -> Schedule:
    """timm's schedule and the cool-down; without a warm-up, epoch 0 has the rate of the optimizer."""
    with errors_of(f"--sched {args.sched} refuses its settings (--decay-rate ...):"):
        scheduler, _ = create_scheduler_v2(optimizer, **scheduler_kwargs(args))
    return Schedule(scheduler, args.epochs, args.cooldown_epochs, args.min_lr)
