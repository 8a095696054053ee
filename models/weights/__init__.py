"""Weights of files: read without running code from the file, loaded into timm models; errors are one line."""

from models.weights.files import Origin, local_file, origin, read, refusal
from models.weights.loading import is_weights, load_state_dict, load_weights

__all__ = ["Origin", "is_weights", "load_state_dict", "load_weights", "local_file", "origin", "read", "refusal"]
