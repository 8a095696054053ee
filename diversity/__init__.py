"""Losses that make a vision transformer less redundant, for any training loop over a timm model.

From "The Principle of Diversity" (Chen et al., CVPR 2022): regularizers on patch embeddings, attention maps and
weights, and label mixing per patch. Importing the package enters every term into `REGULARIZERS`.
"""

# The paper's terms in the order of their levels, then those of other papers: the order of REGULARIZERS.
from . import embedding  # isort: skip
from . import attention  # isort: skip
from . import weight  # isort: skip
from . import spread  # isort: skip
from . import channels  # isort: skip
from . import circuit_terms  # isort: skip
from .backbones import WEIGHT_GROUPS, TapError
from .classification import MIXING_BALANCES, MIXING_WHERE
from .cross_entropy import token_cross_entropy
from .function_level import FUNCTION_MEASURES, measure_function
from .loss import DiverseLoss
from .measures import MEASURES, Measure
from .mixing import MixedTarget, PatchMixup, patch_lam
from .objective import DiversityObjective
from .presets import PRESETS, Preset
from .redundancy import measurable, measure_redundancy
from .regularizers import ALIASES, LEVELS, REGULARIZERS, Regularizer, markdown_table, regularizer, resolve_aliases
from .remedies import REMEDIES, Remedy, RemedyError, apply_remedy, remedies_table
from .tapped_vit import TappedViT
from .taps import TAPS, Tap, TapOutput

__all__ = [
    "ALIASES",
    "FUNCTION_MEASURES",
    "LEVELS",
    "MEASURES",
    "MIXING_BALANCES",
    "MIXING_WHERE",
    "PRESETS",
    "REGULARIZERS",
    "REMEDIES",
    "TAPS",
    "WEIGHT_GROUPS",
    "DiverseLoss",
    "DiversityObjective",
    "Measure",
    "MixedTarget",
    "PatchMixup",
    "Preset",
    "Regularizer",
    "Remedy",
    "RemedyError",
    "Tap",
    "TapError",
    "TapOutput",
    "TappedViT",
    "apply_remedy",
    "attention",
    "channels",
    "circuit_terms",
    "embedding",
    "markdown_table",
    "measurable",
    "measure_function",
    "measure_redundancy",
    "patch_lam",
    "regularizer",
    "remedies_table",
    "resolve_aliases",
    "spread",
    "token_cross_entropy",
    "weight",
]
