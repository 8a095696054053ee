"""Tables as text, and the names of the measures of redundancy in them."""

import re
import statistics
from collections.abc import Iterable

NAMES = {
    "embedding": {
        "token_cosine": "token cosine ↓",
        "token_abscosine": "absolute token cosine ↓",
        "first_cosine": "cosine to the first embedding ↓",
        "effective_rank": "effective rank ↑",
        "components_90": "components of 90 % of the variance ↑",
    },
    "attention": {
        "head_cosine": "head cosine ↓",
        "row_std": "standard deviation of a row",
        "row_entropy": "entropy of a row in nats",
        "previous_cosine": "cosine to the block before ↓",
    },
    "weight": {
        "effective_rank": "effective rank of weights ↑",
        "condition_number": "condition number ↓",
        "row_abscosine": "absolute row cosine ↓",
        "smallest_angle": "smallest angle of rows in degrees ↑",
    },
}  # the arrow points to more diversity
PLACES = {
    "embedding": {"": "all layers", "_last": "last layer"},
    "attention": {"": "all blocks", "_first": "first block"},
    "weight": {"": "all matrices", "_qkv": "q k v"},
}
HEADINGS = {
    f"{level}_{measure}{suffix}": re.sub("( [↓↑])?$", rf", {place}\1", text, count=1)
    for level, measures in NAMES.items()
    for measure, text in measures.items()
    for suffix, place in PLACES[level].items()
}
"""{measure of a report's summary: its words}; the arrow points to less redundancy, there is none for neither."""


def markdown(tables: list[dict[str, list[str]]], notes: list[str]) -> str:
    """Markdown tables of texts, and a list of notes."""
    return "\n\n".join([*map(markdown_table, tables), "\n".join(f"- {note}" for note in notes)]) + "\n"


def markdown_table(columns: dict[str, list[str]]) -> str:
    """{heading: texts} as a Markdown table whose columns line up."""
    texts = [[text.replace("|", r"\|") for text in (head, *cells)] for head, cells in columns.items()]
    texts = [[column[0], "-" * max(map(len, column)), *column[1:]] for column in texts]
    texts = [[text.ljust(len(column[1])) for text in column] for column in texts]
    return "\n".join(f"| {' | '.join(row)} |" for row in zip(*texts, strict=True))


def comparison(cells: dict[str, list[dict]]) -> str:
    """Markdown of analyze.py: summaries with the differences from the first cell; each cell by layer and by matrix.

    Args:
        cells: {name: the reports of its runs}; numbers are means over them, and standard deviations of a sample.
    """
    there = next(iter(cells.values()))[0]["summary"]
    measures = [name for name in HEADINGS if name in there]
    columns, baseline = {"measure": [HEADINGS[name] for name in measures]}, None
    for cell, reports in cells.items():
        values = [[report["summary"][name] for report in reports] for name in measures]
        means = [statistics.fmean(of_runs) for of_runs in values]
        columns[f"{cell}, n = {len(reports)}"] = [
            f"{mean:.4g}" + (f" ± {statistics.stdev(of_runs):.2g}" if len(reports) > 1 else "")
            for mean, of_runs in zip(means, values, strict=True)
        ]
        if baseline:
            differences = [f"{mean - base:+.4g}" for mean, base in zip(means, baseline, strict=True)]
            columns[f"{cell} - {next(iter(cells))}"] = differences
        baseline = baseline or means
    parts = [markdown_table(columns)]
    for cell, reports in cells.items():
        images, runs = reports[0]["images"], f", mean of {len(reports)} runs" if len(reports) > 1 else ""
        layers = range(len(reports[0]["variance"]))
        by_layer = {"layer": [str(layer) for layer in layers], "block before": ["-", *map(str, layers[:-1])]}
        for level in ("embedding", "attention"):
            before = [] if level == "embedding" else ["-"]
            for measure, words in NAMES[level].items():
                of_runs = zip(*(report[level][measure] for report in reports), strict=True)
                by_layer[words] = [*before, *map(_mean, of_runs)]
        matrices = reports[0]["weight"]
        rows = [(i, name) for i in layers[:-1] for name in matrices if i < len(matrices[name]["effective_rank"])]
        by_matrix = {"block": [str(i) for i, _ in rows], "matrix": [name for _, name in rows]}
        for measure, words in NAMES["weight"].items():
            by_matrix[words] = [_mean([report["weight"][name][measure][i] for report in reports]) for i, name in rows]
        parts += [f"{cell}, {images} images{runs}: tokens by layer, attention by block", markdown_table(by_layer)]
        parts += [f"{cell}{runs}: weights by block and matrix", markdown_table(by_matrix)]
    return "\n\n".join(parts) + "\n"


def _mean(values: Iterable[float | None]) -> str:
    values = [*values]
    return "-" if None in values else f"{statistics.fmean(values):.4g}"


def latex(tables: list[dict[str, list[str]]], notes: list[str]) -> str:
    """Booktabs tables of texts, names in the first column, no wider than a line, and the notes in small print."""
    parts = [r"% needs \usepackage{booktabs,adjustbox}"]
    for columns in tables:
        heads = zip(*(head.rpartition(", ")[::2] for head in columns), strict=True)  # on two lines
        rows = zip(*columns.values(), strict=True)
        lines = [
            r"\begin{adjustbox}{max width=\linewidth}",
            rf"\begin{{tabular}}{{{'l' * len(columns)}}}",
            r"\toprule",
            *(rf"{' & '.join(map(_latex, head))} \\" for head in heads),
            r"\midrule",
            *(rf"{' & '.join([_latex(name), *map(_latex_number, cells)])} \\" for name, *cells in rows),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{adjustbox}",
        ]
        parts += ["\n".join(lines)]
    parts += ["\n".join(rf"\par{{\footnotesize {_latex(note)}\par}}" for note in notes)]
    return "\n\n".join(parts) + "\n"


def _latex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "|": r"\textbar{}"}
    special |= {"±": r"$\pm$", "↓": r"$\downarrow$", "↑": r"$\uparrow$"}
    return text.translate(str.maketrans(special | {char: f"\\{char}" for char in "&%$#_{}"}))


def _latex_number(text: str) -> str:
    number = "--" if text == "-" else _latex(text).replace("-", "$-$")
    return re.sub(r"\*\*(.+)\*\*", r"\\textbf{\1}", number)
