"""Train or evaluate a timm vision transformer with the diversity regularizers of "The Principle of Diversity"."""

import contextlib
import dataclasses
import datetime
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from torch import nn

from datasets import Data, DataOptions, build_data
from diversity import TapError, measurable, measure_redundancy
from engine import autocast_dtype, evaluate, train_one_epoch
from pipeline.workers import loader_errors
from training import arguments, checkpoint, run_folder
from training.build import (
    build_augmentation,
    build_diverse_loss,
    build_optimizer,
    build_weights,
    compile_and_wrap,
    fast_parts,
    options_of,
)
from training.guard import FiniteGuard
from training.log import RunLog, environment_lines
from training.stopping import StopSignals
from utils import (
    World,
    joined_world,
    keep_freed_memory,
    make_deterministic,
    one_line_errors,
    quiet_warnings,
    run_command,
    set_backends,
)

WATCHED_IMAGES = 64  # whose redundancy is measured while training


def main(args: Namespace, world: World):
    """One run: build what the flags describe, then train and evaluate it, or evaluate it only."""
    quiet_warnings()
    keep_freed_memory()
    set_backends(args.fused_attn, args.tf32)
    if args.deterministic:
        make_deterministic()
    with contextlib.ExitStack() as stack, loader_errors():
        output_dir = None
        if not args.eval:
            output_dir = stack.enter_context(run_folder.lock_run_folder(args.output_dir, world, args.resume))
        finds_its_own = args.resume == "auto"
        if finds_its_own:
            newest = checkpoint.find_newest(Path(args.output_dir)) if world.is_main else None
            args.resume = world.from_main(str(newest or ""))
        if args.eval:
            evaluate_only(args, world)
        else:
            train(args, world, stack, finds_its_own, output_dir)


def evaluate_only(args: Namespace, world: World):
    """Print the accuracies of a checkpoint."""
    data = build_data(options_of(DataOptions, args), world)
    model, model_ema, resumed, notes = build_weights(args, world, data)
    if resumed:
        checkpoint.load_model_and_ema(model, model_ema, resumed, args.resume)
    stats = evaluate_both(model, model_ema, data, args, world, autocast_dtype(args.amp, world.device))
    if world.is_main:
        print("\n".join([*environment_lines(world, args.seed), *notes, accuracy_line(stats)]))


