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


def make_corruptions(root: Path, model, corruptions, severities="12345") -> dict[str, list[Path]]:
    """ImageNet-C with two classes, which the model predicts most often, and an image of each; {part: paths}."""
    parts = {f"{name}/{severity}": [] for name in corruptions for severity in severities}
    for seed, part in enumerate(parts):
        for number in range(2):
            write_image(root / part / "all" / f"{number}.JPEG", 2 * seed + number)
    paths = sorted(root.glob("*/*/all/*"))
    guesses = dict(zip(paths, logits_of(model, paths, crop=False).argmax(1).tolist(), strict=True))
    classes = [SYNSETS[guess] for guess, _ in collections.Counter(guesses.values()).most_common(2)]
    for path in paths:
        synset = classes[int(path.stem)]
        target = path.parents[1] / synset / path.name
        target.parent.mkdir()
        parts["/".join(path.parts[-4:-2])].append(path.rename(target))
    for folder in root.glob("*/*/all"):
        folder.rmdir()
    return parts


def measures(logits, labels) -> tuple[float, float, float]:
    """Top-1 and top-5 accuracy in percent and the mean cross-entropy in nats, image by image."""
    hits, hits5, losses = [], [], []
    for values, label in zip(logits.tolist(), labels, strict=True):
        order = sorted(range(len(values)), key=lambda index: -values[index])
        hits.append(order[0] == label)
        hits5.append(label in order[:5])
        losses.append(math.log(sum(math.exp(value - values[label]) for value in values)))
    return 100 * sum(hits) / len(hits), 100 * sum(hits5) / len(hits), sum(losses) / len(losses)
