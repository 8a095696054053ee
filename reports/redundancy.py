"""What analyze.py does: measure the redundancy of models, and write reports, tables and figures."""

import itertools
import json
import math
from collections.abc import Collection
from pathlib import Path

import torch
from torch import nn

from diversity import TapError, TappedViT, measure_redundancy
from diversity.backbones import Backbone
from pipeline.sources import find_source
from pipeline.transforms import preprocessing_line
from reports import comparisons, figures, map_figures
from reports.function_level import FunctionOptions, add_function, function_tables, labelled_data
from reports.report_figures import draw_all
from reports.run_folders import place_in_study, read_run
from reports.runs import MAY_LACK, PROVENANCE, REPORT, Run
from reports.subjects import (
    Images,
    Subject,
    architecture,
    configuration_names,
    find_subjects,
    images,
    kind_of,
    load_model,
    prefix_names,
)
from reports.tables import comparison
from utils import World, errors_of, write_json

MEASURED = "measured on {data_set} {split} at {input_size} px, files {files}"


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
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (subject.data.mean, subject.data.std))
    picture = (samples[image].cpu() * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
    grid = backbone.grid if maps.shape[-1] == backbone.num_prefix_tokens + math.prod(backbone.grid) else None
    where = f"block {block} ({backbone.blocks_are} 0 to {len(backbone.blocks) - 1})"
    of = "validation image" if find_source(subject.data.data_set).has_labels else "image"
    title = f"{name}, {where}, {of} {image}" + ("" if grid else ", first window")
    figures.save(map_figures.attention_heads(maps, picture, prefix_names(model), grid, title), path)


def analyze(
    runs: list[str], names: list[str] | None, num_images: int, output_dir: str | None, ema: bool, layer: str,
    image: int, overwrite: bool, extra_measures: list[str], flags: list[str], world: World,
    function_level: FunctionOptions | None = None,
):  # fmt: skip
    """Measure every RUN and write reports, tables and figures; see the flags of analyze.py. `flags` are main.py's."""
    if world.size > 1:
        raise SystemExit("error: analyze.py is one process; start it without torchrun")
    if len({Path(run).resolve() for run in runs}) < len(runs):
        raise SystemExit(f"error: a RUN is named twice among {' '.join(runs)}")
    names = names or configuration_names(runs)
    files = {name: name.replace("/", "_") for name in names}
    if len(names) != len(runs) or len({*files.values()}) < len(files):
        raise SystemExit(f"error: --names needs a name for each of the {len(runs)} runs; got {' '.join(names)}")
    subjects = find_subjects(runs, flags)
    sources = [images(subject, world, num_images, kind_of(subject, ema)) for subject in subjects]
    models = [load_model(subject, of.num_classes, ema, world) for subject, of in zip(subjects, sources, strict=True)]
    labelled = [function_level and labelled_data(subject, world, function_level) for subject in subjects]
    for source, of in zip(sources, labelled, strict=True):
        source.measured_on.update({"function": of.words} if of else {})
    data = [MEASURED.format_map(of.measured_on) for of in sources]
    for what, (first, *others) in (("models", [*map(architecture, models)]), ("images", data)):
        for run, other in zip(runs[1:], others, strict=True):
            if other != first:
                raise SystemExit(f"error: {runs[0]} is {first}, {run} {other}; compare runs of the same {what}")
    folder = Path(output_dir or (subjects[0].folder if len(runs) == 1 else None) or "analysis")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"error: --output-dir {folder} cannot be written: {error.strerror}") from None
    own = {}  # reports for table.py, which one run has only where they are the output
    for subject, of in zip(subjects, sources, strict=True):
        is_output = subject.folder and folder.resolve() == subject.folder.resolve()
        if is_output or (subject.folder and len(runs) > 1):
            other = "" if overwrite else other_report(subject.folder, of.measured_on)
            if other and is_output:
                raise SystemExit(f"error: {other}; choose another --output-dir, or replace it with --overwrite")
            if other:
                print(f"{other}; it stays, --overwrite replaces it")
            else:
                own[subject.run] = subject.folder / REPORT
    configurations = {name: [] for name in names}
    for name, subject, model, source, of in zip(names, subjects, models, sources, labelled, strict=True):
        first = next(source.batches, torch.empty(0))
        samples = first if torch.is_tensor(first) else first[0]
        if not configurations[name]:
            draw_heads(name, subject, model, samples, image, layer, folder / f"heads_{files[name]}")
        every = source._replace(batches=itertools.chain([first], source.batches))
        report = measure(subject, model, every, extra_measures)
        if of:
            add_function(report, subject, model, of)
        if subject.run in own:
            write_json(report, own[subject.run])
        configurations[name].append(report)
    notes = [f"{data[0]}, the first {sources[0].measured_on['images']} images", *training_notes(names, subjects)]
    preprocessing = [(name, preprocessing_line(subject.data)) for name, subject in zip(names, subjects, strict=True)]
    notes += comparisons.differing("preprocessing", preprocessing) or [preprocessing[0][1]]
    folders = {name: subject.folder for name, subject in zip(names, subjects, strict=True)}
    places = [of_name and place_in_study(of_name) for of_name in folders.values()]
    write_all(configurations, notes, figures.study_styles(places), folder)


