"""What analyze.py does: find models and images, measure their redundancy, and write reports, tables and figures."""

import itertools
import math
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import timm
import timm.data
import torch
from torch import nn
from torchvision import transforms

from datasets import DataOptions, build_data
from diversity import TapError, TappedViT, measurable, measure_redundancy
from diversity.backbones import Backbone
from models import build_model, weights
from pipeline.transforms import TransformOptions, build_transform
from reports import figures, redundancy_figures
from reports.run_folders import REPORT, without_seed
from reports.tables import comparison
from training import arguments, checkpoint
from training.build import options_of
from utils import World, write_json


class Subject(NamedTuple):
    """A model to measure.

    Attributes:
        run: the word on the command line that names it.
        args: main.py's flags: model, data set, batch size.
        file: the checkpoint; None for published weights.
        folder: the run folder, where there is one; its report is written there too.
        epoch: the last one in which its weights were trained, from 0; None where that is not known.
        transform: of its images.
    """

    run: str
    args: Namespace
    file: Path | None
    folder: Path | None
    epoch: int | None
    transform: Callable


def find_subject(run: str, flags: list[str]) -> Subject:
    """The model that RUN names; the flags of the command line override those that it brings.

    Raises:
        SystemExit: it is none of the three, or a folder without a checkpoint.
    """
    path = Path(run)
    folder = path if path.is_dir() else None
    file = path / checkpoint.LAST if folder else path
    if file.is_file():
        config, epoch = weights.origin(str(file), "RUN")
        args = _flags(flags, config)
        transform = build_transform(options_of(TransformOptions, args), is_training=False)
        return Subject(run, args, file, folder, epoch, transform)
    if folder:
        raise SystemExit(f"error: {run} is not a run folder of this program: it has no {checkpoint.LAST}")
    if not timm.is_model(run):
        raise SystemExit(f"error: {run} is not a run folder, a checkpoint file or the name of a timm model")
    published = timm.get_pretrained_cfg(run)
    published = published.to_dict() if published else {}
    args = _flags([*flags, "--model", run], {"input_size": published.get("input_size", (224,))[-1]})
    args.model_kwargs = {"pretrained": True} | args.model_kwargs
    data_config = timm.data.resolve_data_config({"img_size": args.input_size}, published)
    return Subject(run, args, None, None, None, timm.data.create_transform(**data_config))


def _flags(flags: list[str], config: dict) -> Namespace:
    config = {name: value for name, value in config.items() if name not in (*arguments.NOT_REPEATED, "eval")}
    args = arguments.parse_args(flags, config)
    args.eval = True  # no training set is read
    return args


def load_model(subject: Subject, num_classes: int, ema: bool, world: World) -> nn.Module:
    """The subject's model with its weights, in eval mode.

    Raises:
        SystemExit: the weights cannot be loaded, or do not fit the model.
        TapError: the model cannot be measured.
    """
    if ema and subject.file is None:
        raise SystemExit(f"error: --ema: {subject.run} has no averaged weights")
    args = subject.args
    shape = num_classes, args.input_size, args.patch_size
    model = build_model(args.model, *shape, **args.model_kwargs | {"pretrained": False})
    measurable(model)  # before a download
    if subject.file is None:
        model = build_model(args.model, *shape, **args.model_kwargs)
    else:
        for note in weights.load_weights(model, str(subject.file), "RUN", use_ema=ema):
            print(f"{subject.run}: {note}")
    return model.to(world.device).eval()


def images(subject: Subject, world: World, num_images: int) -> tuple[Iterator[torch.Tensor], int]:
    """The first images of the validation set in batches, and the number of classes."""
    data = build_data(options_of(DataOptions, subject.args), world, subject.transform)

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
    if backbone is None:
        return f"a {type(model).__name__}"
    width = getattr(model, "embed_dim", None)
    heads = getattr(getattr(backbone.blocks[0], "attn", None), "num_heads", None)
    return (
        f"a {type(model).__name__} of {len(backbone.all_blocks)} blocks, {width} wide, {heads} heads, "
        f"{backbone.grid[0]} x {backbone.grid[1]} patches and {backbone.num_prefix_tokens} prefix tokens"
    )


def measured_data(subject: Subject) -> str:
    """What two runs must have in common to be compared."""
    args = subject.args
    return f"measured on {args.data_set} {args.val_split or 'validation'} at {args.input_size} px"


