"""A LightningModule around DiverseLoss; the Trainer calls backward and the optimizer. Needs the extra [lightning]."""

import timm
import torch
from torch.utils.data import DataLoader, TensorDataset

from diversity import DiverseLoss, PatchMixup

try:
    import lightning
except ImportError:
    raise SystemExit("examples/lightning_loop.py needs Lightning: pip install '.[lightning]'") from None

CLASSES, EPOCHS, BATCH, LR = 4, 5, 32, 3e-3
SIZE = {"img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 48, "num_heads": 3}
COEFS = {"mixing": 1.0, "emb_cos_within": 0.5, "emb_contrast_cross": 0.5, "weight_mha_cond_orth": 5e-4}


class Classifier(lightning.LightningModule):
    def __init__(self, model, coefs=COEFS):
        super().__init__()
        self.loss_fn = DiverseLoss(model, coefs, mixup=PatchMixup(), smoothing=0.1)

    def training_step(self, batch, index):
        loss, terms = self.loss_fn(*batch)
        self.log_dict({f"train/{name}": value for name, value in terms.items()}, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, index):
        logits = self.loss_fn(batch[0])  # Lightning puts it into eval mode
        self.log("accuracy", (logits.argmax(1) == batch[1]).float().mean(), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.loss_fn.model.parameters(), lr=LR)


def main(epochs=EPOCHS, **options):
    """Train, and return the trainer and the stock model."""
    lightning.seed_everything(0, verbose=False)
    labels = torch.randint(CLASSES, (256,))  # made images: noise, with a pattern for each class
    images = torch.randn(256, 3, 32, 32) + torch.randn(CLASSES, 3, 32, 32)[labels]
    loader = DataLoader(TensorDataset(images, labels), batch_size=BATCH)
    module = Classifier(timm.create_model("deit_tiny_patch16_224", num_classes=CLASSES, **SIZE))
    trainer = lightning.Trainer(max_epochs=epochs, logger=False, enable_checkpointing=False, **options)
    trainer.fit(module, loader, loader)
    print(", ".join(f"{name} {value:.4f}" for name, value in trainer.callback_metrics.items()))
    return trainer, module.loss_fn.model  # the stock timm model: save its state_dict


if __name__ == "__main__":
    main()
