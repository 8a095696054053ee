"""Weights out: formats of exported weights, each one entry of `FORMATS`, with a model card.

Importing the package enters every format.
"""

from . import timm_folder  # isort: skip
from . import transformers_folder  # isort: skip
from . import onnx_file  # isort: skip
from .registry import FORMATS, Format, Written, formats_table
from .trained import Trained, find_trained
from .writing import export

__all__ = [
    "FORMATS",
    "Format",
    "Trained",
    "Written",
    "export",
    "find_trained",
    "formats_table",
    "onnx_file",
    "timm_folder",
    "transformers_folder",
]
