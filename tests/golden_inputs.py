"""Inputs of the golden values in tests/golden, rebuilt from their recipes."""

import json
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parent / "golden"


def load(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


def draw(recipe):
    """One float64 tensor from {"kind", "seed", "shape", "std", "mean"}."""
    generator = np.random.RandomState(recipe["seed"])
    if recipe["kind"] == "uniform":
        return torch.from_numpy(generator.random_sample(recipe["shape"]))
    normal = torch.from_numpy(generator.standard_normal(recipe["shape"]))
    if recipe["kind"] == "attention":
        return normal.softmax(dim=-1)
    return normal * recipe.get("std", 1.0) + recipe.get("mean", 0.0)


def normals(seed, *shape):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape))
