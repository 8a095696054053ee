"""Weights of files: read without running code from the file, renamed to timm's names, loaded; errors are one line."""

from models.weights import transformers_layouts  # enters its layouts
from models.weights.files import Origin, local_file, origin, read, refusal
from models.weights.layouts import LAYOUTS, Layout, is_weights
from models.weights.loading import classifier_names, load_state_dict, load_weights

__all__ = [
    "LAYOUTS",
    "Layout",
    "Origin",
    "classifier_names",
    "is_weights",
    "load_state_dict",
    "load_weights",
    "local_file",
    "origin",
    "read",
    "refusal",
    "transformers_layouts",
]
