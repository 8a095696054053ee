"""Loading the weights of a file into a timm model."""

from collections.abc import Sequence

import torch
from torch import nn

from models.remedies import compare_with_file
from models.weights.configs import compare_with_config
from models.weights.descriptions import describe
from models.weights.files import class_names, local_file, read
from models.weights.fitting import fit
from models.weights.layouts import unknown_names
from models.weights.names import Tensors
from models.weights.numpy_archives import convert_archive
from models.weights.structure import classifiers
from models.weights.unwrapping import unwrap

HALF = (torch.float16, torch.bfloat16)


def load_weights(
    model: nn.Module,
    path: str,
    new_head: bool = True,
    use_ema: bool = False,
    classes: Sequence[str] = (),
    checkpoint_key: str = "",
) -> list[str]:
    """Load weights in any layout of `LAYOUTS`, under any key and behind any prefix, into a model.

    Position embeddings and patch embeddings of another size are resampled by timm, in float32.

    Args:
        model: a timm model.
        path: .pth or .safetensors file, or an https URL.
        new_head: keep the model's initial classifier if the file has one of another size or none, and leave out the
            file's if the model has none.
        use_ema: load the averaged weights.
        classes: names of the model's classes. If the file knows those of its classifier, it is loaded by their names,
            and dropped if they are others and `new_head` is true.
        checkpoint_key: which weights of a file that has several, such as teacher or student.

    Returns:
        One line for each key or prefix that was removed, and for each tensor or group of tensors that was left out,
        dropped, resampled or not found.

    Raises:
        ValueError: the file is missing or damaged, its layout is unknown, or its weights do not fit the model.
    """
    path = local_file(path)
    stored, weights, notes = with_timm_names(model, path, use_ema, checkpoint_key)
    unconverted, described = weights, describe(path)
    try:
        flags = stored.get("args") or described.training()
        of_remedies, initial = compare_with_file(model, flags, weights)
        weights, fitted = fit(model, weights, new_head)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None
    if not model.state_dict().keys() & weights.keys():
        raise ValueError(f"{path} does not fit {type(model).__name__}: {unknown_names(unconverted)}")
    of_file = class_names(stored) or described.classes
    of_classifier = _fit_classifier(model, weights, new_head, of_file, classes)
    notes += [*of_remedies, *of_classifier, *fitted]
    may_miss = [*(note.split()[0] for note in of_classifier), *(initial if new_head else ())]
    load_state_dict(model, weights, path, may_miss)
    return notes


def with_timm_names(model: nn.Module, path: str, use_ema: bool, key: str) -> tuple[object, Tensors, list[str]]:
    """The content of a file, its weights with timm's names and in float32, and one line for what was left out."""
    stored = read(path)
    if path.endswith(".npz"):
        if use_ema or key:
            raise ValueError(f"{path} contains no averaged or other weights: an .npz file has one model")
        return stored, *convert_archive(path, stored, model)
    layout, weights, notes = unwrap(stored, model, path, use_ema, key)
    weights = {name: tensor.float() if tensor.dtype in HALF else tensor for name, tensor in weights.items()}
    if layout:
        weights, of_layout = layout.to_timm(weights, model)
        notes = [*notes, *of_layout]
    return stored, weights, [*notes, *compare_with_config(model, path, layout)]


def _fit_classifier(
    model: nn.Module, weights: Tensors, new_head: bool, of_file: Sequence[str], classes: Sequence[str]
) -> list[str]:
    """Drop from `weights` the classifier that is not the model's, or sort its rows; one line for each tensor."""
    notes, own = [], model.state_dict()
    has_other_classes = new_head and bool(classes and of_file) and {*classes} != {*of_file}
    names = classifier_names(model)
    for name in names:
        if classes and of_file and [*classes] != of_file and {*classes} == {*of_file} and name in weights:
            weights[name] = weights[name][[of_file.index(label) for label in classes]]
            notes.append(f"{name} is in another order in the file and was loaded by the names of the classes")
        elif has_other_classes and name in weights:
            notes.append(f"{name} dropped: the file's classes are others, such as {of_file[0]!r}")
            del weights[name]
        elif new_head and _differs(name, weights, own):
            notes.append(f"{name} of shape {[*weights[name].shape]} dropped: the model needs {[*own[name].shape]}")
            del weights[name]
        elif new_head and name not in weights:
            notes.append(f"{name} is not in the file and keeps its initial values")
        elif new_head and classes and not of_file:
            notes.append(f"{name} is from the file, which does not name its classes")
    if new_head and not names:
        heads = model.pretrained_cfg.get("classifier") or ()
        heads = (heads,) if isinstance(heads, str) else heads
        for name in [f"{head}.{parameter}" for head in heads for parameter in ("weight", "bias")]:
            if weights.pop(name, None) is not None:
                notes.append(f"{name} dropped: the model has no classifier")
    return notes


def load_state_dict(model: nn.Module, weights: Tensors, path: str, may_miss: list[str] = ()):
    """Load weights into a model, with an error of one line that names the first tensor that does not fit.

    Args:
        may_miss: names of the model's tensors that `weights` need not contain.

    Raises:
        ValueError: a tensor is missing, unknown, of another shape or not finite.
    """
    own = model.state_dict()
    misfits = [
        f"{name} is {[*weights[name].shape]} in the file and {[*own[name].shape]} in the model"
        for name in own.keys() & weights.keys()
        if _differs(name, weights, own)
    ]
    misfits += [f"{name} is not in the file" for name in own.keys() - weights.keys() - set(may_miss)]
    misfits += [f"{name} is not in the model" for name in weights.keys() - own.keys()]
    if misfits:
        misfits.sort()
        more = f", and {len(misfits) - 1} more" if len(misfits) > 1 else ""
        raise ValueError(f"{path} does not fit {type(model).__name__}: {misfits[0]}{more}")
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} is not finite; take an earlier checkpoint")
    model.load_state_dict(weights, strict=False)


def classifier_names(model: nn.Module) -> list[str]:
    """Names of the classifiers' tensors in the model's state_dict."""
    heads = {*classifiers(model)}
    return [
        f"{name}.{parameter}" for name, module in model.named_modules() if module in heads
        for parameter in module.state_dict()
    ]  # fmt: skip


def _differs(name: str, weights: Tensors, own: Tensors) -> bool:
    return name in weights and name in own and weights[name].shape != own[name].shape
