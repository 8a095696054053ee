"""Three steps with a DiverseLoss on this rank's images of each batch, beside the same steps on all of them.

Run by tests/diversity/test_loss.py under torchrun. Rank 0 prints JSON: the largest differences of losses and weights.
"""

import timm
import torch
from ddp_comparison import compare_with_one_process
from torch.nn.parallel import DistributedDataParallel

from diversity import DiverseLoss

BATCH, STEPS, ACCUMULATED = 8, 3, 2
# Without weight_mha_cond_orth, which draws start vectors, and without mixup, which pairs the images of one process.
COEFS = {"mixing": 1.0, "emb_cos_within": 0.5, "emb_contrast_cross": 0.5, "attn_cos_within": 0.1, "weight_mha_so": 0.1}
SIZE = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 3, "num_classes": 5}


def train(rank: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses of the steps and the weights after them."""
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224", **SIZE).double()
    loss_fn = DiverseLoss(model, COEFS, smoothing=0.1, diversity_warmup=4)
    loss_fn.set_epoch(3)
    wrapped = DistributedDataParallel(loss_fn) if size > 1 else loss_fn
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for index in range(ACCUMULATED * STEPS):
        images = torch.randn(BATCH, 3, 32, 32, generator=generator, dtype=torch.float64)
        labels = torch.randint(5, (BATCH,), generator=generator)
        if size > 1 and rank == 0:  # which changes nothing, though the other rank does not take part
            loss_fn.gradient_norms(images[:2], labels[:2])
        loss, terms = wrapped(images.chunk(size)[rank], labels.chunk(size)[rank])
        assert [*terms] == [*loss_fn.names]
        (loss / ACCUMULATED).backward()
        losses.append(terms["loss"])
        if index % ACCUMULATED == ACCUMULATED - 1:
            optimizer.step()
            optimizer.zero_grad()
    return torch.stack(losses), torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


if __name__ == "__main__":
    compare_with_one_process(train)
