"""Training on the ranks of a process group beside the same training in one process, for programs that run as ranks."""

import json
from collections.abc import Callable

import torch
import torch.distributed as dist

from utils import joined_world


def compare_with_one_process(train: Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]):
    """Print, on rank 0, JSON with the largest differences of losses and weights.

    Args:
        train: (rank, size) -> the losses of the steps on this rank's images, and the weights after them.
    """
    with joined_world("cpu", "env://") as world:
        losses, weights = train(world.rank, world.size)
        dist.all_reduce(losses)
        losses /= world.size
        expected_losses, expected_weights = train(0, 1)
        if world.is_main:
            loss, weight = (losses - expected_losses).abs().max(), (weights - expected_weights).abs().max()
            print(json.dumps({"loss": loss.item(), "weights": weight.item()}), flush=True)
