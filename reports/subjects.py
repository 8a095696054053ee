"""The models that analyze.py measures: found by the words of its command line, loaded, described, with their images."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from torch import nn

from datasets import DataOptions, build_data
from diversity import measurable
from diversity.backbones import Backbone
from models import build_model, published_preprocessing, weights
from reports.run_folders import without_seed
from training import arguments, checkpoint
from training.build import options_of
from utils import World, errors_of


class Subject(NamedTuple):
    """A model to measure.

    Attributes:
        run: the word on the command line that names it.
        file: the checkpoint; None for published weights.
        folder: the run folder, where there is one; its report is written there too.
        epoch: the last one in which its weights were trained, from 0; None where that is not known.
        model: the arguments of `build_model` without the number of classes.
        data: of the validation images, preprocessed as the weights need it.
        classes: names in the order of the model's outputs; empty where they are not known.
    """

    run: str
    file: Path | None
    folder: Path | None
    epoch: int | None
    model: dict
    data: DataOptions
    classes: list[str]

    @property
    def measured_on(self) -> dict:
        """What two runs must have in common to be compared."""
        split = self.data.val_split or "validation"
        return {"data_set": self.data.data_set, "split": split, "input_size": self.data.input_size}


def find_subject(run: str, flags: list[str]) -> Subject:
    """The model that RUN names; the flags of the command line override those that it brings.

    Raises:
        SystemExit: it is none of the three, or a folder without a checkpoint.
    """
    path = Path(run)
    folder = path if path.is_dir() else None
    file, epoch = path / checkpoint.LAST if folder else path, None
    if file.is_file():
        with errors_of("RUN"):
            config, epoch, classes = weights.origin(str(file))
        config["finetune"] = str(file)  # whose preprocessing is used
    elif folder:
        raise SystemExit(f"error: {run} is not a run folder of this program: it has no {checkpoint.LAST}")
    elif timm.is_model(run):
        file, published = None, timm.get_pretrained_cfg(run)
        classes, flags = [], [*flags, "--model", run]
        config = {"input_size": published.input_size[-1] if published else 224} | published_preprocessing(run)
    else:
        raise SystemExit(f"error: {run} is not a run folder, a checkpoint file or the name of a timm model")
    config = {name: value for name, value in config.items() if name not in (*arguments.NOT_REPEATED, "eval")}
    args = arguments.parse_args(flags, config)
    data = dataclasses.replace(options_of(DataOptions, args), eval=True)  # it reads no training set
    model = {"name": args.model, "input_size": args.input_size, "patch_size": args.patch_size, **args.model_kwargs}
    return Subject(run, file, folder, epoch, model, data, classes)


def load_model(subject: Subject, num_classes: int, ema: bool, world: World) -> nn.Module:
    """The subject's model with its weights, in eval mode.

    Raises:
        SystemExit: the weights cannot be loaded, or do not fit the model.
        TapError: the model cannot be measured.
    """
    if ema and subject.file is None:
        raise SystemExit(f"error: --ema: {subject.run} has no averaged weights")
    with errors_of("--model"):
        model = build_model(num_classes=num_classes, **subject.model)
    measurable(model)  # before a download
    if subject.file is None:
        with errors_of("--model"):
            model = build_model(num_classes=num_classes, pretrained=True, **subject.model)
    else:
        with errors_of("RUN"):
            notes = weights.load_weights(model, str(subject.file), use_ema=ema)
        for note in notes:
            print(f"{subject.run}: {note}")
    return model.to(world.device).eval()


def images(subject: Subject, world: World, num_images: int) -> tuple[Iterator[torch.Tensor], int]:
    """The first images of the validation set in batches, and the number of classes."""
    data = build_data(subject.data, world, subject.classes)

    def stream():
        left = min(num_images or data.num_val, data.num_val)
        for samples, _ in data.val:
            yield samples[:left].to(world.device)
            left -= len(samples)
            if left <= 0:
                return

    return stream(), data.num_classes


def architecture(model: nn.Module) -> str:
    """What two models must have in common to be drawn over the same layers."""
    backbone = Backbone.of(model)
    width = getattr(model, "embed_dim", None)
    heads = getattr(getattr(backbone.blocks[0], "attn", None), "num_heads", None)
    return (
        f"a {type(model).__name__} of {len(backbone.all_blocks)} blocks, {width} wide, {heads} heads, "
        f"{backbone.grid[0]} x {backbone.grid[1]} patches and {backbone.num_prefix_tokens} prefix tokens"
    )


def prefix_names(model: nn.Module) -> list[str]:
    """Names of a model's tokens in front of the patches, in order."""
    names = ["class token"] if getattr(model, "cls_token", None) is not None else []
    names += ["distillation token"] if getattr(model, "dist_token", None) is not None else []
    registers = getattr(model, "num_prefix_tokens", 0) - len(names)
    return names + [f"register {i}" for i in range(registers)]


def configuration_names(runs: list[str]) -> list[str]:
    """For each run the shortest end of its path, without its seed, by which the configurations differ."""
    paths = [without_seed(Path(run).resolve()).parts for run in runs]
    lengths = range(1, max(map(len, paths)) + 1)
    ends = (["/".join(path[-n:]) for path in paths] for n in lengths)
    return next(names for names in ends if len({*names}) == len({*paths}))
