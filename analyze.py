"""Redundancy of any checkpoint at the three levels: JSON, Markdown and figures.

    python analyze.py runs/plain runs/diverse --output-dir runs/analysis

A RUN is a run folder, a checkpoint file, or the name of a timm model with published weights. Several are drawn in one
figure, and tabled with their differences from the first. Further flags are main.py's (--data-path, --model ...); a run
folder and this program's checkpoints bring their own.
"""

import argparse
import itertools
import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
import yaml
from torch import nn

import arguments
import checkpoint
import figures
from datasets import build_data
from diversity import MEASURES, TapError, TappedViT, measure_redundancy
from diversity.backbones import Backbone
from models import build_model
from parsing import Parser, device, hyphens, whole
from utils import World, joined_world, one_line_errors, quiet_warnings, run_command

REPORT = "redundancy.json"
CHUNK = 16  # images that are measured at a time; maps of all heads are held in float64


class Subject(NamedTuple):
    """What is measured.

    Attributes:
        name: for tables and legends.
        args: main.py's flags: model, data set, batch size.
        file: the checkpoint; None for published weights.
        folder: the run folder, where there is one; its report is kept there too.
    """

    name: str
    args: Namespace
    file: Path | None
    folder: Path | None


def find_subject(run: str, flags: list[str]) -> Subject:
    """What RUN means, with the flags it brings and those of the command line over them.

    Raises:
        SystemExit: it is none of the three, or a folder without a checkpoint.
    """
    path = Path(run)
    if path.is_dir():
        for name in ("args.yaml", checkpoint.LAST):
            if not (path / name).is_file():
                raise SystemExit(f"error: {run} is no run folder of this program: it holds no {name}")
        try:
            config = yaml.safe_load((path / "args.yaml").read_text())
        except yaml.YAMLError:
            config = None
        if not isinstance(config, dict):
            raise SystemExit(f"error: {run}/args.yaml does not hold the flags of a run")
        return Subject(path.resolve().name, _flags(flags, config), path / checkpoint.LAST, path)
    if path.is_file():
        config = checkpoint.stored_args(run, "RUN")
        return Subject(path.stem, _flags(flags, config), path, None)
    if timm.is_model(run):
        return Subject(run, _flags([*flags, "--model", run], {}), None, None)
    raise SystemExit(f"error: {run} is no run folder, no checkpoint file and no model of timm")


def _flags(flags: list[str], config: dict) -> Namespace:
    config = {name: value for name, value in config.items() if name not in (*arguments.NOT_REPEATED, "eval")}
    args = arguments.parse_args(flags, config)
    args.eval = True  # no training set is read
    return args


def load_model(subject: Subject, num_classes: int, ema: bool, world: World) -> nn.Module:
    """The subject's model with its weights, in eval mode.

    Raises:
        SystemExit: the weights cannot be had, or do not fit the model.
    """
    if ema and subject.file is None:
        raise SystemExit(f"error: --ema: {subject.name} has no averaged weights")
    args = subject.args
    published = {"pretrained": True} if subject.file is None else {}
    model = build_model(args.model, num_classes, args.input_size, args.patch_size, **args.model_kwargs, **published)
    if subject.file is not None:
        for note in checkpoint.load_weights(model, str(subject.file), "RUN", use_ema=ema):
            print(f"{subject.name}: {note}")
    return model.to(world.device).eval()


def images(subject: Subject, world: World, num_images: int) -> tuple[Iterator[torch.Tensor], int]:
    """The first images of the validation set in small batches, and the number of classes."""
    data = build_data(subject.args, world)

    def stream():
        left = min(num_images or data.num_val, data.num_val)
        for samples, _ in data.val:
            for chunk in samples[:left].split(CHUNK):
                yield chunk.to(world.device)
            left -= len(samples)
            if left <= 0:
                return

    return stream(), data.num_classes


def architecture(model: nn.Module) -> str:
    """What two models must share to be drawn over the same layers."""
    backbone = Backbone.of(model)
    if backbone is None:
        return type(model).__name__
    width = getattr(model, "embed_dim", None)
    heads = getattr(getattr(backbone.blocks[0], "attn", None), "num_heads", None)
    return (
        f"{type(model).__name__} of {len(backbone.all_blocks)} blocks, {width} wide, {heads} heads, "
        f"{backbone.grid[0]} x {backbone.grid[1]} patches and {backbone.num_prefix_tokens} further tokens"
    )


def head_maps(model: nn.Module, sample: torch.Tensor, layer: str) -> np.ndarray:
    """Attention maps [H, N, N] of one image [3, S, S] in a block of `TappedViT`'s.

    Raises:
        TapError: there is no such block, or it has no maps to draw.
    """
    with TappedViT(model, ["attention"], attn_layers=layer) as tapped, torch.no_grad():
        tapped.train()
        model.eval()
        return tapped(sample[None]).attention[0].float().cpu().numpy()


