"""One epoch of training, and evaluation."""

import contextlib
from collections.abc import Callable, Iterable

import numpy as np
import torch
from timm.utils import unwrap_model
from torch import nn
from torch.nn import functional as F

from training.checkpoint import TrainState
from training.classification_metrics import NUM_BINS, ImageResults, calibration_error, calibration_sums
from training.predictions import Predictions
from training.progress import Progress
from training.schedule import learning_rates
from training.update import GuardedUpdate
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
    loss_fn: nn.Module,
    loader: Iterable,
    state: TrainState,
    update: GuardedUpdate,
    progress: Progress,
    world: World,
    *,
    seed: int = 0,
    amp_dtype: torch.dtype | None = None,
    after_step: Callable[[], None] = lambda: None,
    before_batch: Callable[..., None] = lambda *batch: None,
) -> dict[str, float]:
    """Train the rest of an epoch, from `state.step` on.

    Args:
        loss_fn: a `DiverseLoss` around `state.model` whose mixup is a `BatchAugmentation`, or DistributedDataParallel
            around one.
        loader: the batches of the steps that are left, `update.accum_steps` for each.
        state: what the steps change; its `step` counts up.
        update: of the weights and their average.
        progress: of the run.
        seed: of mixing, erasing, dropout and probes.
        after_step: called when `state` is complete after a step; may save it, or raise to stop.
        before_batch: called with the number, images, labels and draws of a batch before its forward pass; may measure.

    Returns:
        Means over the epoch's steps and processes: loss, every term and its fraction of the loss, grad_norm; and lr
        (and lr_min, if it is not one rate), images_per_s of all processes, data_wait (fraction of the time spent
        waiting for the loader), both without the first step of this process if there are others, skipped_steps, and
        overflows (steps that fp16's loss scale skipped to adjust itself, which is no fault).
    """
    loss_fn.train()
    mixup = unwrap_model(loss_fn).mixup
    unwrap_model(loss_fn).set_epoch(state.epoch)
    first_batch = state.step * update.accum_steps
    for batch, (images, labels) in enumerate(progress.batches(loader), start=first_batch):
        ends_step = (batch + 1) % update.accum_steps == 0
        images = images.to(world.device, non_blocking=True)
        labels = labels.to(world.device, non_blocking=True)
        draws = mixup.draw(images, seed, world.rank, state.epoch, batch)

        reseed("step", seed, world.rank, state.epoch, batch, device=world.device)
        update.before_forward()
        before_batch(batch, images, labels, draws)
        with loss_fn.no_sync() if world.size > 1 and not ends_step else contextlib.nullcontext():
            with autocast(world.device, amp_dtype):
                loss, terms = loss_fn(images, labels, draws)
            update.backward(loss, terms)
        progress.count_images(len(images))
        if not ends_step:
            continue

        state.totals.add(*update.step(state.epoch, state.step))
        state.step += 1
        progress.end_step()
        try:
            after_step()
        except SystemExit:  # a stop, at this step on all ranks: also report what a GPU has skipped lately
            update.guard.report_pending(wait=True)
            raise
    progress.end_epoch()
    update.guard.report_pending(wait=True)
    return {
        **learning_rates(update.optimizer),
        **state.totals.epoch.averages(world),
        **progress.speed(),
        "skipped_steps": state.totals.skipped(state.step),
        "overflows": int(state.totals.overflows),
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
    predictions: Predictions | None = None,
) -> dict[str, float]:
    """Cross-entropy, top-1 and top-5 accuracy and calibration over the images of all processes' loaders, each once.

    Args:
        model: a plain timm model (not DistributedDataParallel: ranks may have unequal numbers of batches).
        loader: this process's part of the images.
        after_batch: called after each of the first `common_batches`, which every process has; may raise to stop.
        model_ema: its average, evaluated on the same batches.
        predictions: collects the results of each image; None = they are not kept.

    Returns:
        loss in nats, acc1 and acc5 in percent (acc5 is of all classes where there are fewer than five), images, and
        ece in percent, see `expected_calibration_error`; and with `_ema` appended to their names those of the average.

    Raises:
        SystemExit: there is no image.
    """
    models = {"": model} | ({} if model_ema is None else {"_ema": model_ema})
    totals, images = dict.fromkeys(models, 0), 0
    for index, batch in enumerate(loader):
        results = {}
        for suffix, each in models.items():
            sums, results[suffix] = _sums_and_results(each, *batch, amp_dtype)
            totals[suffix] = totals[suffix] + sums.to(world.device)
        if predictions is not None:
            predictions.add(batch[1], results)
        images += len(batch[1])
        if index < common_batches:
            after_batch()
    images = world.sum(torch.tensor(float(images), dtype=torch.float64, device=world.device)).item()
    if not images:
        raise SystemExit("error: the validation set is empty")
    stats = {}
    for suffix, total in totals.items():  # a process without a batch still takes part
        empty = torch.zeros(3 + 3 * NUM_BINS, dtype=torch.float64, device=world.device)
        loss, hits1, hits5, *bins = world.sum(total if torch.is_tensor(total) else empty).tolist()
        values = {"loss": loss / images, "acc1": 100 * (hits1 / images), "acc5": 100 * (hits5 / images)}
        values |= {"images": int(images), "ece": calibration_error(np.reshape(bins, (NUM_BINS, 3)))}
        stats |= {f"{name}{suffix}": value for name, value in values.items()}
    return stats


def _sums_and_results(model: nn.Module, samples: torch.Tensor, labels: torch.Tensor, amp_dtype: torch.dtype | None):
    """Sums over a batch of cross-entropy, top-1 hits, top-5 hits, and `calibration_sums` row by row, in float64; and
    its `ImageResults`.

    The host waits for no GPU.
    """
    model.eval()
    device = next(model.parameters()).device
    to_gpu = device.type == "cuda"  # where the queue waits for the copy; the host would not
    samples, labels = (tensor.to(device, non_blocking=to_gpu) for tensor in (samples, labels))
    with autocast(device, amp_dtype):
        logits = model(samples)
    logits = logits.float()
    top5 = logits.topk(min(5, logits.shape[1])).indices
    predicted, in_top5 = top5[:, 0], (top5 == labels[:, None]).any(dim=1)
    is_right = predicted == labels
    log_probs = logits.log_softmax(dim=1)
    confidence = log_probs.gather(1, predicted[:, None]).squeeze(1).exp()
    losses = F.nll_loss(log_probs, labels, reduction="none")
    results = ImageResults(predicted, confidence, in_top5, losses)
    loss = F.nll_loss(log_probs, labels, reduction="sum")
    sums = torch.stack([loss.double(), is_right.sum().double(), in_top5.sum().double()])
    return torch.cat([sums, calibration_sums(confidence, is_right).flatten()]), results