def draw_heads(
    name: str, subject: Subject, model: nn.Module, samples: torch.Tensor, image: int, layer: str, path: Path
):
    """Draw the heads of a block on one image; print a notice for a block without maps to draw.

    Raises:
        SystemExit: there is no such image.
        TapError: there is no such block.
    """
    if image >= len(samples):
        raise SystemExit(f"error: --image {image} is not among the first {len(samples)} images")
    backbone = Backbone.require(model, "attention")
    (block,) = backbone.layer_indices("attention", "attn_layers", layer)
    try:
        with TappedViT(model, ["attention"], attn_layers=layer) as tapped, torch.no_grad():
            tapped.train()
            model.eval()
            maps = tapped(samples[image][None]).attention[0].float().cpu().numpy()
    except TapError as error:
        print(f"{name}: the heads are not drawn: {error}")
        return
    normalise = next(step for step in subject.transform.transforms if isinstance(step, transforms.Normalize))
    mean, std = (torch.as_tensor(values).view(3, 1, 1) for values in (normalise.mean, normalise.std))
    picture = (samples[image].cpu() * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
    grid = backbone.grid if maps.shape[-1] == backbone.num_prefix_tokens + math.prod(backbone.grid) else None
    where = f"block {block} ({backbone.blocks_are} 0 to {len(backbone.blocks) - 1})"
    title = f"{name}, {where}, validation image {image}" + ("" if grid else ", first window")
    figures.save(redundancy_figures.attention_heads(maps, picture, prefix_names(model), grid, title), path)


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


def analyze(options: Namespace, flags: list[str], world: World):
    """Measure every RUN and write reports, tables and figures.

    Args:
        options: analyze.py's own flags.
        flags: main.py's flags on the command line.
        world: this process.
    """
    if world.size > 1:
        raise SystemExit("error: analyze.py is one process; start it without torchrun")
    runs = options.runs
    if len({Path(run).resolve() for run in runs}) < len(runs):
        raise SystemExit(f"error: a RUN is named twice among {' '.join(runs)}")
    names = options.names or configuration_names(runs)
    files = {name: name.replace("/", "_") for name in names}
    if len(names) != len(runs) or len({*files.values()}) < len(files):
        raise SystemExit(f"error: --names needs a name for each of the {len(runs)} runs; got {' '.join(names)}")
    subjects = [find_subject(run, flags) for run in runs]
    sources = [images(subject, world, options.num_images) for subject in subjects]
    models = [
        load_model(subject, num_classes, options.ema, world)
        for subject, (_, num_classes) in zip(subjects, sources, strict=True)
    ]
    for what, descriptions in (("models", map(architecture, models)), ("images", map(measured_data, subjects))):
        first, *others = descriptions
        for run, other in zip(runs[1:], others, strict=True):
            if other != first:
                raise SystemExit(f"error: {runs[0]} is {first}, {run} {other}; compare runs of the same {what}")
    output_dir = Path(options.output_dir or (subjects[0].folder if len(runs) == 1 else None) or "analysis")
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"error: --output-dir {output_dir} cannot be written: {error.strerror}") from None
    configurations = {name: [] for name in names}
    for name, subject, model, (batches, _) in zip(names, subjects, models, sources, strict=True):
        first = next(batches, torch.empty(0))
        if not configurations[name]:
            draw_heads(name, subject, model, first, options.image, options.layer, output_dir / f"heads_{files[name]}")
        configurations[name].append(report_of(subject, model, itertools.chain([first], batches), options.ema))
    write_all(configurations, output_dir)


def report_of(subject: Subject, model: nn.Module, batches: Iterable[torch.Tensor], ema: bool) -> dict:
    """`measure_redundancy`, with what it was measured on; written into the run folder too, for table.py.

    Raises:
        SystemExit: there are no images, or the model's numbers are not finite.
    """
    try:
        report = measure_redundancy(model, batches)
    except ValueError as error:
        raise SystemExit(f"error: {subject.run} cannot be measured: {error}") from None
    args = subject.args
    measured_on = {
        "data_set": args.data_set,
        "split": args.val_split or "validation",
        "input_size": args.input_size,
        "images": report["images"],
        "weights": "EMA" if ema else "raw",
        "epoch": subject.epoch,
    }
    report = {"run": subject.run, "measured_on": measured_on} | report
    if subject.folder:
        write_json(report, subject.folder / REPORT)
    return report


def write_all(configurations: dict[str, list[dict]], output_dir: Path):
    """Write reports, tables and figures of all configurations."""
    reports = [report for of_runs in configurations.values() for report in of_runs]
    write_json(reports[0] if len(reports) == 1 else {"cells": configurations}, output_dir / REPORT)
    text = comparison(configurations)
    (output_dir / "redundancy.md").write_text(text)
    figures.save(redundancy_figures.redundancy_depth(configurations), output_dir / "depth")
    figures.save(redundancy_figures.weight_depth(configurations), output_dir / "weights")
    figures.save(redundancy_figures.weight_spectra(configurations), output_dir / "spectra")
    figures.save(redundancy_figures.variance(configurations), output_dir / "variance")
    print(text.split("\n\n")[0])
    drawn = "depth, heads, spectra, variance and weights"
    print(f"written to {output_dir}: {REPORT}, redundancy.md, and the figures {drawn} (png, pdf)")
