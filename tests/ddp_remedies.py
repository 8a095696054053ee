"""Three steps of a model with every remedy but reattention on this rank's images, beside the same steps on all images.

Run by tests/diversity/test_remedies_training.py as two ranks. Rank 0 prints JSON: the largest differences of losses and
weights. Reattention is left out, since its batch normalisation sees the images of one process.
"""

import torch
from ddp_comparison import compare_with_one_process
from families import build
from remedied import of_family, with_remedies
from torch.nn.parallel import DistributedDataParallel

from diversity import DiverseLoss

BATCH, STEPS = 4, 3
# Without terms that draw start vectors, and without mixup, which pairs the images of one process.
COEFS = {"mixing": 1.0, "emb_cos_within": 0.5, "attn_cos_within": 0.1}


def train(rank: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses of the steps and the weights after them."""
    model = with_remedies(build("deit3", depth=2), of_family("deit3", without=["reattention"]))
    loss_fn = DiverseLoss(model, COEFS, smoothing=0.1)
    wrapped = DistributedDataParallel(loss_fn) if size > 1 else loss_fn
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(STEPS):
        images = torch.randn(BATCH, 3, 32, 32, generator=generator, dtype=torch.float64)
        labels = torch.randint(5, (BATCH,), generator=generator)
        loss, _ = wrapped(images.chunk(size)[rank], labels.chunk(size)[rank])
        loss.backward()
        losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(losses), torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


if __name__ == "__main__":
    compare_with_one_process(train)
