"""Training steps to compare: a plain timm user's, this project's, and a textbook's; on random images."""

from argparse import Namespace
from collections.abc import Callable, Iterable

import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3

from diversity import PRESETS, DiversityObjective, PatchMixup
from engine import autocast, autocast_dtype, train_one_epoch
from training.build import (
    build_augmentation,
    build_diverse_loss,
    build_initial,
    build_optimizer,
    compile_and_wrap,
    should_compile,
)
from training.checkpoint import TrainState
from training.guard import FiniteGuard
from training.log import RunLog
from training.meters import EpochTotals
from training.progress import Progress
from training.update import GuardedUpdate
from utils import World

from . import textbook_step

NUM_CLASSES = 1000
LEARNING_RATE = 1e-4

Run = Callable[[int], object]
"""Takes so many training steps."""


def plain(args: Namespace, world: World) -> Run:
    """As a timm user trains: stock model, Mixup, soft targets, average.

    Optimizer, precision and compiling are those of `diversified`, which differs only by its terms and checks.
    """
    device, dtype = world.device, autocast_dtype(args.amp, world.device)
    model = build_initial(args, NUM_CLASSES).to(device).train()
    model_ema = ModelEmaV3(model, decay=args.model_ema_decay)
    if should_compile(args, world, DiversityObjective({})):
        model.compile(dynamic=False)
    optimizer = build_optimizer(args, model, LEARNING_RATE)
    mixup = Mixup(args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=NUM_CLASSES)

    def loss_of(samples, labels):
        samples, targets = mixup(samples, labels)
        with autocast(device, dtype):
            return SoftTargetCrossEntropy()(model(samples), targets)

    return _steps(loss_of, model, model_ema, optimizer, random_batch(args, device), dtype, reads_loss=False)


def diversified(
    args: Namespace, world: World, loader: Callable[[int], Iterable] | None = None, **options: Callable
) -> Run:
    """What main.py trains with, from the batch on the device to the average; returns `train_one_epoch`'s means.

    Args:
        loader: returns so many batches; None = one random batch, again and again.
        options: of `train_one_epoch`.
    """
    model = build_initial(args, NUM_CLASSES).to(world.device)
    augment = build_augmentation(args, of_bytes=False)
    training_loss = compile_and_wrap(args, world, build_diverse_loss(args, world, model, NUM_CLASSES, augment))
    dtype = autocast_dtype(args.amp, world.device)
    scaler = torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16)
    optimizer, model_ema = build_optimizer(args, model, LEARNING_RATE), ModelEmaV3(model, decay=args.model_ema_decay)
    state = TrainState(model, model_ema, optimizer, None, scaler)
    guard = FiniteGuard(args.max_nonfinite_steps, world)
    update = GuardedUpdate(model, model_ema, optimizer, scaler, guard)
    progress = Progress(state, 0, RunLog(None, world, tensorboard=False), world, log_interval=0)
    batch = random_batch(args, world.device)

    def run(num_steps):
        batches = loader(num_steps) if loader else [batch] * num_steps
        stats = train_one_epoch(training_loss, batches, state, update, progress, world, amp_dtype=dtype, **options)
        state.step, state.totals = 0, EpochTotals()
        return stats

    return run


def textbook(args: Namespace, world: World) -> Run:
    """`textbook_step` as such code is usually trained: eager, maps in every block, the loss read in each step.

    The paper's five terms; in float16 on a GPU, as the released code.

    Raises:
        SystemExit: the textbook does not know the model.
    """
    device = world.device
    dtype = torch.float16 if device.type == "cuda" else autocast_dtype(args.amp, device)
    model = build_initial(args, NUM_CLASSES).to(device).train()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=LEARNING_RATE, weight_decay=args.weight_decay)
    coefs = PRESETS["released"].coefs
    if not textbook_step.knows(model):
        raise SystemExit(f"error: --model {args.model}: the textbook's step is one of plain ViTs with a class token")
    mixup = PatchMixup(args.mixup, args.cutmix, grid=model.patch_embed.grid_size)

    def loss_of(samples, labels):
        samples, target = mixup(samples, labels)
        with autocast(device, dtype):
            outputs = textbook_step.forward(model, samples)
            return textbook_step.loss(outputs, model, *target, coefs, args.smoothing)[0]

    model_ema = ModelEmaV3(model, decay=args.model_ema_decay, foreach=False)
    return _steps(loss_of, model, model_ema, optimizer, random_batch(args, device), dtype, reads_loss=True)


def _steps(loss_of: Callable, model, model_ema, optimizer, batch, dtype: torch.dtype | None, reads_loss: bool) -> Run:
    """Steps of an ordinary training loop; `reads_loss`: the host waits for each loss."""
    scaler = torch.amp.GradScaler(batch[0].device.type, enabled=dtype == torch.float16)

    def run(num_steps):
        for _ in range(num_steps):
            loss = loss_of(*batch)
            if reads_loss and not loss.isfinite():
                raise FloatingPointError(f"the loss is {loss.item()}")
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            model_ema.update(model)

    return run


def random_batch(args: Namespace, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples [B, 3, S, S] and labels [B]."""
    shape = (args.batch_size, 3, args.input_size, args.input_size)
    return torch.randn(shape, device=device), torch.randint(NUM_CLASSES, (args.batch_size,), device=device)


def with_flags(args: Namespace, **flags) -> Namespace:
    """A copy of main.py's flags with some of them replaced."""
    return Namespace(**vars(args) | flags)
