"""examples/hf_trainer.py as one of the ranks of a process group: a folder, and the images of a batch on each rank.

Run by tests/examples/test_hf_trainer.py. Each rank prints JSON: the number of processes and the weights afterwards.
"""

import json
import sys

import accelerate
import torch
import transformers
from example_programs import EXACT_COEFS, load_example, weights

if __name__ == "__main__":
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # of the process that forked this one
    example = load_example("hf_trainer")
    transformers.set_seed(0)
    labels = torch.randint(example.CLASSES, (64,))
    images = torch.randn(64, 3, 32, 32) + torch.randn(example.CLASSES, 3, 32, 32)[labels]
    data = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]
    config = transformers.ViTConfig(**example.SIZE, intermediate_size=192, num_labels=example.CLASSES)
    model = transformers.ViTForImageClassification(config)
    options = {"per_device_train_batch_size": int(sys.argv[2]), "learning_rate": 1e-2, "optim": "sgd", "use_cpu": True}
    options |= {"num_train_epochs": 1, "disable_tqdm": True, "save_strategy": "no", "report_to": "none"}
    args = transformers.TrainingArguments(sys.argv[1], train_sampling_strategy="sequential", **options)
    example.DiverseTrainer(model, args, EXACT_COEFS, train_dataset=data).train()
    print(json.dumps({"processes": args.world_size, "weights": weights(model).double().tolist()}), flush=True)
