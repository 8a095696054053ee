"""Bytes that two ranks exchange in a training step: plain DistributedDataParallel, and this project's step.

Run by tests/test_fast_path.py under torchrun: python ddp_volume.py FLAGS OF MAIN.PY. Rank 0 prints JSON.
"""

import json
import sys

import torch
import torch.distributed as dist
from helpers import train_epoch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from benchmarks.training_steps import NUM_CLASSES, random_batch
from training.arguments import parse_args
from training.build import (
    build_augmentation,
    build_diverse_loss,
    build_initial,
    build_optimizer,
    compile_and_wrap,
)
from training.checkpoint import TrainState
from utils import joined_world

STEPS = 4


def counted(ddp: DistributedDataParallel) -> list[int]:
    """A list that every bucket of gradients adds its bytes to."""
    sizes = []

    def hook(state, bucket):
        sizes.append(bucket.buffer().nbytes)
        return allreduce_hook(None, bucket)

    ddp.register_comm_hook(None, hook)
    return sizes


def main(words):
    args = parse_args(words)
    with joined_world("cpu", "env://") as world:
        samples, labels = random_batch(args, world.device)
        ddp = DistributedDataParallel(build_initial(args, NUM_CLASSES).train())
        plain = counted(ddp)
        for _ in range(STEPS):
            F.cross_entropy(ddp(samples), labels).backward()

        model = build_initial(args, NUM_CLASSES)
        loss_fn = build_diverse_loss(args, world, model, NUM_CLASSES, build_augmentation(args, of_bytes=False))
        ddp = compile_and_wrap(args, world, loss_fn)
        ours = counted(ddp)
        exchanged, all_reduce = [], dist.all_reduce

        def counting_all_reduce(tensor, *rest, **options):
            exchanged.append(tensor.nbytes)
            return all_reduce(tensor, *rest, **options)

        dist.all_reduce = counting_all_reduce
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        state = TrainState(model, None, build_optimizer(args, model, 1e-3), None, scaler)
        beside = []  # the gradients, so far

        def after_step():
            beside.append(sum(exchanged) - sum(ours))

        batches = [(samples, labels)] * STEPS
        train_epoch(ddp, batches, state, world=world, after_step=after_step, log_interval=0)
        if world.is_main:
            print(json.dumps({"plain": plain, "ours": ours, "beside": beside}))


if __name__ == "__main__":
    main(sys.argv[1:])
