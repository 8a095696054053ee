"""The models that analyze.py measures: found by the words of its command line, loaded, described, with their images."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from timm.utils import random_seed
from torch import nn

from datasets import DataOptions, build_data
from diversity import measurable
from diversity.backbones import Backbone
from models import build_model, published_preprocessing, published_size, weights
from pipeline.holdout import val_name
from reports.published import is_online, not_cached
from reports.run_folders import without_seed
from training import arguments, checkpoint
from training.build import options_of
from training.changes import REMEDIES
from training.parsing import with_lists
from training.preprocessing import NAMES
from training.provenance import data_name, digest, source_of
from utils import World, errors_of

RANDOM = "random"
"""The word for a model with initial weights."""


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
        flags: with which it was trained; empty where they are not known.
        seed: of random weights; None for others.
        is_average: whether the file has averaged weights alone.
        checkpoint_key: which weights of the file, if it has several.
    """

    run: str
    file: Path | None
    folder: Path | None
    epoch: int | None
    model: dict
    data: DataOptions
    classes: list[str]
    flags: Mapping[str, object] = {}
    seed: int | None = None
    is_average: bool = False
    checkpoint_key: str = ""


class Images(NamedTuple):
    """The first images of a validation set.

    Attributes:
        batches: of at most `count` images in all, with labels in tuples where the data has labels.
        num_classes: of the data.
        measured_on: what two runs must have in common to be compared.
    """

    batches: Iterator[torch.Tensor | tuple[torch.Tensor, torch.Tensor]]
    num_classes: int
    measured_on: dict


def kind_of(subject: Subject, ema: bool) -> str:
    """Which weights of a subject are measured: raw, EMA or random, or the value of --checkpoint-key."""
    stored = subject.checkpoint_key or ("EMA" if ema or subject.is_average else "raw")
    return "random" if subject.seed is not None else stored


def find_subjects(runs: list[str], flags: list[str]) -> list[Subject]:
    """The models that the RUNs name. Images for random weights are preprocessed as for the first other model."""
    others = {run: find_subject(run, flags) for run in runs if run != RANDOM}
    first = next(iter(others.values()), None)
    preprocessing = {name: with_lists(getattr(first.data, name)) for name in NAMES} if first else {}
    return [others.get(run) or find_subject(run, flags, preprocessing) for run in runs]


def find_subject(run: str, flags: list[str], preprocessing: Mapping[str, object] = {}) -> Subject:
    """The model that RUN names; the flags of the command line override those that it brings.

    Args:
        preprocessing: {flag: value} for random weights.

    Raises:
        SystemExit: it is none of the four, or a folder without a checkpoint, `--finetune` names other weights, or the
            remedies are not those of its training.
    """
    path = Path(run)
    folder = path if path.is_dir() else None
    file = path / checkpoint.LAST if folder else path
    epoch, trained_with, is_average = None, {}, False
    if file.is_file():
        with errors_of("RUN"):
            trained_with, epoch, classes, is_average = weights.origin(str(file))
        config = trained_with | {"finetune": str(file)}  # whose preprocessing is used
    elif folder:
        raise SystemExit(f"error: {run} is not a run folder of this program: it has no {checkpoint.LAST}")
    elif timm.is_model(run):
        file, classes, flags = None, [], [*flags, "--model", run]
        config = {"input_size": published_size(run)} | published_preprocessing(run)
    elif run == RANDOM:
        file, classes, config = None, [], preprocessing
    else:
        raise SystemExit(f"error: {run} is not a run folder, a checkpoint file, the name of a timm model or {RANDOM}")
    of_others = (*arguments.NOT_REPEATED, "eval", "checkpoint_key")  # the key is of the file that the run started from
    config = {name: value for name, value in config.items() if name not in of_others}
    args = arguments.parse_args(flags, config)
    arguments.check_model(args, trained_with, REMEDIES, run)
    arguments.check_val_fraction(args, trained_with)
    is_on_command_line = any(word.partition("=")[0] == "--finetune" for word in flags)  # not in a run's args.yaml
    if (file or run == RANDOM) and is_on_command_line and args.finetune not in ("", str(file)):
        raise SystemExit(f"error: RUN {run} and --finetune {args.finetune} both name weights; give one")
    if args.finetune and not file and run != RANDOM:
        with errors_of("--finetune"):
            file = Path(weights.local_file(args.finetune))
        return find_subject(str(file), [*flags, "--finetune", str(file)])._replace(run=run, folder=None)
    data = dataclasses.replace(options_of(DataOptions, args), eval=True)  # it reads no training set
    model = {"name": args.model, "input_size": args.input_size, "patch_size": args.patch_size, **args.model_kwargs}
    model |= {"remedies": args.remedy, "remedy_kwargs": args.remedy_kwargs}
    seed = args.seed if run == RANDOM and file is None else None
    key = args.checkpoint_key if any(word.partition("=")[0] == "--checkpoint-key" for word in flags) else ""
    return Subject(run, file, folder, epoch, model, data, classes, trained_with, seed, is_average, key)


