"""One epoch of training, and evaluation."""

import contextlib
import datetime
import sys
import time
from collections.abc import Callable, Iterable, Iterator

import torch
from timm.utils import accuracy, unwrap_model
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from training.checkpoint import TrainState
from training.guard import FiniteGuard, GuardedUpdate
from training.log import Meters, RunLog
from utils import World, reseed


def autocast_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """What `--amp` means on a device: bfloat16, float16, or None for full precision."""
    if amp == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]


def autocast(device: torch.device, dtype: torch.dtype | None):
    """Autocast to `dtype`, or full precision when it is None."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def train_one_epoch(
    training_loss: nn.Module,
    loader: Iterable,
    state: TrainState,
    guard: FiniteGuard,
    log: RunLog,
    world: World,
    *,
    num_steps: int | None = None,
    seed: int = 0,
    images: Callable[[int], str] = lambda step: "",
    after_step: Callable[[], None] = lambda: None,
    amp_dtype: torch.dtype | None = None,
    accum_steps: int = 1,
    clip_grad: float | None = None,
    log_interval: int = 50,
) -> dict[str, float]:
    """Train the rest of an epoch, from `state.step` on.

    Args:
        training_loss: a `DiverseLoss` around `state.model` whose mixup is a `BatchAugmentation`, or
            DistributedDataParallel around one.
        loader: the batches of the steps that are left, `accum_steps` for each.
        state: what the steps change; its `step` counts up.
        num_steps: optimizer steps of the whole epoch; None = those done and those the loader has.
        seed: of mixing, erasing, dropout and probes.
        images: tells which images a step of this epoch is made of on this rank, for messages.
        after_step: called when `state` holds everything up to a step; may save it, or raise to stop.
        accum_steps: batches per optimizer step.
        clip_grad: largest gradient norm, or None.
        log_interval: optimizer steps between console lines; 0 = none.

    Returns:
        Means over the epoch's steps and processes: loss, every term and its share, lr, grad_norm; and images_per_s of
        all processes, data_wait (share of the time spent waiting for the loader), both without the first step of this
        process where it has others, skipped_steps, and overflows (steps that fp16's loss scale skipped to settle, which
        is no fault).
    """
    training_loss.train()
    unwrapped = unwrap_model(training_loss)
    num_raw = sum(not name.endswith("_share") for name in unwrapped.names)
    names = (*unwrapped.names[:num_raw], "grad_norm", *unwrapped.names[num_raw:])
    optimizer, loss_scaler, epoch, totals = state.optimizer, state.loss_scaler, state.epoch, state.totals
    update = GuardedUpdate(state.model, state.model_ema, optimizer)
    optimizer.zero_grad()
    num_steps = state.step + len(loader) // accum_steps if num_steps is None else num_steps
    progress = Progress(state, num_steps, log, world, log_interval)
    group = []  # values of the batches of a step
    first_batch = state.step * accum_steps
    for index, (samples, labels) in enumerate(progress.timed(loader), start=first_batch):
        step = index // accum_steps
        ends_step = index % accum_steps == accum_steps - 1
        if not group:
            update.remember_buffers()
        samples = samples.to(world.device, non_blocking=True)
        labels = labels.to(world.device, non_blocking=True)
        draws = unwrapped.mixup.draw(samples, seed, world.rank, epoch, index)

        reseed("step", seed, world.rank, epoch, index, device=world.device)
        gradients_stay_local = world.size > 1 and not ends_step
        with training_loss.no_sync() if gradients_stay_local else contextlib.nullcontext():
            with autocast(world.device, amp_dtype):
                loss, terms = training_loss(samples, labels, draws)
            loss_scaler.scale(loss / accum_steps).backward()
        group.append(torch.stack([*terms.values()]))
        progress.images += len(samples) * world.size
        if not ends_step:
            continue

        loss_scaler.unscale_(optimizer)
        grad_norm = _grad_norm_and_clip(optimizer, clip_grad)
        values = torch.stack(group).mean(dim=0)
        values, group = torch.cat([values[:num_raw], grad_norm[None], values[num_raw:]]), []
        checked = values[: num_raw + 1]
        if loss_scaler.is_enabled():  # an overflow is no fault while the scale has room to fall
            has_room = loss_scaler.scale(torch.ones_like(grad_norm)) >= 1
            checked = torch.cat([values[:num_raw], grad_norm.where(~has_room, 0)[None]])
        where = f"epoch {epoch} step {step}"
        allowed = guard.check(names[: num_raw + 1], checked, where, lambda step=step: images(step))
        if loss_scaler.is_enabled():
            overflows = allowed & ~grad_norm.isfinite()
            totals.overflows = totals.overflows + overflows
            allowed = allowed & ~overflows
        update(allowed)
        loss_scaler.update()
        totals.epoch.add(names, values, allowed)
        totals.window.add(names, values, allowed)
        optimizer.zero_grad()
        guard.report_pending()

        state.step = step + 1
        if progress.finished_step(step):
            progress.report(step, optimizer.param_groups[0]["lr"], totals.window.averages(world))
            totals.window = Meters()
        try:
            after_step()
        except SystemExit:  # a stop, at this step on all ranks: also name what a GPU has skipped lately
            guard.report_pending(wait=True)
            raise
    if log_interval:  # the last line waits for the end, so that a run which goes on from the last step tells it again
        progress.report(num_steps - 1, optimizer.param_groups[0]["lr"], totals.window.averages(world))
    progress.close()
    guard.report_pending(wait=True)
    return {
        "lr": optimizer.param_groups[0]["lr"],
        **totals.epoch.averages(world),
        **progress.speed(),
        "skipped_steps": totals.skipped(state.step),
        "overflows": int(totals.overflows),
    }


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Iterable,
    world: World,
    amp_dtype: torch.dtype | None = None,
    after_batch: Callable[[], None] = lambda: None,
    common_batches: int = 0,
    model_ema: nn.Module | None = None,
) -> dict[str, float]:
    """Cross-entropy and top-1, top-5 accuracy over the images of all processes' loaders, each counted once.

    Args:
        model: a plain timm model (not DistributedDataParallel: ranks may have unequal numbers of batches).
        loader: this process's share of the images.
        after_batch: called after each of the first `common_batches`, which every process has; may raise to stop.
        model_ema: its average, evaluated on the same batches.

    Returns:
        loss in nats, acc1 and acc5 in percent (acc5 is of all classes where there are fewer than five), images; and
        with `_ema` appended to their names those of the average.

    Raises:
        SystemExit: there was no image.
    """
    models = {"": model} | ({} if model_ema is None else {"_ema": model_ema})
    totals, images = dict.fromkeys(models, 0), 0
    for index, batch in enumerate(loader):
        for suffix, each in models.items():
            totals[suffix] = totals[suffix] + _losses_and_hits(each, *batch, amp_dtype).to(world.device)
        images += len(batch[1])
        if index < common_batches:
            after_batch()
    images = world.sum(torch.tensor(float(images), dtype=torch.float64, device=world.device)).item()
    if not images:
        raise SystemExit("error: the validation set is empty")
    stats = {}
    for suffix, total in totals.items():  # a process without a batch still takes part
        total = world.sum(total if torch.is_tensor(total) else torch.zeros(3, dtype=torch.float64, device=world.device))
        loss, hits1, hits5 = (total / images).tolist()
        values = {"loss": loss, "acc1": 100 * hits1, "acc5": 100 * hits5, "images": int(images)}
        stats |= {f"{name}{suffix}": value for name, value in values.items()}
    return stats


def _losses_and_hits(model: nn.Module, samples: torch.Tensor, labels: torch.Tensor, amp_dtype: torch.dtype | None):
    """Sums over a batch of cross-entropy, top-1 hits and top-5 hits, [3] in float64; the host waits for no GPU."""
    model.eval()
    device = next(model.parameters()).device
    to_gpu = device.type == "cuda"  # where the queue waits for the copy; the host would not
    samples, labels = (tensor.to(device, non_blocking=to_gpu) for tensor in (samples, labels))
    with autocast(device, amp_dtype):
        logits = model(samples)
    logits = logits.float()
    percents = torch.stack(accuracy(logits, labels, topk=(1, 5)))
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return torch.cat([loss[None], percents * len(labels) / 100]).double()


class Progress:
    """Clock, throughput and console lines of one epoch; a bar too where a person watches a terminal."""

    def __init__(self, state: TrainState, num_steps: int, log: RunLog, world: World, log_interval: int):
        self.epoch, self.totals = state.epoch, state.totals
        self.num_steps, self.log, self.world, self.log_interval = num_steps, log, world, log_interval
        self.state = state
        self.images, self.waited = 0, 0.0  # of the step in progress
        self.first = (0, 0.0, 0.0)  # the same of this process's first step
        self.step_images = 0
        self.clock = self.window_start = time.perf_counter()
        self.window_waited, self.window_steps = 0.0, 0
        on_terminal = world.is_main and sys.stderr.isatty()
        steps = {"initial": state.step, "total": num_steps}
        self.bar = tqdm(**steps, desc=f"epoch {self.epoch}", leave=False, disable=not on_terminal)

    def timed(self, loader: Iterable) -> Iterator:
        """The loader's batches, with the time spent waiting for each added up."""
        batches = iter(loader)
        while True:
            asked = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            wait = time.perf_counter() - asked
            self.waited += wait
            self.window_waited += wait
            yield batch

    def finished_step(self, step: int) -> bool:
        """Count an optimizer step; True when a console line is due."""
        now = time.perf_counter()
        if self.state.is_warm:
            self.totals.images += self.images
            self.totals.seconds += now - self.clock
            self.totals.waited += self.waited
        else:  # this process's first step compiles and starts the loader's workers
            self.first, self.state.is_warm = (self.images, now - self.clock, self.waited), True
        self.step_images, self.images, self.waited, self.clock = self.images, 0, 0.0, now
        self.window_steps += 1
        self.bar.update()
        return self.log_interval > 0 and step % self.log_interval == 0 and step < self.num_steps - 1

    def speed(self) -> dict[str, float]:
        """images_per_s and data_wait over the epoch so far."""
        images, seconds, waited = self.totals.images, self.totals.seconds, self.totals.waited
        if not images:  # the first step is all there is
            images, seconds, waited = self.first
        return {"images_per_s": images / max(seconds, 1e-9), "data_wait": waited / max(seconds, 1e-9)}

    def report(self, step: int, lr: float, averages: dict[str, float]):
        """One console line in DeiT's form, and the same values to TensorBoard."""
        seconds, steps = time.perf_counter() - self.window_start, max(self.window_steps, 1)
        eta = "unknown"  # after the first step of a process
        if self.totals.images:
            step_seconds = self.totals.seconds / self.totals.images * self.step_images
            eta = datetime.timedelta(seconds=round(step_seconds * (self.num_steps - step - 1)))
        width = len(str(self.num_steps))
        parts = [f"Epoch: [{self.epoch}]", f"[{step:>{width}}/{self.num_steps}]", f"eta: {eta}", f"lr: {lr:.6f}"]
        parts += [f"{name}: {value:.4g}" for name, value in averages.items() if not name.endswith("_share")]
        parts += [f"time: {seconds / steps:.4f}", f"data: {self.window_waited / steps:.4f}"]
        if self.world.device.type == "cuda":
            parts.append(f"max mem: {torch.cuda.max_memory_allocated(self.world.device) / 2**20:.0f}")
        self.log.print("  ".join(parts))
        values = {f"train/{name}": value for name, value in averages.items()}
        self.log.scalars({"train/lr": lr, **values}, self.epoch * self.num_steps + step)
        self.window_start, self.window_waited, self.window_steps = time.perf_counter(), 0.0, 0

    def close(self):
        self.bar.close()


def _grad_norm_and_clip(optimizer: torch.optim.Optimizer, clip_grad: float | None) -> torch.Tensor:
    """Norm of all gradients before clipping, 0-dim."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters])
    if clip_grad is not None:
        nn.utils.clip_grads_with_norm_(parameters, clip_grad, norm)
    return norm
