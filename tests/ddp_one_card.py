"""Gradients of a batch that two processes on one device share, or that one process has; the first process saves them.

Run by tests/test_cuda.py for each process: python ddp_one_card.py OUTPUT RANK NUM_PROCESSES FLAGS OF MAIN.PY. The
processes use gloo, because NCCL refuses two of them on one GPU.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from timm.utils import random_seed

from benchmarks.training_steps import NUM_CLASSES
from pipeline.batch_augmentation import Draws
from training.arguments import parse_args
from training.build import build_augmentation, build_diverse_loss, build_initial, compile_and_wrap
from utils import World, reseed

STEPS = 2  # DistributedDataParallel exchanges the gradients of its first step differently


def main(rank: int, size: int, output: Path, words: list[str]):
    """The process `rank` of `size`."""
    args = parse_args(words)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{output}.meeting", rank=rank, world_size=size)
    world = World(rank, size, rank, size, torch.device(args.device))
    model = build_initial(args, NUM_CLASSES).double().to(world.device)
    loss_fn = build_diverse_loss(args, world, model, NUM_CLASSES, build_augmentation(args, of_bytes=False))
    loss_fn = compile_and_wrap(args, world, loss_fn)
    random_seed(1)
    samples = torch.randn(args.batch_size, 3, args.input_size, args.input_size, dtype=torch.float64)
    labels = torch.randint(NUM_CLASSES, (args.batch_size,))
    samples, labels = samples.to(world.device), labels.to(world.device)
    mine = slice(rank * args.batch_size // size, (rank + 1) * args.batch_size // size)
    for _ in range(STEPS):
        model.zero_grad()
        reseed("step", 0, device=world.device)  # the same probes in every process
        loss, _ = loss_fn(samples[mine], labels[mine], Draws())
        loss.backward()
    if rank == 0:
        torch.save({name: parameter.grad.cpu() for name, parameter in model.named_parameters()}, output)
    if size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a machine without network may not resolve its own name
    main(int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[1]), sys.argv[4:])