def train(args: Namespace, world: World, stack: contextlib.ExitStack, finds_its_own: bool, output_dir: Path | None):
    """Train, from the start or from `--resume`, and evaluate each epoch.

    Args:
        stack: closed at the end of the run.
        finds_its_own: whether `--resume auto` chose the checkpoint, if there was any.
        output_dir: the locked run folder on the main process; None on the others and without one.
    """
    amp_dtype = autocast_dtype(args.amp, world.device)
    data = build_data(options_of(DataOptions, args), world)
    model, model_ema, resumed, notes = build_weights(args, world, data)
    augment = build_augmentation(args, of_bytes=data.prefetcher is not None)
    diverse_loss = build_diverse_loss(args, world, model, data.num_classes, augment)
    objective, tapped = diverse_loss.objective, diverse_loss.tapped
    training_loss = compile_and_wrap(args, world, diverse_loss)

    global_batch = args.batch_size * world.size * args.accum_steps
    lr = args.lr if args.unscale_lr else args.lr * global_batch / 512
    optimizer = build_optimizer(args, model, lr)
    scheduler, num_epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args))
    loss_scaler = torch.amp.GradScaler(world.device.type, enabled=amp_dtype == torch.float16)
    state = checkpoint.TrainState(model, model_ema, optimizer, scheduler, loss_scaler, epoch=args.start_epoch)
    if args.start_epoch:
        scheduler.step(args.start_epoch - 1)
    if resumed:
        state.restore(resumed, args.resume, global_batch, world.device)
        data.mark_bad_images(resumed.get("bad_images", []))
        resumed = None  # its tensors are copied by now
        if state.epoch >= num_epochs and not run_folder.needs_summary(args.output_dir, args.resume):
            if finds_its_own:
                if world.is_main:
                    print(f"{args.output_dir} has finished its {num_epochs} epochs")
                return
            raise SystemExit(
                f"error: --resume {args.resume} has finished its {num_epochs} epochs; raise --epochs or use --eval"
            )

    tables = "\n".join(filter(None, [args.preset and f"preset {args.preset}", objective.table(), tapped.table()]))
    flags = {name: value for name, value in vars(args).items() if name not in arguments.NOT_REPEATED}
    run_folder.write_description(output_dir, flags, tables, world)
    told_again = state.epoch * data.num_steps + min(
        state.step, data.num_steps - 1
    )  # with an epoch's last step, its end
    log = RunLog(output_dir, world, args.tensorboard, state.epoch, told_again)
    num_parameters = sum(p.numel() for p in model.parameters())
    since = f" from step {state.step} of {data.num_steps} on" if state.step else ""
    log.print("\n".join([
        *environment_lines(world, args.seed),
        f"model {args.model}: {num_parameters:,} parameters, {data.num_classes} classes, "
        f"autocast {str(amp_dtype).removeprefix('torch.') if amp_dtype else 'off'}",
        f"{global_batch} images per optimizer step, learning rate {lr:g}, "
        f"epochs {state.epoch}{since} to {num_epochs - 1}",
        *notes,
        f"fast path: {', '.join(fast_parts(args, world, objective, data)) or 'off'}",
        *(f"warning: {line}" for line in arguments.without_effect(args)),
        *(["warning: --residual-dtype bfloat16 has no effect: autocast is not bfloat16"]
          if args.residual_dtype == "bfloat16" and amp_dtype != torch.bfloat16 else []),
        tables,
    ]))  # fmt: skip

    watched = watched_images(args, model, data, world)
    guard = FiniteGuard(args.max_nonfinite_steps, world, state.skipped + state.totals.skipped(state.step))
    saver = checkpoint.Saver(
        state,
        lambda: {"args": vars(args), "global_batch": global_batch, "bad_images": data.bad_images(world)},
        output_dir,
        log,
        world,
        stack.enter_context(StopSignals()),
        steps=args.save_every_steps,
        minutes=args.save_every_minutes,
        keep=args.keep_checkpoints,
    )
    if diverse_loss.compiled:
        log.print("compiling the training step: the first step takes longer, and nothing is printed meanwhile")
    test_stats = None
    while state.epoch < num_epochs:
        epoch = state.epoch
        train_stats = train_one_epoch(
            training_loss,
            data.batches(epoch, state.step),
            state,
            guard,
            log,
            world,
            num_steps=data.num_steps,
            seed=args.seed,
            images=data.step_images,
            after_step=saver.after_step,
            amp_dtype=amp_dtype,
            accum_steps=args.accum_steps,
            clip_grad=args.clip_grad,
            log_interval=args.log_interval,
        )
        test_stats = evaluate_both(model, model_ema, data, args, world, amp_dtype, saver.after_batch)
        scheduler.step(epoch, test_stats["acc1"])
        record = {f"train_{name}": value for name, value in train_stats.items()}
        record |= {f"test_{name}": value for name, value in test_stats.items()}
        bad_images = len(data.bad_images(world))
        record |= {"epoch": epoch, "n_parameters": num_parameters, "bad_images": bad_images}
        if watched is not None and ((epoch + 1) % args.redundancy_every == 0 or epoch + 1 == num_epochs):
            record |= redundancy_record(model, watched, log, (epoch + 1) * data.num_steps - 1, epoch)
        log.epoch(record, (epoch + 1) * data.num_steps - 1)  # before the save, which ends an epoch for good
        saver.end_epoch(state.next_epoch(test_stats))
        log.print(epoch_line(record, num_epochs))
    saver.close()

    test_stats = test_stats or evaluate_both(model, model_ema, data, args, world, amp_dtype)
    finish(output_dir, log, list(objective.coefs), num_epochs, round(state.seconds), test_stats)


