"""A loop with Accelerate: several processes, accumulation, mixed precision; `accelerate launch` starts it too."""

import timm
import torch
from torch.utils.data import DataLoader, TensorDataset

from diversity import DiverseLoss, PatchMixup

try:
    from accelerate import Accelerator
    from accelerate.utils import set_seed
except ImportError:
    raise SystemExit("examples/accelerate_loop.py needs Accelerate: pip install '.[hf]'") from None

CLASSES, EPOCHS, BATCH, LR, ACCUMULATED = 4, 3, 16, 2e-3, 2
SIZE = {"img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 48, "num_heads": 3}
COEFS = {"mixing": 1.0, "emb_cos_within": 0.5, "emb_contrast_cross": 0.5, "weight_mha_cond_orth": 5e-4}


def main(epochs=EPOCHS, batch=BATCH, coefs=COEFS, mixup=True, **options):
    """Train, and return the stock model."""
    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATED, **options)
    set_seed(0)
    labels = torch.randint(CLASSES, (256,))  # made images: noise, with a pattern for each class
    images = torch.randn(256, 3, 32, 32) + torch.randn(CLASSES, 3, 32, 32)[labels]
    loader = DataLoader(TensorDataset(images, labels), batch_size=batch)

    model = timm.create_model("deit_tiny_patch16_224", num_classes=CLASSES, **SIZE)
    loss_fn = DiverseLoss(model, coefs, mixup=PatchMixup() if mixup else None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    loss_fn, optimizer, loader = accelerator.prepare(loss_fn, optimizer, loader)  # loss_fn, and not the model
    for epoch in range(epochs):
        for samples, targets in loader:
            with accelerator.accumulate(loss_fn):
                loss, terms = loss_fn(samples, targets)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        accelerator.print(f"epoch {epoch}:", *(f"{name} {value:.4f}" for name, value in terms.items()))
    return accelerator.unwrap_model(loss_fn).model  # the stock timm model: save its state_dict


if __name__ == "__main__":
    main()
