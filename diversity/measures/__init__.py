"""The measures of redundancy: `MEASURES` has one entry for each; the other modules enter them."""

# In the order of their levels, which is the order of MEASURES.
from . import embedding  # isort: skip
from . import attention  # isort: skip
from . import mlp  # isort: skip
from . import weight  # isort: skip
from .registry import MEASURES, Measure, chosen, measure, measures_of, measures_table, summary_measures

__all__ = [
    "MEASURES",
    "Measure",
    "attention",
    "chosen",
    "embedding",
    "measure",
    "measures_of",
    "measures_table",
    "mlp",
    "summary_measures",
    "weight",
]
