"""When two ranks send their gradients: eager and compiled, with and without checkpointed blocks.

Run by tests/test_fast_path.py under torchrun. Rank 0 prints, for each way, a line of JSON: the buckets sent before the
first layer's gradient was there, all buckets, and the gradients' norm.
"""

import json

import torch
from helpers import model_of
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from diversity import PRESETS, DiverseLoss, PatchMixup
from pipeline.batch_augmentation import BatchAugmentation
from utils import World, joined_world

STEPS = 3  # DistributedDataParallel forms its buckets after the first


def gradients(world: World, compiled: bool, checkpointing: bool) -> dict:
    torch.manual_seed(0)
    model = model_of(depth=6, embed_dim=192)
    model.set_grad_checkpointing(checkpointing)
    training_loss = DiverseLoss(model, PRESETS["released"].coefs, BatchAugmentation(PatchMixup()), smoothing=0.1)
    if compiled:
        torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = checkpointing
        training_loss.compile_step(backend="aot_eager")
    ddp = DistributedDataParallel(training_loss, gradient_as_bucket_view=True, static_graph=True, bucket_cap_mb=1)
    sent = []

    def send(state, bucket):
        sent.append("bucket")
        return allreduce_hook(None, bucket)

    ddp.register_comm_hook(None, send)
    model.patch_embed.proj.weight.register_post_accumulate_grad_hook(lambda parameter: sent.append("first layer"))
    samples, labels = torch.randn(4, 3, 32, 32), torch.randint(7, (4,))
    for step in range(STEPS):
        sent.clear()
        ddp.zero_grad()
        draws = training_loss.mixup.draw(samples, 0, world.rank, 0, step)
        torch.manual_seed(step)
        ddp(samples, labels, draws)[0].backward()
    norm = nn.utils.get_total_norm([parameter.grad.double() for parameter in ddp.parameters()])
    return {"early": sent.index("first layer"), "buckets": sent.count("bucket"), "norm": norm.item()}


if __name__ == "__main__":
    with joined_world("cpu", "env://") as world:
        for compiled in (False, True):
            for checkpointing in (False, True):
                result = gradients(world, compiled, checkpointing)
                if world.is_main:
                    print(json.dumps(result), flush=True)
