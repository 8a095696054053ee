"""The model card of exported weights: README.md of their folder, in the form of the Hugging Face hub."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import yaml

from models.exporting.registry import Written
from models.exporting.results import accuracies, changes, redundancy, start
from models.exporting.trained import Trained

PROGRAM = "diverse-vit"

CITATION = """@inproceedings{chen2022principle,
  title     = {The Principle of Diversity: Training Stronger Vision Transformers Calls for Reducing All Levels of Redundancy},
  author    = {Chen, Tianlong and Zhang, Zhenyu and Cheng, Yu and Awadallah, Ahmed and Wang, Zhangyang},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2022}
}"""  # noqa: E501 as in README.md

PATHS = ("data_path", "output_dir", "finetune", "resume", "teacher_path", "config")
"""Flags that are paths of the machine that trained, of which the card has the last name."""

HEADLINES = (
    *("embedding_token_cosine_last", "embedding_token_abscosine_last", "embedding_stable_rank_last"),
    *("attention_head_cosine", "weight_row_abscosine", "weight_effective_rank"),
)
"""Keys of the measures that are shown first, of the three levels."""

MACHINE = ("dist_url", "world_size", "local_rank", "scale_lr_flag", "resplit")
"""Flags that are not shown: of the process group, and of DeiT's command lines without an effect here."""


def model_card(trained: Trained, written: Written, folder: Path) -> str:
    """The text of the card.

    Args:
        folder: in which the files are for their users; its name is the title.
    """
    parts = [_front_matter(trained, written), f"# {folder.name}", _first_paragraph(trained)]
    parts += ["## Use", f"```python\n{written.usage.replace('DIR', f'/path/to/{folder.name}')}\n```"]
    parts += [f"Checked when the files were written: {written.check}."]
    if written.limits:
        parts += ["## Limits", *written.limits]
    parts += ["## Model", _table(_model_rows(trained)), *_results(trained), *_training(trained)]
    if trained.flags:
        parts += ["## Citation", f"{PROGRAM} implements the method of this paper:\n\n```bibtex\n{CITATION}\n```"]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(trained: Trained, written: Written) -> str:
    task = "image-classification" if trained.model.num_classes else "image-feature-extraction"
    head = {"library_name": written.library, "pipeline_tag": task, "tags": [task, written.library, PROGRAM]}
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---"


def _first_paragraph(trained: Trained) -> str:
    weights = "averaged (EMA)" if trained.kind == "EMA" else "raw"
    if not trained.flags:
        line = (
            f"A {trained.name} of timm with the weights of {trained.file.name}. How they were trained is not known here"
        )
        return f"{line}: add their source and their licence."
    terms = ", ".join(f"`{name}` {coef:g}" for name, coef in _terms(trained.flags).items())
    how = f"the diversity terms {terms}" if terms else "no diversity term"
    epoch = "" if trained.epoch is None else f" after epoch {trained.epoch + 1} of {_num_epochs(trained.flags)}"
    return (
        f"A {trained.name} of timm, trained on {_data(trained.flags)} by {PROGRAM} with {how}. These are "
        f"the {weights} weights{epoch}. No licence is stated: add that of the data, and of the weights that training "
        "started from."
    )


def _model_rows(trained: Trained) -> Iterable[tuple[str, object]]:
    kwargs = {k: v for k, v in trained.architecture.items() if k not in ("name", "input_size", "num_classes")}
    kwargs = ", ".join(f"{key}={value}" for key, value in kwargs.items() if value is not None)
    classes = trained.model.num_classes or "none; timm's model returns pooled features"
    names = ", ".join(map(str, trained.classes[:5])) + (", ..." if len(trained.classes) > 5 else "")
    yield "architecture", f"{trained.name}{f' ({kwargs})' if kwargs else ''}"
    yield "parameters", f"{sum(parameter.numel() for parameter in trained.model.parameters()):,}"
    yield "input", f"RGB, {trained.preprocessing.input_size} x {trained.preprocessing.input_size} px"
    yield "preprocessing", trained.preprocessing.line()
    yield "classes", f"{classes} ({names})" if names else classes
    for name, settings in trained.remedies.items():
        yield f"remedy `{name}`", ", ".join(f"{key}={value}" for key, value in settings.items()) or "no settings"
    yield "source", f"{f'{trained.kind} weights of ' if trained.flags else ''}{trained.file.name}"
    for note in trained.notes:
        yield "note", note


def _results(trained: Trained) -> list[str]:
    """Accuracy and redundancy, where they were measured with these weights."""
    found, (rows, measured_on) = accuracies(trained), redundancy(trained)
    parts = []
    if found:
        on = f"Validation set of {_data(trained.flags)}, {trained.kind} weights."
        values = {name: value if name == "images" else f"{value:.2f} %" for name, value in found.items()}
        parts += ["## Accuracy", on, _table(values.items())]
    elif trained.flags:
        parts += ["## Accuracy", "The run folder has no accuracy of these weights."]
    if rows:
        parts += ["## Redundancy", f"Measured on {measured_on}; ↓ and ↑ are the less redundant directions."]
        texts = {key: (heading, f"{value:.4g}") for key, (heading, value) in rows.items()}
        parts += [_table(texts[key] for key in HEADLINES if key in texts)]
        parts += [f"<details><summary>All measures</summary>\n\n{_table(texts.values())}\n\n</details>"]
    return parts


def _training(trained: Trained) -> list[str]:
    """How the weights were trained: the main settings, and all flags."""
    flags, begin = trained.flags, start(trained)
    if not flags:
        return []
    rows = {
        **{name: flags.get(name) for name in ("preset", "epochs", "opt", "seed")},
        "data": _data(flags),
        "started from": Path(flags.get("finetune") or "").name,
        "images per optimizer step": begin.get("global_batch"),
        "learning rate": begin.get("learning_rate"),
        "precision": begin.get("precision"),
        "device": begin.get("card"),
        "versions": ", ".join(f"{name} {begin[name]}" for name in ("torch", "timm") if name in begin),
        "commit": begin.get("commit"),
    }
    with_values = {name: _without_folders(name, value) for name, value in flags.items() if name not in MACHINE}
    text = yaml.safe_dump(with_values, sort_keys=False)
    names = sorted({change["name"] for change in changes(trained)})
    changed = [f"These flags were changed while it trained; the list below has their last values: {', '.join(names)}."]
    changed = changed if names else []
    details = f"<details><summary>All flags</summary>\n\n```yaml\n{text}```\n\n</details>"
    return [
        "## Training",
        _table((name, value) for name, value in rows.items() if value not in (None, "")),
        *changed,
        details,
    ]


def _terms(flags: Mapping[str, object]) -> dict[str, float]:
    """{term: coefficient} of the terms that were on."""
    coefs = {name.removesuffix("_coef"): value for name, value in flags.items() if name.endswith("_coef")}
    return {name: value for name, value in coefs.items() if value}


def _data(flags: Mapping[str, object]) -> str:
    """The data set, in words: IMNET is any folder of images, whose name tells more."""
    if flags.get("data_set") != "IMNET":
        return str(flags.get("data_set"))
    name = Path(flags.get("data_path") or "").name
    return f"the image folder `{name}`" if name else "an image folder"


def _num_epochs(flags: Mapping[str, object]) -> int:
    return flags.get("epochs", 0) + (flags.get("cooldown_epochs") or 0)


def _without_folders(name: str, value: object) -> object:
    is_path = name in PATHS and isinstance(value, str) and not value.startswith("https://")
    return Path(value).name if is_path else value


def _table(rows: Iterable[tuple[str, object]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in rows)])


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|")
