"""The page of an atlas, as Markdown and as one HTML file: figures by level, tables, and what was not measured."""

import base64
import html
from collections.abc import Sized
from pathlib import Path
from typing import NamedTuple

from reports import figures
from reports.atlas_figures import FIGURES, draw_level
from reports.atlas_records import ATLAS, Atlas, images_line
from reports.tables import known_measures, markdown_table
from utils import atomic_write

CAPTIONS = {
    "tokens": "Patch tokens: redundancy against the relative depth, layer over number of blocks.",
    "heads": "Attention heads: redundancy against the relative depth; a block is at the layer that it returns.",
    "weights": "Weights of q, k and v: redundancy against the relative depth, means over the three of a block.",
}
READ = "Solid: the models. Dashed: initial weights of the same architecture. Arrows point to less redundancy."
SUMMARY = (
    *("embedding_token_cosine_last", "embedding_participation_ratio_last", "embedding_rankme_last"),
    *("attention_head_cosine", "attention_head_output_cosine", "circuit_abscosine_qk"),
    *("weight_row_abscosine_qkv", "weight_effective_rank_qkv", "weight_condition_number_qkv"),
)
"""Measures of the table."""
STYLE = (
    "body{font-family:sans-serif;margin:2em auto;max-width:1200px;padding:0 1em}img{max-width:100%}"
    "table{border-collapse:collapse;font-size:85%;display:block;overflow-x:auto}"
    "td,th{border-bottom:1px solid #ccc;padding:.2em .6em;text-align:left}"
)


class Block(NamedTuple):
    """A part of the page: its kind ("title", "heading", "text", "list", "table" or "image") and its content."""

    kind: str
    content: object


def write_page(atlas: Atlas, folder: Path) -> list[str]:
    """Write figures, atlas.md and atlas.html into a folder; the names of all its files."""
    families = [*atlas.families()]
    drawn = []
    for level, columns in FIGURES.items():
        drawn.append(f"atlas_{level}")
        figures.save(draw_level(families, columns), folder / drawn[-1])
    blocks = page(atlas)
    pages = {"atlas.md": as_markdown(blocks), "atlas.html": as_html(blocks, folder)}
    for name, text in pages.items():
        with atomic_write(folder / name) as file:
            file.write(text.encode())
    return [ATLAS, *pages, *(f"{name}.{kind}" for name in drawn for kind in ("png", "pdf"))]


def page(atlas: Atlas) -> list[Block]:
    """The parts of the page, from top to bottom."""
    families = [*atlas.families()]
    trained = [record for record in atlas.models.values() if record["family"]]
    lines = [
        f"{_count(trained, 'model')} of {_count(families, 'family')}, measured on {images_line(atlas.images)}.",
        READ,
    ]
    blocks = [Block("title", "Redundancy of vision transformers"), Block("list", lines)]
    for level in FIGURES:
        blocks += [
            Block("heading", CAPTIONS[level].partition(":")[0]),
            Block("image", (f"atlas_{level}.png", CAPTIONS[level])),
        ]
    blocks += [Block("heading", "Means"), Block("table", summary_table(families))]
    blocks += [Block("heading", "Models and images"), Block("table", models_table(families))]
    if atlas.not_measured:
        earlier = {name: " (its numbers are of an earlier call)" for name in atlas.models}
        lines = [f"{name}: {reason}{earlier.get(name, '')}" for name, reason in atlas.not_measured.items()]
        blocks += [Block("heading", "Not measured"), Block("list", lines)]
    return blocks


def _count(things: Sized, word: str) -> str:
    plural = f"{word.removesuffix('y')}ies" if word.endswith("y") else f"{word}s"
    return f"{len(things)} {word if len(things) == 1 else plural}"


def summary_table(families: list[tuple[str, dict[str, dict]]]) -> dict[str, list[str]]:
    """Means of the measures of all levels, a row for each model and initial weights."""
    rows = [(family, name, record) for family, records in families for name, record in records.items()]
    columns = {"family": [family for family, _, _ in rows], "model": [name for _, name, _ in rows]}
    for key in SUMMARY:
        measure, place = known_measures()[key]
        values = [record["report"]["summary"].get(key) for _, _, record in rows]
        columns[measure.label(place)] = ["-" if value is None else f"{value:.3g}" for value in values]
    return columns


def models_table(families: list[tuple[str, dict[str, dict]]]) -> dict[str, list[str]]:
    """What was measured, and on which images: architecture, weights, preprocessing."""
    rows = {name: record for _, records in families for name, record in records.items()}
    return {
        "model": [*rows],
        "timm name": [record["identity"]["model"]["name"] for record in rows.values()],
        "architecture": [record["architecture"].removeprefix("a ") for record in rows.values()],
        "weights": [_weights(record) for record in rows.values()],
        "preprocessing": [record["preprocessing"].removeprefix("images of ") for record in rows.values()],
        "measured": [f"{record['time'][:10]}, commit {record['versions']['commit']}" for record in rows.values()],
    }


def _weights(record: dict) -> str:
    """Which weights a record is of."""
    on, weights = record["report"]["measured_on"], record["identity"]["weights"]
    kind = ", EMA" if on["weights"] == "EMA" else ""
    return weights + kind + (f", epoch {on['epoch']}" if on["epoch"] is not None else "")


def as_markdown(blocks: list[Block]) -> str:
    """The page as Markdown, with its figures as files beside it."""
    write = {
        "title": lambda text: f"# {text}",
        "heading": lambda text: f"## {text}",
        "list": lambda lines: "\n".join(f"- {line}" for line in lines),
        "table": markdown_table,
        "image": lambda image: f"![{image[1]}]({image[0]})",
    }
    return "\n\n".join(write[kind](content) for kind, content in blocks) + "\n"


def as_html(blocks: list[Block], folder: Path) -> str:
    """The page as one HTML file that contains its figures."""

    def image(content: tuple[str, str]) -> str:
        data = base64.b64encode((folder / content[0]).read_bytes()).decode()
        text = html.escape(content[1])
        return f'<p><img alt="{text}" src="data:image/png;base64,{data}"></p>\n<p>{text}</p>'

    def table(columns: dict[str, list[str]]) -> str:
        rows = [[*columns], *map(list, zip(*columns.values(), strict=True))]
        lines = [_row(row, "td" if number else "th") for number, row in enumerate(rows)]
        return "<table>\n" + "\n".join(lines) + "\n</table>"

    write = {
        "title": lambda text: f"<h1>{html.escape(text)}</h1>",
        "heading": lambda text: f"<h2>{html.escape(text)}</h2>",
        "list": lambda lines: "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>",
        "table": table,
        "image": image,
    }
    body = "\n".join(write[kind](content) for kind, content in blocks)
    head = f'<meta charset="utf-8"><title>{html.escape(blocks[0].content)}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _row(texts: list[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts) + "</tr>"
