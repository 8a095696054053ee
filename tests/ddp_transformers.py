"""Three steps of a model of transformers on this rank's images of each batch, beside the same steps on all of them.

Run by tests/diversity/test_transformers_training.py with two ranks: around DiverseLoss ("loss_fn") or around the model,
which DiverseLoss then calls ("model"). Rank 0 prints JSON: the largest differences of losses and weights.
"""

import sys

import torch
import transformers
from ddp_comparison import compare_with_one_process
from torch.nn.parallel import DistributedDataParallel
from transformers_pairs import CLASSES, SIZE, make_pair

from diversity import DiverseLoss

BATCH, STEPS = 8, 3
COEFS = {"mixing": 1.0, "emb_cos_within": 0.5, "emb_contrast_cross": 0.5, "attn_cos_within": 0.1, "weight_mha_so": 0.1}


def train(rank: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses of the steps and the weights after them."""
    model = make_pair("vit", transformers)[0].train()
    loss_fn = DiverseLoss(model, COEFS, smoothing=0.1)
    wrapped, call = loss_fn, None
    if size > 1 and sys.argv[1] == "loss_fn":
        wrapped = DistributedDataParallel(loss_fn)
    elif size > 1:
        call = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(STEPS):
        images = torch.randn(BATCH, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
        labels = torch.randint(CLASSES, (BATCH,), generator=generator)
        loss, terms = wrapped(images.chunk(size)[rank], labels.chunk(size)[rank], call=call)
        loss.backward()
        losses.append(terms["loss"])
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(losses), torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


if __name__ == "__main__":
    compare_with_one_process(train)
