"""A plain loop over a timm model, with timm's optimizer, schedule and average of the weights. It needs no extra."""

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3, random_seed
from torch.utils.data import DataLoader, TensorDataset

from diversity import DiverseLoss, PatchMixup

CLASSES, EPOCHS, BATCH, LR = 4, 5, 32, 3e-3
SIZE = {"img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 48, "num_heads": 3}
COEFS = {"mixing": 1.0, "emb_cos_within": 0.5, "emb_contrast_cross": 0.5, "weight_mha_cond_orth": 5e-4}


def main(epochs=EPOCHS):
    """Train, and return the model and the average of its weights."""
    random_seed(0)  # of torch, numpy (mixup) and Python
    labels = torch.randint(CLASSES, (256,))  # made images: noise, with a pattern for each class
    images = torch.randn(256, 3, 32, 32) + torch.randn(CLASSES, 3, 32, 32)[labels]
    loader = DataLoader(TensorDataset(images, labels), batch_size=BATCH, shuffle=True)

    model = timm.create_model("deit_tiny_patch16_224", num_classes=CLASSES, **SIZE)
    ema = ModelEmaV3(model, decay=0.9)  # a copy of the model, made before DiverseLoss hooks it
    loss_fn = DiverseLoss(model, COEFS, mixup=PatchMixup(mixup_alpha=0.8, cutmix_alpha=1.0), smoothing=0.1)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=LR)
    schedule = CosineLRScheduler(optimizer, t_initial=epochs)
    for epoch in range(epochs):
        loss_fn.train()
        for batch, targets in loader:
            loss, terms = loss_fn(batch, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema.update(model)
        schedule.step(epoch + 1)
        accuracy = (loss_fn.eval()(images).argmax(1) == labels).float().mean()
        print(f"epoch {epoch}: accuracy {accuracy:.3f}", *(f"{name} {value:.4f}" for name, value in terms.items()))
    return model, ema.module  # stock timm models: save their state_dict


if __name__ == "__main__":
    main()
