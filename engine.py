"""One epoch of training, and evaluation."""

import contextlib
import datetime
import sys
import time
from collections.abc import Callable, Iterable, Iterator

import torch
from timm.utils import accuracy
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from checkpoint import TrainState
from diversity import DiversityObjective, MixedTarget, PatchMixup, TappedViT
from guard import FiniteGuard, step_if, update_if
from randomness import reseed
from utils import Meters, RunLog, World


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


class TrainingLoss(nn.Module):
    """Model and objective as one module, so that they compile as one graph and DistributedDataParallel wraps both.

    Args:
        tapped: a `TappedViT` with what `objective` reads.
    """

    def __init__(self, tapped: TappedViT, objective: DiversityObjective):
        super().__init__()
        self.tapped = tapped
        self.objective = objective

    def forward(self, samples: torch.Tensor, target: MixedTarget) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Mixed samples [B, 3, S, S] and their labels -> the 0-dim loss and {term: 0-dim value}."""
        return self.objective(self.tapped(samples), target, samples)


def train_one_epoch(
    training_loss: nn.Module,
    loader: Iterable,
    mixup_fn: PatchMixup,
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
        training_loss: a `TrainingLoss` around `state.model`, or DistributedDataParallel around one.
        loader: the batches of the steps that are left, `accum_steps` for each.
        state: what the steps change; its `step` counts up.
        num_steps: optimizer steps of the whole epoch; None = those done and those the loader has.
        seed: of mixing, dropout and probes.
        images: tells which images a step of this epoch is made of on this rank, for messages.
        after_step: called when `state` holds everything up to a step; may save it, or raise to stop.
        accum_steps: batches per optimizer step.
        clip_grad: largest gradient norm, or None.
        log_interval: optimizer steps between console lines; 0 = none.

    Returns:
        Means over the epoch's steps and processes: loss, every term and its share, lr, grad_norm; and images_per_s of
        all processes, data_wait (share of the time spent waiting for the loader), skipped_steps, and overflows (steps
        that fp16's loss scale skipped to settle, which is no fault).
    """
    training_loss.train()
    optimizer, loss_scaler, epoch, totals = state.optimizer, state.loss_scaler, state.epoch, state.totals
    optimizer.zero_grad()
    num_steps = state.step + len(loader) // accum_steps if num_steps is None else num_steps
    progress = Progress(state, num_steps, log, world, log_interval)
    group = Meters()
    first_batch = state.step * accum_steps
    for index, (samples, labels) in enumerate(progress.timed(loader), start=first_batch):
        step = index // accum_steps
        ends_group = index % accum_steps == accum_steps - 1
        samples = samples.to(world.device, non_blocking=True)
        labels = labels.to(world.device, non_blocking=True)
        reseed("mixing", seed, epoch, index)
        samples, target = mixup_fn(samples, labels)

        reseed("step", seed, world.rank, epoch, index, device=world.device)
        gradients_stay_local = world.size > 1 and not ends_group
        with training_loss.no_sync() if gradients_stay_local else contextlib.nullcontext():
            with autocast(world.device, amp_dtype):
                loss, terms = training_loss(samples, target)
            loss_scaler.scale(loss / accum_steps).backward()
        group.add({"loss": loss, **terms})
        totals.images += len(samples) * world.size
        if not ends_group:
            continue

        loss_scaler.unscale_(optimizer)
        grad_norm = _grad_norm_and_clip(optimizer, clip_grad)
        values = {**group.local_averages(), "grad_norm": grad_norm}
        group = Meters()
        checked = {name: value for name, value in values.items() if not name.endswith("_share")}
        if loss_scaler.is_enabled():  # an overflow is no fault while the scale has room to fall
            has_room = loss_scaler.scale(torch.ones_like(grad_norm)) >= 1
            checked["grad_norm"] = grad_norm.where(~has_room, 0)
        allowed = guard.check(checked, f"epoch {epoch} step {step}", lambda step=step: images(step))
        if loss_scaler.is_enabled():
            overflows = allowed & ~grad_norm.isfinite()
            totals.overflows = totals.overflows + overflows
            allowed = allowed & ~overflows
        step_if(optimizer, allowed)
        loss_scaler.update()
        totals.epoch.add(values, allowed)
        totals.window.add(values, allowed)
        if state.model_ema is not None:
            update_if(state.model_ema, state.model, allowed)
        optimizer.zero_grad()
        guard.settle()

        state.step = step + 1
        if progress.finished_step(step):
            progress.report(step, optimizer.param_groups[0]["lr"], totals.window.averages(world))
            totals.window = Meters()
        after_step()
    if log_interval:  # the last line waits for the end, so that a run which goes on from the last step tells it again
        progress.report(num_steps - 1, optimizer.param_groups[0]["lr"], totals.window.averages(world))
    progress.close()
    guard.settle(wait=True)
    return {
        "lr": optimizer.param_groups[0]["lr"],
        **totals.epoch.averages(world),
        "images_per_s": totals.images / max(totals.seconds, 1e-9),
        "data_wait": totals.waited / max(totals.seconds, 1e-9),
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
) -> dict[str, float]:
    """Cross-entropy and top-1, top-5 accuracy over the images of all processes' loaders, each counted once.

    Args:
        model: a plain timm model (not DistributedDataParallel: ranks may have unequal numbers of batches).
        loader: this process's share of the images.
        after_batch: called after each of the first `common_batches`, which every process has; may raise to stop.

    Returns:
        loss in nats, acc1 and acc5 in percent (acc5 is of all classes where there are fewer than five), images.

    Raises:
        SystemExit: there was no image.
    """
    model.eval()
    device = next(model.parameters()).device
    totals = torch.zeros(4, dtype=torch.float64, device=device)
    to_gpu = device.type == "cuda"  # where the queue waits for the copy; the host would not
    for index, (samples, labels) in enumerate(loader):
        samples = samples.to(device, non_blocking=to_gpu)
        labels = labels.to(device, non_blocking=to_gpu)
        with autocast(device, amp_dtype):
            logits = model(samples)
        logits = logits.float()
        acc1, acc5 = accuracy(logits, labels, topk=(1, 5))
        batch = len(labels)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        totals += torch.stack([loss, acc1 * batch / 100, acc5 * batch / 100, loss.new_tensor(batch)])
        if index < common_batches:
            after_batch()
    loss, hits1, hits5, images = world.sum(totals.to(world.device)).tolist()
    if not images:
        raise SystemExit("error: the validation set is empty")
    return {"loss": loss / images, "acc1": 100 * hits1 / images, "acc5": 100 * hits5 / images, "images": int(images)}


class Progress:
    """Clock, throughput and console lines of one epoch; a bar too where a person watches a terminal."""

    def __init__(self, state: TrainState, num_steps: int, log: RunLog, world: World, log_interval: int):
        self.epoch, self.totals = state.epoch, state.totals
        self.num_steps, self.log, self.world, self.log_interval = num_steps, log, world, log_interval
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
            self.totals.waited += wait
            self.window_waited += wait
            yield batch

    def finished_step(self, step: int) -> bool:
        """Count an optimizer step; True when a console line is due."""
        now = time.perf_counter()
        self.totals.seconds += now - self.clock
        self.clock = now
        self.window_steps += 1
        self.bar.update()
        return self.log_interval > 0 and step % self.log_interval == 0 and step < self.num_steps - 1

    def report(self, step: int, lr: float, averages: dict[str, float]):
        """One console line in DeiT's form, and the same values to TensorBoard."""
        seconds, steps = time.perf_counter() - self.window_start, max(self.window_steps, 1)
        eta = datetime.timedelta(seconds=round(self.totals.seconds / (step + 1) * (self.num_steps - step - 1)))
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
