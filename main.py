"""Train or evaluate a timm vision transformer with the diversity regularizers of "The Principle of Diversity"."""

import signal
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C: no traceback of an import; see `run_command`

import torch

from datasets import DataOptions, build_data, build_set
from engine import autocast_dtype, train_one_epoch
from models.execution import set_backends
from models.freezing import trained_line
from models.remedies import remedy_lines
from pipeline.evaluation_set_classes import name_outputs, open_sets
from pipeline.transforms import preprocessing_line
from pipeline.workers import loader_errors
from reports.evaluation_page import evaluation_page
from training import arguments, build
from training.begin_and_end import begin_run, end_run
from training.changes import find_changes
from training.check_data import check_data
from training.checkpoint import TrainState
from training.evaluation import RedundancyMonitor, evaluate_both
from training.first_step import FirstStep, first_step_record
from training.flag_warnings import run_warnings
from training.gradient_norms import GradientNorms
from training.guard import FiniteGuard
from training.log import epoch_line, evaluation_lines
from training.output import tolerant_output
from training.predictions import Predictions
from training.preprocessing import normalisation_warnings
from training.progress import Progress
from training.provenance import check_files, environment_lines
from training.resuming import Checkpoint, find_checkpoint, find_evaluated, is_finished, load, resume
from training.run_folder import lock_run_folder
from training.saving import Saver
from training.schedule import layer_rates_line
from training.set_evaluation import end_evaluation, evaluate_sets, explain_outputs, require_folder
from training.stopping import StopSignals
from training.update import GuardedUpdate
from utils import World, joined_world, one_line_errors, quiet_warnings, run_command


def main(args: Namespace, world: World):
    """Train and evaluate, or evaluate only."""
    quiet_warnings()
    set_backends(args.fused_attn, args.tf32, args.deterministic)
    with loader_errors():
        if args.check_data:
            return check_data(build.options_of(DataOptions, args), world)
        if args.eval:
            return evaluate_only(args, world)
        with lock_run_folder("" if args.dry_run else args.output_dir, world, args.resume) as folder, tolerant_output():
            train(args, world, folder)


def evaluate_only(args: Namespace, world: World):
    """Print the accuracies of `--resume` or `--finetune`; those on `--eval-sets` are written to `--output-dir`, too."""
    file, origin = find_evaluated(args.resume, args.output_dir, args.finetune, args.checkpoint_key)
    checkpoint = Checkpoint(file, load(file)) if args.resume else Checkpoint()
    options = build.options_of(DataOptions, args)
    build_val = partial(build_data, options, world)
    if args.eval_sets:
        require_folder(args.output_dir)
        sets = data = open_sets(args.eval_sets, name_outputs(origin.classes, args.num_classes, file), build_val)
    else:
        sets, data = None, build_val(origin.classes)
    model = build.build_initial(args, data.num_classes).to(world.device)
    state = TrainState(model, build.build_ema(args, model))
    with explain_outputs(sets):
        start = resume(state, checkpoint, world, finetune=args.finetune, checkpoint_key=args.checkpoint_key)
    warnings = (f"warning: {line}" for line in normalisation_warnings(args))
    lines = [*environment_lines(world, args.seed), preprocessing_line(options), *data.lines(), *warnings, *start.notes]
    if world.is_main:
        print("\n".join(lines), flush=True)
    amp_dtype = autocast_dtype(args.amp, world.device)
    if not sets:
        stats = evaluate_both(state.model, state.model_ema, data, world, amp_dtype)
        if world.is_main:
            print(evaluation_lines(file, origin, data, stats))
    else:
        results = evaluate_sets(sets, partial(build_set, options, world), state, world, amp_dtype, origin.is_average)
        about = {"weights": file, "epoch": origin.epoch, "model": args.model}
        about |= {"preprocessing": preprocessing_line(options)}
        end_evaluation(args.output_dir, world, about, results, args.save_predictions, evaluation_page)


