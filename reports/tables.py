"""Tables as Markdown and LaTeX, and the tables of analyze.py."""

import re
import statistics
from collections.abc import Callable, Iterable
from itertools import chain

from diversity.function_level import FunctionMeasure, function_summaries
from diversity.measures import Measure, measures_of, summary_measures
from reports.runs import RESULTS, Result

LATEX_SYMBOLS = {
    "±": r"$\pm$",
    "↓": r"$\downarrow$",
    "↑": r"$\uparrow$",
    "|": r"\textbar{}",
    "<": "$<$",
    "≥": r"$\geq$",
}
ONE_COLUMN = 45  # characters of a row that fit into one of the two columns of a page


def markdown(tables: list[dict[str, list[str]]], notes: list[str]) -> str:
    """Markdown tables of texts, and a list of notes."""
    return "\n\n".join([*map(markdown_table, tables), _list(notes)]) + "\n"


def _list(notes: list[str]) -> str:
    return "\n".join(f"- {note}" for note in notes)


def markdown_table(columns: dict[str, list[str]]) -> str:
    """{heading: texts} as a Markdown table with aligned columns."""
    texts = [[text.replace("|", r"\|") for text in (head, *column)] for head, column in columns.items()]
    texts = [[column[0], "-" * max(map(len, column)), *column[1:]] for column in texts]
    texts = [[text.ljust(len(column[1])) for text in column] for column in texts]
    return "\n".join(f"| {' | '.join(row)} |" for row in zip(*texts, strict=True))


def print_rows(heading: str, names: list[str], rows: Iterable[dict], columns: dict[str, tuple[str, Callable]]) -> dict:
    """Print a Markdown table row by row, each as soon as `rows` yields it; returns {name: row}.

    Args:
        heading: of the names.
        rows: {key: value} for each name; a row with an "error" has only that.
        columns: {heading: (key, function that formats its values)}; a missing value, like None, is an empty text.
    """
    widths = [max(map(len, [heading, *names])), *(max(8, len(head)) for head in columns)]

    def print_line(texts: Iterable[str], fill: str = " "):
        cells = (text.ljust(width, fill) for text, width in zip(texts, widths, strict=False))
        print(f"| {' | '.join(cells)} |", flush=True)

    print_line([heading, *columns])
    print_line([""] * len(widths), "-")
    printed = {}
    for name, row in zip(names, rows, strict=True):
        values = ((row.get(key), form) for key, form in columns.values())
        texts = [row["error"]] if "error" in row else ["" if value is None else form(value) for value, form in values]
        print_line([name, *texts])
        printed[name] = row
    return printed


def latex(tables: list[dict[str, list[str]]], notes: list[str]) -> str:
    """Booktabs tables of texts as floats, names in the first column, and the notes in small print below the last one.

    A wide table is a `table*`, which spans both columns of a page, and no table is wider than its place. Numbers are
    aligned on the right; what follows them in parentheses has its own column.
    """
    import pandas as pd

    style = pd.DataFrame({"note": notes}).style.hide(axis="index").hide(axis="columns").format(escape="latex")
    small_print = "{\\footnotesize\n" + style.to_latex(column_format=r"@{}p{\linewidth}@{}") + "}\n"
    blocks = [r"% needs \usepackage{booktabs,adjustbox}"]
    for number, columns in enumerate(tables, 1):
        name, *others = columns
        cells = {name.rpartition(", ")[::2]: columns[name]}  # headings are on two lines
        alignment = "l"
        for head in others:
            values, remarks = zip(*(text.partition(" (")[::2] for text in columns[head]), strict=True)
            cells[head.rpartition(", ")[::2]] = values
            alignment += "r"
            if any(remarks):
                cells["", " " * len(cells)] = [f"({remark}" if remark else "" for remark in remarks]
                alignment += "@{ }l"
        style = pd.DataFrame(cells.values(), pd.MultiIndex.from_tuples(cells)).T.style.hide(axis="index")
        style.format(escape="latex").format(_latex_number, subset=[*cells][1:], escape="latex")
        style.format_index(axis="columns", escape="latex")
        text = style.to_latex(hrules=True, sparse_columns=False, column_format=alignment)
        widest = [max(map(len, [*head.rpartition(", ")[::2], *texts])) for head, texts in columns.items()]
        kind = "table*" if sum(widest) > ONE_COLUMN else "table"
        text = f"\\begin{{adjustbox}}{{max width=\\linewidth}}\n{text}\\end{{adjustbox}}\n"
        text += f"\n{small_print}" if number == len(tables) else ""
        blocks.append(f"\\begin{{{kind}}}[t]\n\\centering\n% \\caption{{}}\n{text}\\end{{{kind}}}")
    return ("\n\n".join(blocks) + "\n").translate(str.maketrans(LATEX_SYMBOLS))


