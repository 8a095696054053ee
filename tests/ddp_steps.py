"""Three training steps with every term on this rank's part of each batch; rank 0 saves the weights.

All but `emb_vcreg`, whose statistics are those of the tokens of one process.

Run by tests/test_distributed.py: python ddp_steps.py OUTPUT, alone or under torchrun.
"""

import sys

import timm
import torch
from torch.nn.parallel import DistributedDataParallel

from diversity import REGULARIZERS, DiversityObjective, MixedTarget, TappedViT
from utils import joined_world

BATCH, STEPS, PATCHES, HEADS, WIDTH, MATRICES = 8, 3, 16, 3, 24, 6


def main(output: str):
    with joined_world("cpu", "env://") as world:
        torch.manual_seed(0)
        size = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": WIDTH, "num_heads": HEADS, "num_classes": 5}
        model = timm.create_model("deit_tiny_patch16_224", **size).double()
        coefs = {"mixing": 1.0} | dict.fromkeys(REGULARIZERS, 0.01) | {"emb_vcreg": 0.0}
        objective = DiversityObjective(coefs, smoothing=0.1)
        tapped = TappedViT(model, objective.reads, objective.patch_logits)
        wrapped = DistributedDataParallel(tapped) if world.size > 1 else tapped
        # Not Adam, which forgives gradients of a wrong scale and magnifies the rounding of those that are zero.
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        generator = torch.Generator().manual_seed(1)

        def draw(*shape):
            return torch.rand(*shape, generator=generator, dtype=torch.float64)

        mine = slice(world.rank * BATCH // world.size, (world.rank + 1) * BATCH // world.size)
        for _ in range(STEPS):
            samples = torch.randn(BATCH, 3, 32, 32, generator=generator, dtype=torch.float64)
            labels = torch.randint(5, (2, BATCH), generator=generator)
            lam = draw(BATCH, 1 + PATCHES)
            probes = {
                "emb_cond_orth": draw(2, BATCH, PATCHES, 1)[:, mine],
                "attn_cond_orth": draw(2, BATCH, HEADS, 1)[:, mine],
                "weight_mha_cond_orth": draw(2, MATRICES, WIDTH, 1),
                "weight_mha_cond_orth_in": draw(2, MATRICES, WIDTH, 1),
            }
            target = MixedTarget(labels[0, mine], labels[1, mine], lam[mine, 0], lam[mine, 1:])
            loss, _ = objective(wrapped(samples[mine]), target, probes=probes)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if world.is_main:
            torch.save(model.state_dict(), output)


if __name__ == "__main__":
    main(sys.argv[1])