def load_model(subject: Subject, num_classes: int, ema: bool, world: World) -> nn.Module:
    """The subject's model with its weights, in eval mode.

    Raises:
        SystemExit: the weights cannot be loaded, or do not fit the model.
        TapError: the model cannot be measured.
    """
    if ema and subject.file is None:
        raise SystemExit(f"error: --ema: {subject.run} has no averaged weights")
    if subject.seed is not None:
        random_seed(subject.seed)  # as main.py before the first epoch
    with errors_of("--model"):
        model = build_model(num_classes=num_classes, **subject.model)
    measurable(model)  # before a download
    if subject.seed is not None:
        if subject.run == RANDOM:  # and not of an atlas, whose names say it
            print(f"{subject.run}: the initial weights of seed {subject.seed}")
    elif subject.file is None:
        model = load_published(subject, num_classes, model.pretrained_cfg)
    else:
        with errors_of("RUN" if subject.flags else f"--model {subject.model['name']}: RUN"):
            notes = weights.load_weights(model, str(subject.file), use_ema=ema, checkpoint_key=subject.checkpoint_key)
        heads = weights.classifier_names(model)
        for note in notes:
            if note.split()[0] not in heads:
                print(f"{subject.run}: {note}")
        if any(note.split()[0] in heads for note in notes):
            _remove_classifier(model, subject.run)
    return model.to(world.device).eval()


def _remove_classifier(model: nn.Module, run: str):
    """Remove a classifier of initial values from a model whose other weights are trained."""
    print(f"{run}: measured without a classifier, as its weights have none of {model.num_classes} classes")
    model.reset_classifier(0)


def load_published(subject: Subject, num_classes: int, config: dict) -> nn.Module:
    """The model with timm's weights, of the cache if the hub of Hugging Face does not answer within seconds.

    Raises:
        SystemExit: they cannot be loaded.
    """
    if config.get("hf_hub_id") and not config.get("file"):
        is_online()
    try:
        model = build_model(num_classes=num_classes, pretrained=True, **subject.model)
        if num_classes not in (0, config["num_classes"]):
            _remove_classifier(model, subject.run)
        return model
    except ValueError as error:
        if "we cannot find the requested files in the local cache" not in str(error):  # the package's words
            raise SystemExit(f"error: --model {error}") from None
        raise not_cached(subject.run) from None


def images(subject: Subject, world: World, num_images: int, kind: str = "raw") -> Images:
    """The first images of the validation set, all for 0. `kind` is that of the weights: raw, EMA or random."""
    data = build_data(subject.data, world, subject.classes, needs_labels=False)
    count = min(num_images or data.num_val, data.num_val)
    options = subject.data
    measured_on = {
        "data_set": data_name(options.data_set, options.data_path),
        "split": val_name(options.val_split, options.val_fraction) if data.has_labels else "without labels",
        "input_size": options.input_size,
        "files": digest(source_of(data.val), options.data_set, options.data_path),
        "images": count,
        "weights": kind,
        "epoch": subject.epoch,
    }

    def stream():
        left = count
        for samples, labels in data.val:
            batch = samples[:left].to(world.device), labels[:left].to(world.device)
            yield batch if data.has_labels else batch[0]
            left -= len(samples)
            if left <= 0:
                return

    return Images(stream(), data.num_classes, measured_on)


def architecture(model: nn.Module) -> str:
    """What two models must have in common to be drawn over the same layers."""
    backbone = Backbone.of(model)
    width = getattr(model, "embed_dim", None)
    heads = getattr(getattr(backbone.all_blocks[0], "attn", None), "num_heads", None)  # as `width`, a Swin's first
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