def _latex_number(text: str) -> str:
    """A number with minus signs instead of hyphens, bold where Markdown has it bold."""
    number = "--" if text == "-" else text.replace("-", "$-$")
    return re.sub(r"\*\*(.+)\*\*", r"\\textbf{\1}", number)


def known_measures() -> dict[str, tuple[Measure | FunctionMeasure | Result, str]]:
    """{name in a report's summary or in log.txt: its measure, and the layers, matrices or parts it is of}."""
    return summary_measures() | function_summaries() | {name: (result, "") for name, result in RESULTS.items()}


def comparison(configurations: dict[str, list[dict]], notes: list[str]) -> str:
    """The Markdown of analyze.py: summaries with the differences from the first configuration; notes; layers, matrices.

    Numbers are means over the reports of a configuration's runs, and standard deviations of a sample.
    """
    first_name, *_ = configurations
    summaries = {name: [{*report["summary"]} for report in reports] for name, reports in configurations.items()}
    in_all = set.intersection(*chain(*summaries.values()))
    in_some = set.union(*chain(*summaries.values())) - in_all
    known = {name: entry for name, entry in known_measures().items() if name in in_all}
    columns, baseline = {"measure": [measure.label(place) for measure, place in known.values()]}, None
    for name, reports in configurations.items():
        values = [[report["summary"][key] for report in reports] for key in known]
        means = [statistics.fmean(of_runs) for of_runs in values]
        columns[f"{name}, n = {len(reports)}"] = [
            f"{mean:.4g}" + (f" ± {statistics.stdev(of_runs):.2g}" if len(reports) > 1 else "")
            for mean, of_runs in zip(means, values, strict=True)
        ]
        if baseline:
            differences = [f"{mean - base:+.4g}" for mean, base in zip(means, baseline, strict=True)]
            columns[f"{name} - {first_name}"] = differences
        baseline = baseline or means
    left_out = [measure.label(place) for name, (measure, place) in known_measures().items() if name in in_some]
    if left_out:
        lacking = [name for name, of_runs in summaries.items() if in_some - set.intersection(*of_runs)]
        notes = [*notes, f"not measured in {', '.join(lacking)}, and so not in the table: {'; '.join(left_out)}"]
    blocks = [markdown_table(columns), _list(notes)]
    for name, reports in configurations.items():
        runs = f", mean of {len(reports)} runs" if len(reports) > 1 else ""
        blocks += [f"{name}, {reports[0]['images']} images{runs}: tokens by layer", markdown_table(_by_layer(reports))]
        blocks += [f"{name}{runs}: attention and MLPs by block", markdown_table(_by_block(reports))]
        for level, heading in (("weight", "weights by block and matrix"), ("circuit", "circuits of heads by block")):
            if reports[0][level]:
                blocks += [f"{name}{runs}: {heading}", markdown_table(_by_matrix(reports, level))]
    return "\n\n".join(blocks) + "\n"


def _by_layer(reports: list[dict]) -> dict[str, list[str]]:
    layers = range(len(reports[0]["variance"]))
    columns = {"layer": [str(layer) for layer in layers], "block before": ["-", *map(str, layers[:-1])]}
    return columns | _columns(reports, "embedding")


def _by_block(reports: list[dict]) -> dict[str, list[str]]:
    blocks = range(len(reports[0]["variance"]) - 1)
    return {"block": [*map(str, blocks)]} | _columns(reports, "attention") | _columns(reports, "mlp")


def _columns(reports: list[dict], level: str) -> dict[str, list[str]]:
    """{heading: texts} of the measures of a level over layers or blocks."""
    measures = [measure for key, measure in measures_of(level).items() if key in reports[0][level]]
    values = [zip(*(report[level][measure.key] for report in reports), strict=True) for measure in measures]
    return {measure.label(): [*map(_mean, of_runs)] for measure, of_runs in zip(measures, values, strict=True)}


def _by_matrix(reports: list[dict], level: str) -> dict[str, list[str]]:
    """The measures of weights by block and matrix, or of circuits by block and kind."""
    names = reports[0][level]
    depth = len(reports[0]["variance"]) - 1
    keys = [key for key in measures_of(level) if any(key in of_name for of_name in names.values())]
    rows = [(i, name) for i in range(depth) for name, of_name in names.items() if i < len(of_name[keys[0]])]
    kind = "matrix" if level == "weight" else level
    columns = {"block": [str(i) for i, _ in rows], kind: [name for _, name in rows]}
    for key in keys:
        texts = [_mean([report[level][name][key][i] for report in reports]) for i, name in rows]
        columns[measures_of(level)[key].label()] = texts
    return columns


def _mean(values: Iterable[float | None]) -> str:
    values = [*values]
    return "-" if None in values else f"{statistics.fmean(values):.4g}"
