"""Steps of a model with a frozen part on this rank's images of each batch, beside the same steps on all of them.

Run by tests/training/test_finetuning.py under torchrun. Rank 0 prints JSON: the largest differences.
"""

import timm
import torch
from ddp_comparison import compare_with_one_process
from helpers import parse, world

from diversity import DiverseLoss
from models.freezing import FREEZE, freeze, frozen_modules
from training.build import build_optimizer, compile_and_wrap

BATCH, STEPS = 8, 3
SIZE = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 3, "num_classes": 5}
COEFS = {"backbone": {"mixing": 1.0}, "patch-embed": {"mixing": 1.0, "emb_contrast_cross": 0.5}}


def train(rank: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses of the steps and the weights after them, for each part that can be frozen."""
    results = [train_with(what, rank, size) for what in FREEZE if what != "none"]
    return tuple(torch.cat(each) for each in zip(*results, strict=True))


def train_with(what: str, rank: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224", drop_path_rate=0.5 * (what == "backbone"), **SIZE).double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    freeze(model, what)
    loss_fn = DiverseLoss(model, COEFS[what], smoothing=0.1, frozen=frozen_modules(model, what)).train()
    args = parse("--opt", "momentum", "--layer-decay", 0.7)
    wrapped = compile_and_wrap(args, world(rank, size), loss_fn)
    optimizer = build_optimizer(args, model, lr=0.1)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(STEPS):
        images = torch.randn(BATCH, 3, 32, 32, generator=generator, dtype=torch.float64)
        labels = torch.randint(5, (BATCH,), generator=generator)
        loss, _ = wrapped.train()(images.chunk(size)[rank], labels.chunk(size)[rank])
        loss.backward()
        losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert frozen and changed and not frozen & changed
    return torch.stack(losses), torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


if __name__ == "__main__":
    compare_with_one_process(train)
