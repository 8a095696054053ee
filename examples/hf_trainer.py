"""Hugging Face's Trainer: its checkpoints are those of the stock model, which from_pretrained loads."""

import torch

from diversity import DiverseLoss, PatchMixup

try:
    import accelerate  # noqa: F401 which Trainer needs
    from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed
except ImportError:
    raise SystemExit("examples/hf_trainer.py needs transformers and Accelerate: pip install '.[hf]'") from None

CLASSES, EPOCHS, BATCH, LR, OUTPUT = 4, 5, 32, 3e-3, "hf_trainer_output"
SIZE = {"image_size": 32, "patch_size": 8, "num_hidden_layers": 3, "num_attention_heads": 3, "hidden_size": 48}
COEFS = {"mixing": 1.0, "emb_cos_within": 0.5, "emb_contrast_cross": 0.5, "weight_mha_cond_orth": 5e-4}


class DiverseTrainer(Trainer):
    def __init__(self, model, args, coefs, mixup=None, **options):
        super().__init__(model, args, **options)
        self.loss_fn = DiverseLoss(model, coefs, mixup=mixup, smoothing=args.label_smoothing_factor)
        self.sums, self.steps = {}, 0
        self.model_accepts_loss_kwargs = False  # a mean over the batch: with accumulation, Trainer divides it

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:  # evaluation: the loss and the logits of the model itself
            return super().compute_loss(model, inputs, return_outputs)
        loss, terms = self.loss_fn(inputs["pixel_values"], inputs["labels"], call=model)  # as Trainer wrapped it
        self.sums, self.steps = {name: self.sums.get(name, 0) + terms[name] for name in terms}, self.steps + 1
        return loss

    def log(self, logs, *args):
        if "loss" in logs:  # of training: add the means of the terms since the last time
            logs |= {f"term/{name}": (value / self.steps).item() for name, value in self.sums.items()}
            self.sums, self.steps = {}, 0
        super().log(logs, *args)

    def _load_from_checkpoint(self, folder, model=None):  # Trainer's own takes the names in its files as they are
        self.model.load_state_dict(type(self.model).from_pretrained(folder).state_dict())

    def _load_best_model(self):
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def main(output=OUTPUT, epochs=EPOCHS):
    """Train, save the stock model, and return the trainer."""
    set_seed(0)
    labels = torch.randint(CLASSES, (256,))  # made images: noise, with a pattern for each class
    images = torch.randn(256, 3, 32, 32) + torch.randn(CLASSES, 3, 32, 32)[labels]
    data = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]
    model = ViTForImageClassification(ViTConfig(**SIZE, intermediate_size=192, num_labels=CLASSES))
    often = {"logging_strategy": "epoch", "eval_strategy": "epoch", "report_to": "none"}
    args = TrainingArguments(
        output, num_train_epochs=epochs, per_device_train_batch_size=BATCH, learning_rate=LR, **often
    )
    trainer = DiverseTrainer(model, args, COEFS, PatchMixup(), train_dataset=data, eval_dataset=data)
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
