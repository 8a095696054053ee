"""The trained model that is exported: found by the word of the command line, built and loaded."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import timm
import torch
from timm.data import ImageNetInfo
from torch import nn

from models import build_model, published_preprocessing, published_size, weights
from models.exporting.preprocessing import Preprocessing
from models.remedies import PREFIX, settings_of
from models.weights.fitting import fit
from utils import errors_of

CHECKPOINT = "checkpoint.pth"
"""The file of a run folder that is exported."""

ARCHITECTURE = ("model", "patch_size", "model_kwargs", "remedy", "remedy_kwargs")
"""Flags that a checkpoint of this program brings, and that cannot differ from them."""

KEPT = {
    *("architecture", "input_size", "fixed_input_size", "min_input_size", "pool_size", "num_classes"),
    *("first_conv", "classifier", "mean", "std", "interpolation", "crop_pct", "crop_mode"),
}
"""Entries of timm's configuration of a model that describe it and not timm's published weights of it."""


@dataclass(frozen=True)
class Trained:
    """A model with trained weights, and what is known about them.

    Attributes:
        run: the word on the command line that names it.
        file: with the weights.
        folder: the run folder of the file, if it is in one.
        flags: of its training; empty where they are not known.
        epoch: the last one in which the weights were trained, from 0; None where that is not known.
        kind: of the weights, raw or EMA.
        model: in eval mode, with its remedies.
        architecture: the arguments of `build_model` that it was built with, without remedies.
        remedies: {name: settings}.
        preprocessing: of its images.
        classes: names in the order of the model's outputs; empty where they are not known.
        notes: one line for each tensor of the file that was left out or resampled.
    """

    run: str
    file: Path
    folder: Path | None
    flags: Mapping[str, object]
    epoch: int | None
    kind: str
    model: nn.Module
    architecture: Mapping[str, object]
    remedies: Mapping[str, Mapping[str, object]]
    preprocessing: Preprocessing
    classes: Sequence[str] = ()
    notes: Sequence[str] = field(default_factory=list)

    @property
    def descriptions(self) -> dict[str, str]:
        """{class: its name in words} if all classes are synsets of ImageNet-1k, whose words timm has; otherwise {}."""
        info = ImageNetInfo()
        if not {*self.classes} <= {*info.label_names()}:
            return {}
        return {name: info.label_name_to_description(name) for name in self.classes}

    @cached_property
    def stock(self) -> nn.Module:
        """The model without its remedies, which is what plain timm builds; `model` itself if it has none."""
        if not self.remedies:
            return self.model
        stock = build_model(**self.architecture).eval()
        stock.load_state_dict({k: v for k, v in self.model.state_dict().items() if not k.startswith(f"{PREFIX}.")})
        stock.pretrained_cfg = self.model.pretrained_cfg
        return stock

    @property
    def name(self) -> str:
        """timm's name of the architecture: the stock one where the run used a name that ends in _diverse."""
        return self.model.pretrained_cfg["architecture"]

    def images(self, count: int = 2) -> torch.Tensor:
        """Random images [count, 3, S, S] to compare outputs; the same in every call."""
        size = self.preprocessing.input_size
        return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Of the model with its remedies."""
        return self.model(images)


def metadata(trained: Trained, arguments: Mapping[str, object] = {}) -> dict[str, str]:
    """What a file says about its weights; what is no text is JSON.

    Args:
        arguments: of `timm.create_model` for the architecture.
    """
    known = {
        "architecture": trained.name,
        "model_args": arguments,
        "weights": trained.kind,
        "preprocessing": trained.preprocessing.of_timm(),
        "label_names": [*trained.classes],
        "remedies": trained.remedies,
    }
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in known.items() if value}


def find_trained(
    run: str, given: Mapping[str, object], use_ema: bool = False, checkpoint_key: str = "", classes: Sequence[str] = ()
) -> Trained:
    """Build the model that RUN names and load its weights.

    Args:
        run: a run folder, or a file in any layout of `models.weights.LAYOUTS`.
        given: flags of the command line that are not None, with main.py's names.
        use_ema: take the averaged weights.
        checkpoint_key: which weights of a file that has several, such as teacher or student.
        classes: names for a file that has none.

    Raises:
        ValueError: there are no such weights, the model is not known, or the weights do not fit it. Initial values are
            never exported.
    """
    if use_ema and checkpoint_key:
        raise ValueError(f"{run}: --ema and --checkpoint-key {checkpoint_key} both say which weights; give one of them")
    file, folder = _locate(run)
    flags, epoch, known, is_average = weights.origin(str(file), checkpoint_key)
    given = given | _of_file(flags, given)
    if "model" not in given:
        raise ValueError(f"{file} does not contain the name of its model; give --model (a name of timm)")
    name = given["model"]
    input_size = given.get("input_size") or flags.get("input_size") or published_size(name)
    kwargs = {key: value for key, value in given.get("model_kwargs", {}).items() if key not in _WEIGHTS_OF_TIMM}
    architecture = {"name": name, "input_size": input_size, "patch_size": given.get("patch_size"), **kwargs}
    remedies = settings_of(given.get("remedy", ()), given.get("remedy_kwargs", {}))
    settings = {key: value for of_one in remedies.values() for key, value in of_one.items()}
    chosen = {"use_ema": use_ema and not is_average, "checkpoint_key": checkpoint_key}
    num_classes = _num_classes(architecture, file, given.get("num_classes"), len(known), **chosen)
    architecture |= {"num_classes": num_classes}
    with errors_of("--model"):
        model = build_model(**architecture, remedies=[*remedies], remedy_kwargs=settings).eval()
    leaves_out_head = given.get("num_classes") == 0
    notes = weights.load_weights(model, str(file), new_head=leaves_out_head, **chosen)
    if initial := [note for note in notes if "initial values" in note]:  # of a remedy
        raise ValueError(f"{file}: {initial[0]}")
    _describe(model, name)
    if classes and known and [*classes] != known:
        raise ValueError(f"{file} has the names of its classes, such as {known[0]}; leave out --class-names")
    names = [*(known or classes)] if model.num_classes else []
    if names and len(names) != model.num_classes:
        source = "the file" if known else "--class-names"
        raise ValueError(f"{file} has {model.num_classes} outputs, and {source} has {len(names)} names")
    described = published_preprocessing(name) | weights.describe(str(file)).preprocessing
    published = flags if "eval_crop_ratio" in flags else described
    preprocessing = Preprocessing.of_flags({**published, **given}, input_size)
    kind = "EMA" if use_ema or is_average else "raw"
    return Trained(run, file, folder, flags, epoch, kind, model, architecture, remedies, preprocessing, names, notes)


_WEIGHTS_OF_TIMM = ("pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
"""Arguments of timm that name weights to start from, which those of the file replace."""


def _locate(run: str) -> tuple[Path, Path | None]:
    """The file with the weights and its run folder."""
    path = Path(run)
    if path.is_dir():
        if not (path / CHECKPOINT).is_file():
            raise ValueError(f"{run} is not a run folder of this program: it has no {CHECKPOINT}")
        return path / CHECKPOINT, path
    if not path.is_file():
        raise ValueError(f"{run} is not a run folder or a file of weights")
    return path, path.parent if (path.parent / "args.yaml").is_file() else None


def _of_file(flags: Mapping[str, object], given: Mapping[str, object]) -> dict[str, object]:
    """The flags of the architecture in a checkpoint of this program.

    Raises:
        ValueError: the command line has another value of one of them.
    """
    own = {name: flags[name] for name in ARCHITECTURE if flags.get(name)}
    for name in ARCHITECTURE if flags else ():
        if given.get(name) and given[name] != own.get(name):
            flag = f"--{name.replace('_', '-')}"
            how = f"with {flag} {own[name]}" if name in own else f"without {flag}"
            raise ValueError(f"was trained {how}, and not with {given[name]}; leave out {flag}")
    return own


def _num_classes(
    architecture: dict, file: Path, asked: int | None, known: int, use_ema: bool, checkpoint_key: str
) -> int:
    """The number of classes of a file's classifier; 0 if it has none.

    Raises:
        ValueError: --num-classes is another number.
    """
    if asked == 0:
        return 0
    with errors_of("--model"):
        model = build_model(**architecture, num_classes=known or asked or 1000)
    _, tensors, _ = weights.with_timm_names(model, str(file), use_ema, checkpoint_key)
    try:
        tensors, _ = fit(model, tensors)
    except ValueError as error:
        raise ValueError(f"{file} {error}") from None
    heads = [name for name in weights.classifier_names(model) if name in tensors]
    found = len(tensors[heads[0]]) if heads else 0
    if asked and asked != found:
        has = f"{found} classes" if found else "no classifier"
        raise ValueError(f"{file} has {has}, and --num-classes is {asked}")
    return found


def _describe(model: nn.Module, name: str):
    """Leave in timm's configuration of a model what describes it, and not the weights that timm has published.

    Raises:
        ValueError: timm has no such model.
    """
    config = {key: value for key, value in getattr(model, "pretrained_cfg", {}).items() if key in KEPT}
    name = config.get("architecture") or name
    if not timm.models.model_entrypoint(name).__module__.startswith("timm."):
        raise ValueError(f"{name} is not a model of timm, which could not build it from the exported files")
    model.pretrained_cfg = config | {"architecture": name}
