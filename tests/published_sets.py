"""Small folders in the layouts of published evaluation sets, and their evaluation by a loop over the files."""

import collections
import math
import pkgutil
from pathlib import Path

import numpy as np
import timm
import torch
from helpers import photo
from PIL import Image

SIDE = 48
"""Input size; above 32 px, so images are cropped."""

MODEL = (
    *("--model", "vit_tiny_patch16_224", "--input-size", SIDE, "--patch-size", 16, "--device", "cpu"),
    *("--model-kwargs", "depth=1", "embed_dim=24", "num_heads=3", "--num-workers", 0, "--batch-size", 2),
)
SYNSETS = pkgutil.get_data("timm.data", "_info/imagenet_synsets.txt").decode().split()
SYNSETS_R = pkgutil.get_data("timm.data", "_info/imagenet_r_synsets.txt").decode().split()
OUTPUTS_R = [int(number) for number in pkgutil.get_data("timm.data", "_info/imagenet_r_indices.txt").decode().split()]


def vit(seed=0, num_classes=1000):
    """A ViT of timm whose predictions differ from image to image."""
    torch.manual_seed(seed)
    shape = {"depth": 1, "embed_dim": 24, "num_heads": 3, "patch_size": 16, "img_size": SIDE}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=num_classes, **shape).eval()
    for weight in (model.patch_embed.proj.weight, model.head.weight):
        torch.nn.init.normal_(weight, std=0.5)
    return model


def write_image(path: Path, seed: int):
    path.parent.mkdir(parents=True, exist_ok=True)
    photo(seed, 60).crop((0, 0, 60, 50 + seed % 3)).save(path, "PNG")


@torch.no_grad()
def logits_of(model, paths, crop=True) -> torch.Tensor:
    """Logits [n, C] of image files, read and preprocessed by PIL and numpy: DeiT's resize by 1 / 0.875, and crop."""
    logits = []
    for path in paths:
        image = Image.open(path).convert("RGB")
        side = math.floor(SIDE / 0.875) if crop else SIDE
        short = min(image.size)
        image = image.resize([int(side * length / short) for length in image.size], Image.Resampling.BICUBIC)
        left, top = (round((length - SIDE) / 2) for length in image.size)
        pixels = np.asarray(image.crop((left, top, left + SIDE, top + SIDE)), dtype=np.float32) / 255
        pixels = (pixels - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
        logits.append(model(torch.tensor(pixels.transpose(2, 0, 1), dtype=torch.float32)[None])[0])
    return torch.stack(logits)


def make_set(root: Path, model, folder_of, outputs=None, count=12) -> Path:
    """A set of `count` images in which the model is right for about half: they are in folders by its predictions.

    Args:
        folder_of: number of a class -> name of its folder.
        outputs: of the model, which the classes number; None = all.
    """
    paths = [root / "all" / f"{number:03}.JPEG" for number in range(count)]
    for number, path in enumerate(paths):
        write_image(path, number)
    logits = logits_of(model, paths)[:, outputs or slice(None)]
    for number, (path, guess) in enumerate(zip(paths, logits.argmax(1).tolist(), strict=True)):
        label = guess if number % 2 else (guess + 1) % logits.shape[1]
        folder = root / "set" / folder_of(label)
        folder.mkdir(parents=True, exist_ok=True)
        path.rename(folder / path.name)
    return root / "set"


def make_corruptions(root: Path, model, corruptions, severities="12345") -> dict[str, Path]:
    """ImageNet-C with an image of one class, which the model predicts most often; returns {part: its image}."""
    parts = {f"{name}/{severity}": root / name / severity for name in corruptions for severity in severities}
    for seed, folder in enumerate(parts.values()):
        write_image(folder / "a.JPEG", seed)
    guesses = logits_of(model, [folder / "a.JPEG" for folder in parts.values()], crop=False).argmax(1).tolist()
    synset = SYNSETS[collections.Counter(guesses).most_common(1)[0][0]]
    for folder in parts.values():
        (folder / synset).mkdir()
        (folder / "a.JPEG").rename(folder / synset / "a.JPEG")
    return {part: folder / synset / "a.JPEG" for part, folder in parts.items()}


def measures(logits, labels) -> tuple[float, float, float]:
    """Top-1 and top-5 accuracy in percent and the mean cross-entropy in nats, image by image."""
    hits, hits5, losses = [], [], []
    for values, label in zip(logits.tolist(), labels, strict=True):
        order = sorted(range(len(values)), key=lambda index: -values[index])
        hits.append(order[0] == label)
        hits5.append(label in order[:5])
        losses.append(math.log(sum(math.exp(value - values[label]) for value in values)))
    return 100 * sum(hits) / len(hits), 100 * sum(hits5) / len(hits), sum(losses) / len(losses)