def markdown(reports: dict[str, dict]) -> str:
    """Tables of all measures: means over the layers, with differences from the first run; then layer by layer."""
    names = list(reports)
    first, others = names[0], names[1:]
    lines = ["| measure | " + " | ".join([first, *(f"{name} | difference" for name in others)]) + " |"]
    lines.append("|" + "---|" * (2 + 2 * len(others)))
    for level, measures in MEASURES.items():
        for measure in measures:
            values = [reports[name]["summary"].get(f"{level}_{measure}") for name in names]
            cells = [_number(values[0])]
            for value in values[1:]:
                comparable = None not in (value, values[0])
                cells += [_number(value), f"{value - values[0]:+.4g}" if comparable else "-"]
            lines.append(f"| {level} {measure} | " + " | ".join(cells) + " |")
    for name in names:
        lines += ["", f"{name}, {reports[name]['images']} images, layer by layer", ""]
        columns = [(level, measure) for level in ("embedding", "attention") for measure in MEASURES[level]]
        lines.append("| layer | " + " | ".join(f"{level} {measure}" for level, measure in columns) + " |")
        lines.append("|" + "---|" * (1 + len(columns)))
        for layer in range(len(reports[name]["variance"])):
            cells = []
            for level, measure in columns:
                index = layer if level == "embedding" else layer - 1
                cells.append(_number(reports[name][level][measure][index] if index >= 0 else None))
            lines.append(f"| {layer} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def draw_heads(name: str, model: nn.Module, samples: torch.Tensor, options: Namespace, output_dir: Path):
    """The figure of a block's heads on one image; a block without maps to draw is said.

    Raises:
        SystemExit: there is no such image.
        TapError: there is no such block.
    """
    if options.image >= len(samples):
        raise SystemExit(f"error: --image {options.image} is not among the first {len(samples)} images")
    try:
        maps = head_maps(model, samples[options.image], options.layer)
    except TapError as error:
        if error.argument:
            raise
        print(f"{name}: the heads are not drawn: {error}")
        return
    title = f"{name}: attention maps of the heads, block: {options.layer}"
    figure = figures.attention_heads(maps, getattr(model, "num_prefix_tokens", 0), title)
    figures.save(figure, output_dir / f"heads_{name.replace('/', '_')}")


def unique_names(runs: list[str]) -> list[str]:
    """The shortest last parts of the paths that tell all runs apart: seed0 alone, plain/seed0 beside all/seed0."""
    paths = [Path(run).resolve().parts for run in runs]
    lengths = range(1, max(map(len, paths)) + 1)
    return next(
        (names for names in (["/".join(path[-n:]) for path in paths] for n in lengths) if len({*names}) == len(names)),
        runs,
    )


def analyze(options: Namespace, flags: list[str], world: World):
    """Measure every RUN and write what was found."""
    subjects = [find_subject(run, flags) for run in options.runs]
    names = options.names or unique_names(options.runs)
    if len(names) != len(subjects) or len({name.replace("/", "_") for name in names}) != len(names):
        raise SystemExit(f"error: --names needs a name of its own for each of the {len(subjects)} runs; got {names}")
    output_dir = Path(options.output_dir or (subjects[0].folder if len(subjects) == 1 else None) or "analysis")
    sources = {name: images(subject, world, options.num_images) for name, subject in zip(names, subjects, strict=True)}
    models = {
        name: load_model(subject, sources[name][1], options.ema, world)
        for name, subject in zip(names, subjects, strict=True)
    }
    for name in names[1:]:
        ours, theirs = architecture(models[names[0]]), architecture(models[name])
        if ours != theirs:
            raise SystemExit(f"error: {names[0]} is a {ours}, {name} a {theirs}; compare models of one architecture")
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"error: --output-dir {output_dir} cannot be written: {error.strerror}") from None
    reports = {}
    for name, model in models.items():
        batches, _ = sources[name]
        first = next(batches)
        draw_heads(name, model, first, options, output_dir)
        reports[name] = measure_redundancy(model, itertools.chain([first], batches))
    for report, subject in zip(reports.values(), subjects, strict=True):
        if subject.folder and not (flags or options.ema):  # as the run was trained, for tabulate.py
            (subject.folder / REPORT).write_text(json.dumps(report) + "\n")
    whole_report = reports[names[0]] if len(names) == 1 else {"runs": reports}
    (output_dir / REPORT).write_text(json.dumps(whole_report) + "\n")
    (output_dir / "redundancy.md").write_text(markdown(reports))
    figures.save(figures.redundancy_depth(reports), output_dir / "depth")
    figures.save(figures.weight_spectra(reports), output_dir / "spectra")
    figures.save(figures.variance(reports), output_dir / "variance")
    print(markdown(reports).split("\n\n")[0])
    print(f"written to {output_dir}: {REPORT}, redundancy.md, and figures depth, heads, spectra, variance (png, pdf)")


def _block(text: str) -> str:
    if text not in ("first", "last") and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"is first, last or the index of a block; got {text!r}")
    return text


def main(argv: list[str] | None = None):
    """Analyze what a command line names; a mistake ends in one line and a non-zero exit."""
    parser = Parser(
        prog="analyze.py",
        description=__doc__.split("\n\n")[0],
        epilog="Further flags are main.py's.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="run folder, checkpoint file, or name of a timm model; before the flags")
    add("--names", nargs="+", metavar="NAME", help="for tables and legends; default: the runs' own")
    add("--num-images", type=whole, default=256, help="of the validation set; 0 = all (default: 256)")
    add("--output-dir", metavar="DIR", help="default: the run folder, or analysis for several runs")
    add("--ema", action="store_true", help="measure the averaged weights")
    add(
        "--layer",
        type=_block,
        default="last",
        help="whose heads are drawn: first, last or an index (default: last)",
    )
    add("--image", type=whole, default=0, help=f"validation image whose attention is drawn, below {CHUNK} (default: 0)")
    add("--device", type=device, default="auto", help="auto, cuda or cpu")
    options, flags = parser.parse_known_args([hyphens(word) for word in (sys.argv[1:] if argv is None else argv)])
    quiet_warnings()
    with one_line_errors(), joined_world(options.device, "env://") as world:
        try:
            analyze(options, flags, world)
        except (TapError, ValueError) as error:
            raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    run_command(main)
