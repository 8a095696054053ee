"""Other papers' changes of the architecture against redundancy, as removable hooks on stock timm models.

Importing the package enters every remedy into `REMEDIES`.
"""

# In the order of REMEDIES, in which several remedies change a tensor.
from . import attention  # isort: skip
from . import heads  # isort: skip
from . import tokens  # isort: skip
from .applied import Remedies, RemedyHandle, apply_remedy
from .registry import REMEDIES, Remedy, RemedyError, remedies_table

__all__ = [
    "REMEDIES",
    "Remedies",
    "Remedy",
    "RemedyError",
    "RemedyHandle",
    "apply_remedy",
    "attention",
    "heads",
    "remedies_table",
    "tokens",
]
