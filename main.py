"""Train or evaluate a timm vision transformer with the diversity regularizers of "The Principle of Diversity"."""

import contextlib
import dataclasses
import datetime
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import timm.optim
import torch
import yaml
from timm.layers import set_fused_attn
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import arguments
import checkpoint
import checkpoint_files
import figures
import redundancy_figures
from datasets import Data, build_data
from diversity import DiversityObjective, PatchMixup, TapError, TappedViT, measurable, measure_redundancy
from engine import FiniteGuard, TrainingLoss, autocast_dtype, evaluate, train_one_epoch
from images import loader_errors
from interruption import StopSignals, locked
from losses import DistillationLoss
from models import build_model
from parsing import flag_of
from randomness import make_deterministic, seed_everything
from utils import (
    RunLog,
    World,
    environment_lines,
    joined_world,
    keep_freed_memory,
    one_line_errors,
    quiet_warnings,
    run_command,
    write_json,
)
from weights import load_weights

SUMMARY = "summary.json"
FUSED = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)  # which have a fused form that can skip a step itself
WATCHED_IMAGES = 64  # whose redundancy is measured while training


def main(args: Namespace, world: World):
    """One run: build what the flags describe, then train and evaluate it, or evaluate it only."""
    quiet_warnings()
    if world.device.type == "cpu":
        keep_freed_memory()
    torch.backends.cudnn.benchmark = True
    if args.deterministic:
        make_deterministic()
    set_fused_attn(args.fused_attn)
    with contextlib.ExitStack() as stack, loader_errors():
        if not args.eval:
            hold_folder(stack, args, world)
        finds_its_own = args.resume == "auto"
        if finds_its_own:
            newest = checkpoint.find_newest(Path(args.output_dir)) if world.is_main else None
            args.resume = world.from_main(str(newest or ""))
        if args.eval:
            evaluate_only(args, world)
        else:
            train(args, world, stack, finds_its_own)


def evaluate_only(args: Namespace, world: World):
    """Print the accuracies of a checkpoint."""
    data = build_data(args, world)
    model, model_ema, resumed, notes = build_weights(args, world, data)
    if resumed:
        checkpoint.load_model_and_ema(model, model_ema, resumed, args.resume)
    stats = evaluate_both(model, model_ema, data, args, world, autocast_dtype(args.amp, world.device))
    if world.is_main:
        print("\n".join([*environment_lines(world, args.seed), *notes, accuracy_line(stats)]))


