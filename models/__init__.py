"""timm registry entries of the paper's models. Importing this package registers them."""

from . import diverse_deit

__all__ = ["diverse_deit"]
