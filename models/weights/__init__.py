"""Weights of files: read without running code from the file, renamed to timm's names, loaded; errors are one line."""

# isort: off
from models.weights import clip_names, pretraining_names, torchvision_names  # enter their layouts
from models.weights import transformers_layouts, transformers_dinov2

# isort: on
from models.weights.descriptions import describe
from models.weights.files import Origin, local_file, origin, read, refusal
from models.weights.layouts import LAYOUTS, Layout, is_weights, layouts_table
from models.weights.loading import classifier_names, load_state_dict, load_weights, with_timm_names

__all__ = [
    "LAYOUTS",
    "Layout",
    "Origin",
    "classifier_names",
    "clip_names",
    "describe",
    "is_weights",
    "layouts_table",
    "load_state_dict",
    "load_weights",
    "local_file",
    "origin",
    "pretraining_names",
    "read",
    "refusal",
    "torchvision_names",
    "transformers_dinov2",
    "transformers_layouts",
    "with_timm_names",
]