def measure(subject: Subject, model: nn.Module, of: Images, extra: Collection[str]) -> dict:
    """The report of a model: its run, what it was measured on, and what `measure_redundancy` returns.

    Raises:
        SystemExit: its tokens or weights are not finite, or the labels do not fit.
    """
    with errors_of(f"{subject.run} cannot be measured:"):
        report = measure_redundancy(model, of.batches, of.num_classes, extra)
    return {"run": subject.run, "measured_on": of.measured_on} | report


def other_report(folder: Path, measured_on: dict) -> str:
    """What the report of a run folder was measured on, if it was not measured in this way; empty if it was."""
    path = folder / REPORT
    try:
        before = json.loads(path.read_text())["measured_on"] if path.exists() else measured_on
    except (ValueError, KeyError, TypeError):
        return f"{path} cannot be read or is of an earlier version"
    now = {name: value for name, value in measured_on.items() if name in before or name not in MAY_LACK}
    differ = [words.format(before.get(name)) for name, words in PROVENANCE.items() if before.get(name) != now.get(name)]
    return f"{path} was measured otherwise ({', '.join(differ)})" if differ else ""


def training_notes(names: list[str], subjects: list[Subject]) -> list[str]:
    """One line for each way in which the training of the subjects differs beyond their terms."""
    pairs = [(name, subject) for name, subject in zip(names, subjects, strict=True) if subject.flags]
    runs = [
        read_run(subject.folder, name) if subject.folder else Run(name, subject.file, subject.flags)
        for name, subject in pairs
    ]
    lines = [f"trained differently: {reason}" for run in runs[1:] if (reason := comparisons.conflict(runs[0], run))]
    epochs = [(run.name, subject.epoch) for run, (_, subject) in zip(runs, pairs, strict=True)]
    lines += comparisons.averaged_although_different(runs)
    return [*lines, *comparisons.differing("the last epoch of training", epochs), *comparisons.notes(runs)]


def write_all(configurations: dict[str, list[dict]], notes: list[str], styles: list[dict], output_dir: Path):
    """Write reports, tables and figures of all configurations."""
    reports = [report for of_runs in configurations.values() for report in of_runs]
    write_json(reports[0] if len(reports) == 1 else {"cells": configurations}, output_dir / REPORT)
    functions = function_tables(configurations)
    text = "\n\n".join([comparison(configurations, notes).rstrip("\n"), *functions]) + "\n"
    (output_dir / "redundancy.md").write_text(text, encoding="utf-8")
    drawn = draw_all(configurations, styles)
    for name, figure in drawn.items():
        figures.save(figure, output_dir / name)
    print("\n\n".join(text.split("\n\n")[:2]))
    *names, last = sorted([*drawn, "heads"])
    print(f"written to {output_dir}: {REPORT}, redundancy.md, and the figures {', '.join(names)} and {last} (png, pdf)")
