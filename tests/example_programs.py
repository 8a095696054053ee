"""Loading a program of examples/ as a module."""

import importlib.util
from types import ModuleType

import torch
from helpers import REPOSITORY

EXACT_COEFS = {"mixing": 1.0, "emb_cos_within": 0.5, "attn_cos_within": 0.1, "weight_mha_so": 0.1}
"""Terms that draw no random start vectors, so that they do not depend on the number of processes."""


def load_example(name: str) -> ModuleType:
    """The module examples/NAME.py, without running its `main`."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", REPOSITORY / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def weights(model: torch.nn.Module) -> torch.Tensor:
    """All weights of a model as one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
