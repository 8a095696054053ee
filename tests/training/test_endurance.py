"""Many steps of a small run: its memory, open files and threads do not grow."""

import gc
import os
import threading
from pathlib import Path

import pytest
import timm
import torch
from helpers import train_epoch, world
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3

from diversity import PRESETS, DiverseLoss, PatchMixup
from pipeline.batch_augmentation import BatchAugmentation
from training import checkpoint, saving
from training.log import RunLog
from training.schedule import Schedule
from training.stopping import StopSignals


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
@pytest.mark.parametrize("steps", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_memory_files_and_threads_do_not_grow(tmp_path, steps):
    """With all five terms, averaged weights, TensorBoard, and 40 saves."""
    gc.collect()  # files of earlier tests' loaders are not to be closed meanwhile
    torch.manual_seed(0)
    model = timm.create_model(
        "deit_tiny_patch16_224", img_size=16, patch_size=8, depth=1, embed_dim=8, num_heads=2, num_classes=3
    )
    preset = PRESETS["released"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = Schedule(create_scheduler_v2(optimizer, num_epochs=1)[0], epochs=1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    state = checkpoint.TrainState(model, ModelEmaV3(model, decay=0.9), optimizer, schedule, scaler)
    log = RunLog(tmp_path, world(), tensorboard=True)
    saver = saving.Saver(state, lambda: {"args": {}}, tmp_path, log, world(), StopSignals(), steps=steps // 40)
    batch = torch.randn(2, 3, 16, 16), torch.tensor([0, 2])
    held = {}

    def after_step():
        saver.after_step()
        if state.step in (steps // 5, steps - 1):
            saver.writer.wait()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            files = len(os.listdir("/proc/self/fd"))
            held[state.step] = pages * os.sysconf("SC_PAGE_SIZE") / 2**20, files, threading.active_count()

    stats = train_epoch(
        DiverseLoss(model, preset.coefs, BatchAugmentation(PatchMixup()), smoothing=0.1),
        [batch] * steps,
        state,
        world=world(),
        log=log,
        after_step=after_step,
        log_interval=50,
    )
    saver.close()
    log.close()
    (memory, *counts), (memory_after, *counts_after) = held.values()
    assert state.step == steps and stats["skipped_steps"] == 0
    assert all(after <= before for after, before in zip(counts_after, counts, strict=True)), (counts, counts_after)
    assert memory_after - memory < 8, (memory, memory_after)  # MiB