def evaluate_both(
    model, model_ema, data, args, world, amp_dtype, after_batch: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """`evaluate` of the raw weights and, with `_ema` appended to its names, of their average."""
    if not data.val_is_shared:
        world = dataclasses.replace(world, size=1)
    average = None if model_ema is None else model_ema.module
    stats = evaluate(model, data.val, world, amp_dtype, after_batch, data.common_val_batches(world), average)
    if stats["images"] != data.num_val:
        raise SystemExit(f"error: {data.num_val - stats['images']} of {data.num_val} validation images are unreadable")
    return stats


def watched_images(args: Namespace, model: nn.Module, data: Data, world: World) -> torch.Tensor | None:
    """The first validation images, whose redundancy is measured while training; None where it is not.

    Raises:
        SystemExit: the model cannot be measured.
    """
    if not args.redundancy_every:
        return None
    try:
        measurable(model)
    except TapError as error:
        raise SystemExit(f"error: --redundancy-every cannot measure --model {args.model}: {error}") from None
    return data.first_val_images(WATCHED_IMAGES).to(world.device) if world.is_main else None


def redundancy_record(model: nn.Module, samples: torch.Tensor, log: RunLog, step: int, epoch: int) -> dict[str, float]:
    """Means over the layers of what analyze.py measures, for the epoch's record; `log` gets a figure of the layers."""
    from reports import redundancy_figures  # here, as matplotlib takes a second to import

    try:
        report = measure_redundancy(model, [samples])
    except ValueError as error:
        log.print(f"epoch {epoch}: redundancy is not measured: {error}")
        return {}
    log.figure("redundancy", lambda: redundancy_figures.redundancy_depth({f"epoch {epoch}": [report]}), step)
    measures = {f"redundancy_{name}": value for name, value in report["summary"].items()}
    return measures | {"redundancy_images": report["images"]}


def finish(output_dir: Path | None, log: RunLog, terms: list[str], epochs: int, seconds: int, stats: dict[str, float]):
    """The last lines, the curves of `terms`, and summary.json last of all, since a finished run is known by it."""
    log.print(f"training time {datetime.timedelta(seconds=seconds)}")
    log.print(accuracy_line(stats))
    if output_dir:
        from reports import figures  # here, as matplotlib takes a second to import

        figures.curves(output_dir, terms)
        run_folder.write_summary(output_dir, epochs, seconds, stats)
        log.print(f"run folder: {output_dir}")
    log.close()


def epoch_line(record: dict, num_epochs: int) -> str:
    """One epoch on one line: the loss and the share of every part in it, accuracies and throughput."""
    parts = [name.removesuffix("_share") for name in record if name.endswith("_share")]
    shares = ", ".join(
        f"{name.removeprefix('train_')} {record[name]:.4g} ({100 * record[f'{name}_share']:.1f} %)" for name in parts
    )
    loss = f"loss {record['train_loss']:.4f}: {shares}" if parts else "no step taken"
    return (
        f"epoch {record['epoch']} of {num_epochs}: {loss}; "
        f"{accuracy_line({name.removeprefix('test_'): value for name, value in record.items()})}; "
        f"{record['train_images_per_s']:.0f} images/s, waiting for data {100 * record['train_data_wait']:.0f} %"
    )


def accuracy_line(stats: dict[str, float]) -> str:
    ema = f", EMA {stats['acc1_ema']:.2f} %" if "acc1_ema" in stats else ""
    return f"test accuracy: raw {stats['acc1']:.2f} %{ema}"


def command_line(argv: list[str] | None = None):
    """`main` with the flags of a command line; what a user can get wrong ends in one line and a non-zero exit."""
    args = arguments.parse_args(argv)
    with one_line_errors(), joined_world(args.device, args.dist_url) as world:
        main(args, world)


if __name__ == "__main__":
    run_command(command_line)
