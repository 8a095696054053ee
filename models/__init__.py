"""Building timm models from the command line. Importing this package registers the paper's models with timm."""

from collections.abc import Collection, Mapping

import timm
import timm.data
from torch import nn

from diversity.spelling import did_you_mean
from models.remedies import apply_remedies
from models.weights import refusal
from models.weights.descriptions import PREPROCESSING_FLAGS
from utils import is_bug

from . import diverse_deit

__all__ = ["build_model", "diverse_deit", "published_preprocessing", "published_size"]


def build_model(
    name: str,
    num_classes: int,
    input_size: int = 224,
    patch_size: int | None = None,
    drop: float = 0.0,
    drop_path: float = 0.0,
    remedies: Collection[str] = (),
    remedy_kwargs: Mapping[str, object] | None = None,
    **model_kwargs,
) -> nn.Module:
    """A timm model with initial weights.

    Args:
        name: any timm model, or one of the paper's.
        num_classes: size of the classifier.
        input_size: side of the square input in pixels; models without a fixed size take any.
        patch_size: side of a patch in pixels; None = the model's own.
        drop, drop_path: rates of dropout and stochastic depth; 0 = off.
        remedies: names in `diversity.REMEDIES`, applied in the order of that registry.
        remedy_kwargs: settings of these remedies that are not at their defaults.
        model_kwargs: further arguments of the timm model, such as depth or embed_dim.

    Raises:
        ValueError: an unknown name, arguments the model does not take, a size its patches do not divide, or remedies
            that do not serve the model.
    """
    if not timm.is_model(name):
        hint = did_you_mean(name, timm.list_models(), "; timm.list_models() lists them")
        raise ValueError(f"{name} is unknown{hint}")
    optional = {"patch_size": patch_size, "drop_path_rate": drop_path or None}
    model_kwargs = {key: value for key, value in optional.items() if value is not None} | model_kwargs
    model_kwargs |= {"num_classes": num_classes, "drop_rate": drop}
    try:
        try:
            model = timm.create_model(name, img_size=input_size, **model_kwargs)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            model = timm.create_model(name, **model_kwargs)  # a model of free input size
    except Exception as error:  # what a model makes of arguments it did not expect
        is_unknown_argument = isinstance(error, TypeError) and any(f"'{key}'" in str(error) for key in model_kwargs)
        if is_bug(error) and not is_unknown_argument:
            raise
        refused = refusal(error)  # by a file that model_kwargs name
        reason = f"its file {refused}" if refused else " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name} cannot be built with {model_kwargs}: {reason}") from None
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", (1, 1))
    if input_size % patch[0] or input_size % patch[1]:
        line = f"{name} has patches of {patch[0]} pixels, which do not divide --input-size {input_size}"
        raise ValueError(f"{line}; change one of them (--patch-size)")
    try:
        apply_remedies(model, remedies, remedy_kwargs or {})
    except ValueError as error:
        raise ValueError(f"{name} with {error}") from error
    return model


def published_preprocessing(name: str) -> dict[str, object]:
    """How images are preprocessed for timm's published weights of a model, {flag: value}; {} if there are none."""
    published = _published(name)
    if published is None:
        return {}
    config = timm.data.resolve_data_config(pretrained_cfg=published.to_dict())
    values = {flag: config[name] for name, flag in PREPROCESSING_FLAGS.items()}
    return values | {name: [*map(float, values[name])] for name in ("mean", "std")}


def published_size(name: str) -> int:
    """The side of the square input in pixels of timm's published weights of a model; 224 if there are none."""
    published = _published(name)
    return published.input_size[-1] if published else 224


def _published(name: str):
    """timm's configuration of the published weights of a model; None if there are none."""
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError:  # an unknown tag, which `build_model` reports
        return None