def train(args: Namespace, world: World, folder: Path | None):
    """Train from initial weights, `--finetune` or `--resume`, and evaluate each epoch; `folder` gets the results."""
    checkpoint = find_checkpoint(args.resume, args.output_dir, world, rename=not args.dry_run)
    options = build.options_of(DataOptions, args)
    data = build_data(options, world, classes=checkpoint.classes)
    global_batch = args.batch_size * world.size * args.accum_steps
    changes = find_changes(
        checkpoint, vars(args), arguments.defaults(), data.description(), global_batch, args.resume_with_changes
    )
    mixup = build.build_augmentation(args, of_bytes=data.prefetcher is not None)

    model = build.build_initial(args, data.num_classes).to(world.device)
    model_ema = build.build_ema(args, model)
    diverse_loss = build.build_diverse_loss(args, world, model, data.num_classes, mixup)
    loss_fn = build.compile_and_wrap(args, world, diverse_loss)

    amp_dtype = autocast_dtype(args.amp, world.device)
    lr = args.lr if args.unscale_lr else args.lr * global_batch / 512
    optimizer = build.build_optimizer(args, model, lr)
    schedule = build.build_schedule(args, optimizer)
    num_epochs = schedule.num_epochs
    loss_scaler = torch.amp.GradScaler(world.device.type, enabled=amp_dtype == torch.float16)

    state = TrainState(model, model_ema, optimizer, schedule, loss_scaler, epoch=args.start_epoch)
    if not checkpoint.path:
        schedule.start(args.start_epoch)
    start = resume(
        state, checkpoint, world,
        finetune=args.finetune, checkpoint_key=args.checkpoint_key, new_head=args.head_init is not None,
        classes=data.classes, global_batch=global_batch,
    )  # fmt: skip
    data.earlier_bad_images = start.bad_images
    if is_finished(checkpoint, state, args.resume, args.output_dir, args.save_predictions):
        if folder:
            for note in check_files(folder, data, args.data_set, args.data_path):
                print(f"warning: {note}")
        if world.is_main:
            print(f"{args.output_dir} has finished its {num_epochs} epochs")
        return

    flags, objective = arguments.repeatable(args), diverse_loss.objective
    tables = [args.preset and f"preset {args.preset}", *remedy_lines(args.remedy, args.remedy_kwargs)]
    tables += [objective.table(), diverse_loss.tapped.table()]
    numbers = {"global_batch": global_batch, "accum_steps": args.accum_steps, "learning_rate": lr}
    numbers |= {"precision": str(amp_dtype or torch.float32).removeprefix("torch.")}
    lines = [
        *arguments.config_lines(args),
        preprocessing_line(options),
        f"fast path: {', '.join(build.fast_path(args, world, diverse_loss, data)) or 'off'}",
        *filter(None, [trained_line(model, args.freeze), layer_rates_line(optimizer, args.layer_decay, lr)]),
        *(f"warning: {line}" for line in run_warnings(args, amp_dtype, lr, data.num_steps)),
    ]
    log = begin_run(folder, world, state, data, start, changes, flags, numbers, lines, "\n".join(filter(None, tables)))
    if diverse_loss.compiled:
        log.print("compiling the training step: the first step takes longer, and nothing is printed meanwhile")
    if args.dry_run:
        log.print("dry run: at most one optimizer step, and an evaluation on all validation images; no file is written")
        data.end_epochs_after(state.step + 1)
        num_epochs = state.epoch + 1

    redundancy = RedundancyMonitor(args.redundancy_every, model, args.model, data, world, redundancy_figure)
    gradient_norms = GradientNorms(args.grad_norms_every, diverse_loss, state, num_epochs, log, world, amp_dtype)
    skipped = state.skipped + state.totals.skipped(state.step)
    skipped_in = "" if args.dry_run else args.output_dir
    report = partial(log.print, on_all_ranks=True)
    guard = FiniteGuard(args.max_nonfinite_steps, world, model, skipped, data.step_images, report, skipped_in)
    steps = state.epoch * data.num_steps + state.step
    update = GuardedUpdate(model, model_ema, optimizer, loss_scaler, guard, args.accum_steps, args.clip_grad, steps)
    first_step = FirstStep(objective, is_pending=not checkpoint.path)
    progress = Progress(state, data.num_steps, log, world, args.log_interval, first_step)
    with StopSignals(has_folder=bool(args.output_dir)) as signals:
        saver = Saver(
            state, lambda: {
                "args": vars(args), "data": data.description(), "global_batch": global_batch,
                "bad_images": data.bad_images(world),
            },
            folder, log, world, signals,
            steps=args.save_every_steps, minutes=args.save_every_minutes, keep=args.keep_checkpoints,
        )  # fmt: skip
        record, test_stats = {}, None
        predictions = Predictions(data, world) if args.save_predictions else None
        while state.epoch < num_epochs:
            epoch, last_step = state.epoch, (state.epoch + 1) * data.num_steps - 1
            train_stats = train_one_epoch(
                loss_fn, data.batches(epoch, state.step), state, update, progress, world,
                seed=args.seed, amp_dtype=amp_dtype, after_step=saver.after_step, before_batch=gradient_norms.measure,
            )  # fmt: skip
            guard.require_step(train_stats, epoch, epoch + 1 == num_epochs and not args.dry_run)
            with saver.evaluation():
                test_stats = evaluate_both(model, model_ema, data, world, amp_dtype, saver.after_batch, predictions)
            schedule.step(test_stats["acc1"])
            record = {f"train_{name}": value for name, value in train_stats.items()}
            record |= {f"test_{name}": value for name, value in test_stats.items()}
            record |= {"epoch": epoch, "n_parameters": state.num_parameters, "bad_images": len(data.bad_images(world))}
            record |= first_step_record(state.totals) | gradient_norms.record()
            record |= redundancy.measure(epoch, epoch + 1 == num_epochs, log, last_step)
            log.epoch(record, last_step)  # before the save: a run that resumes from it does not repeat the epoch
            saver.end_epoch(state.next_epoch(test_stats))
            log.print(epoch_line(record, num_epochs))
        saver.close()

        test_stats = test_stats or evaluate_both(model, model_ema, data, world, amp_dtype, predictions=predictions)
        curves = partial(draw_curves, [*objective.coefs])
        end_run(folder, log, state, data, flags, curves, record, test_stats, predictions)


def draw_curves(terms: Sequence[str], folder: Path):
    """Draw the curves of a run folder, with those of these terms."""
    from reports import figures  # here, as matplotlib takes a second to import

    figures.curves(folder, terms)


def redundancy_figure(epoch: int, report: dict):
    """A figure of the redundancy that is measured during a run."""
    from reports import redundancy_figures

    return redundancy_figures.redundancy_depth({f"epoch {epoch}": [report]})


def command_line(argv: list[str] | None = None):
    """`main` with the flags of a command line; a user's mistake ends in one line and a non-zero exit code."""
    args = arguments.parse_args(argv)
    if args.eval:
        _, origin = find_evaluated(args.resume, args.output_dir, args.finetune, args.checkpoint_key)
        args = arguments.parse_evaluation(argv, origin.flags, origin.classes)
    with one_line_errors(), joined_world(args.device, args.dist_url) as world:
        main(args, world)


if __name__ == "__main__":
    run_command(command_line)