def train(args: Namespace, world: World, stack: contextlib.ExitStack, finds_its_own: bool):
    """Train, from the start or from `--resume`, and evaluate each epoch.

    Args:
        stack: what holds the run folder; it ends with the run.
        finds_its_own: whether `--resume auto` chose the checkpoint, if there was any.
    """
    amp_dtype = autocast_dtype(args.amp, world.device)
    data = build_data(args, world)
    model, model_ema, resumed, notes = build_weights(args, world, data)
    objective = build_objective(args, world, model, data.num_classes)
    tapped = build_tapped(args, model, objective)
    mixup_fn = build_mixup(args, tapped.grid if objective.patch_logits else None)
    training_loss = build_training_loss(args, world, tapped, objective)

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
        if state.epoch >= num_epochs and not awaits_summary(args):
            if finds_its_own:
                if world.is_main:
                    print(f"{args.output_dir} has finished its {num_epochs} epochs")
                return
            raise SystemExit(
                f"error: --resume {args.resume} has finished its {num_epochs} epochs; raise --epochs or use --eval"
            )

    tables = "\n".join(filter(None, [args.preset and f"preset {args.preset}", objective.table(), tapped.table()]))
    output_dir = prepare_output_dir(args, world, tables, finds_its_own)
    hold_folder(stack, args, world)
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
        *(f"warning: {line}" for line in arguments.without_effect(args)),
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
    test_stats = None
    while state.epoch < num_epochs:
        epoch = state.epoch
        train_stats = train_one_epoch(
            training_loss,
            data.batches(epoch, state.step),
            mixup_fn,
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


def build_weights(args: Namespace, world: World, data: Data) -> tuple[nn.Module, ModelEmaV3 | None, dict, list[str]]:
    """The model as the flags start it, its average, the checkpoint to continue from, and what there is to say."""
    seed_everything(args.seed)  # the same initial weights, and so the same average of them, on every rank
    model = build_model(
        args.model, data.num_classes, args.input_size, args.patch_size, args.drop, args.drop_path, **args.model_kwargs
    )
    notes = load_weights(model, args.finetune, "--finetune") if args.finetune and not args.resume else []
    resumed = checkpoint.load(args.resume, "--resume") if args.resume else {}
    if args.grad_checkpointing:
        enable_grad_checkpointing(model, args.model)
    model.to(world.device)
    model_ema = None
    if args.model_ema and (not args.eval or "model_ema" in resumed):
        model_ema = ModelEmaV3(model, args.model_ema_decay, device="cpu" if args.model_ema_force_cpu else None)
    return model, model_ema, resumed, notes


def enable_grad_checkpointing(model: nn.Module, name: str):
    """Have the blocks compute their activations again in the backward pass.

    Raises:
        SystemExit: the model cannot.
    """
    try:
        model.set_grad_checkpointing()
    except (AttributeError, AssertionError):
        raise SystemExit(f"error: --model {name} has no --grad-checkpointing") from None


def hold_folder(stack: contextlib.ExitStack, args: Namespace, world: World):
    """Lock the run folder, once it is there, against other runs, and clear it of what a killed one left half written.

    Raises:
        SystemExit: on all processes, if another run holds it.
    """
    folder, error = Path(args.output_dir), None
    if world.is_main and args.output_dir and folder.is_dir():
        try:
            stack.enter_context(locked(folder))
            checkpoint_files.sweep(folder)
        except SystemExit as refusal:
            error = refusal.code
    if error := world.from_main(error):
        raise SystemExit(error)


def build_objective(args: Namespace, world: World, model: nn.Module, num_classes: int) -> DiversityObjective:
    """The loss that the flags describe, with its teacher if there is one."""
    distillation = None
    if args.distillation_type != "none":
        teacher = build_model(args.teacher_model, num_classes, args.input_size, flag="--teacher-model")
        load_weights(teacher, args.teacher_path, "--teacher-path", new_head=False)
        teacher.to(world.device)
        distillation = DistillationLoss(teacher, args.distillation_type, args.distillation_alpha, args.distillation_tau)
    if hasattr(model, "set_distilled_training"):
        model.set_distilled_training(distillation is not None)
    return DiversityObjective(
        arguments.coefficients(args),
        args.smoothing,
        distillation,
        mixing_balance=args.mixing_balance,
        **arguments.term_options(args),
    )


def build_tapped(args: Namespace, model: nn.Module, objective: DiversityObjective) -> TappedViT:
    """The model with the hooks that the objective needs.

    Raises:
        SystemExit: the model lacks what a term needs.
    """
    try:
        return TappedViT(
            model,
            objective.reads,
            objective.patch_logits,
            emb_layers=args.emb_layers,
            attn_layers=args.attn_layers,
            weight_groups=args.weight_groups,
        )
    except TapError as error:
        terms = objective.coefs if error.argument == "model" else objective.readers(error.tap)
        flags = [flag_of(f"{name}_coef") for name in terms]
        if error.argument not in (None, "model"):
            flags.insert(0, f"{flag_of(error.argument)} {getattr(args, error.argument)}")
        raise SystemExit(f"error: --model {args.model} does not serve {', '.join(flags)}: {error}") from None


def build_training_loss(
    args: Namespace, world: World, tapped: TappedViT, objective: DiversityObjective
) -> TrainingLoss | DistributedDataParallel:
    """Model and objective as one module: compiled as one graph, and wrapped for several processes.

    Raises:
        SystemExit: --compile, and something that cannot be in one graph.
    """
    training_loss = TrainingLoss(tapped, objective)
    breaks = [flag_of(f"{name}_coef") for name in objective.differentiating]
    breaks += ["--grad-checkpointing"] if args.grad_checkpointing else []
    if args.compile and breaks:
        raise SystemExit(f"error: --compile makes one graph, which {breaks[0]} does not allow; leave one of them out")
    compiles = args.compile or (args.compile is None and world.device.type == "cuda" and not breaks)
    if compiles:
        # Random numbers as without compiling, so that both train alike.
        training_loss.compile(fullgraph=True, dynamic=False, options={"fallback_random": True})
    if world.size == 1:
        return training_loss
    return DistributedDataParallel(
        training_loss,
        device_ids=[world.device.index] if world.device.type == "cuda" else None,
        broadcast_buffers=any(True for _ in tapped.model.buffers()),  # not a teacher's, which stay as they are
        gradient_as_bucket_view=True,
        static_graph=args.static_graph and args.accum_steps == 1 and not compiles,
    )


def build_mixup(args: Namespace, grid: tuple[int, int] | None) -> PatchMixup:
    """Mixup and CutMix as the flags describe them, with labels for the patches of a grid."""
    return PatchMixup(
        args.mixup,
        args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        grid=grid,
    )


def build_optimizer(args: Namespace, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """timm's optimizer, without weight decay on biases, norms and what the model exempts; fused where it can be."""
    options = optimizer_kwargs(args) | {"lr": lr}
    name = args.opt.lower()
    can_fuse = not name.startswith("lookahead_") and timm.optim.get_optimizer_info(name).opt_class in FUSED
    if args.fused_opt and can_fuse:
        options |= {"fused": True}
    try:
        return create_optimizer_v2(model, **options)
    except (TypeError, ValueError, IndexError, AssertionError) as error:
        raise SystemExit(
            f"error: --opt {args.opt} refuses its settings (--opt-betas, --opt-eps ...): {error}"
        ) from None


def evaluate_both(
    model, model_ema, data, args, world, amp_dtype, after_batch: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """`evaluate` of the raw weights and, with `_ema` appended to its names, of their average."""
    if not data.val_is_shared:
        world = dataclasses.replace(world, size=1)
    common = {"after_batch": after_batch, "common_batches": data.common_val_batches(world)}
    stats = evaluate(model, data.val, world, amp_dtype, **common)
    if stats["images"] != data.num_val:
        raise SystemExit(f"error: {data.num_val - stats['images']} of {data.num_val} validation images are unreadable")
    if model_ema is not None:
        averaged = evaluate(model_ema.module, data.val, world, amp_dtype, **common)
        stats |= {f"{name}_ema": value for name, value in averaged.items()}
    return stats


def prepare_output_dir(args: Namespace, world: World, tables: str, finds_its_own: bool) -> Path | None:
    """The run folder, made by the main process; None on the others or without one.

    It holds the flags as args.yaml and `tables`, the terms and what they read, as objective.txt; a summary.json of an
    earlier end is gone until this run has ended.

    Raises:
        SystemExit: on all processes, if it cannot be written, or holds another run that is not being resumed.
    """
    if not args.output_dir:
        return None
    output_dir, error = Path(args.output_dir), None
    continues = args.resume and Path(args.resume).resolve().parent == output_dir.resolve()
    if world.is_main and not (continues or finds_its_own) and (output_dir / "log.txt").exists():
        error = (
            f"error: --output-dir {output_dir} already holds a run; continue it with "
            f"--resume {output_dir / checkpoint.LAST}, or choose another folder"
        )
    elif world.is_main:
        flags = {name: value for name, value in vars(args).items() if name not in arguments.NOT_REPEATED}
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            (output_dir / "args.yaml").write_text(yaml.safe_dump(flags, sort_keys=False))
            (output_dir / "objective.txt").write_text(f"{tables}\n")
            (output_dir / SUMMARY).unlink(missing_ok=True)
        except OSError as failure:
            error = f"error: --output-dir {output_dir} cannot be written: {failure.strerror}"
    if error := world.from_main(error):
        raise SystemExit(error)
    return output_dir if world.is_main else None


def awaits_summary(args: Namespace) -> bool:
    """Whether the run of `--resume` was cut off between its last checkpoint and its end."""
    folder = Path(args.resume).parent
    return Path(args.output_dir).resolve() == folder.resolve() and not (folder / SUMMARY).exists()


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
        figures.curves(output_dir, terms)
        accuracies = {f"test_{name}": value for name, value in stats.items()}
        write_json({"epochs": epochs, "training_seconds": seconds, **accuracies}, output_dir / SUMMARY)
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
