"""Training steps of a small model in the test's own process, without flags and files."""

import timm
import torch
from helpers import train_epoch

from diversity import DiverseLoss, PatchMixup
from pipeline.batch_augmentation import BatchAugmentation
from training import checkpoint
from utils import World

CPU = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
ALL_TERMS = {"mixing": 1, "emb_cos_within": 0.5, "emb_contrast_cross": 0.5, "attn_cos_within": 0.1}
NO_MIX = PatchMixup(0, 0, grid=(4, 4))


def small_vit(**kwargs):
    torch.manual_seed(0)
    size = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 3, "num_classes": 5}
    return timm.create_model("deit_tiny_patch16_224", **size | kwargs)


def images(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 32, 32, generator=generator), torch.randint(5, (count,), generator=generator)


def make_state(model, optimizer=None, ema=None, loss_scaler=None):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    loss_scaler = loss_scaler or torch.amp.GradScaler("cpu", enabled=False)
    return checkpoint.TrainState(model, ema, optimizer, None, loss_scaler)


def train(model, batches, coefs=ALL_TERMS, state=None, budget=0, mixup_fn=NO_MIX, smoothing=0.1, world=CPU, **options):
    training_loss = DiverseLoss(model, coefs, BatchAugmentation(mixup_fn), smoothing).to(world.device)
    with training_loss.tapped:
        return train_epoch(training_loss, batches, state or make_state(model), world=world, budget=budget, **options)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])
