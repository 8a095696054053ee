"""The figures of an atlas have the numbers of the reports, at the relative depth, in lines that can be told apart."""

import itertools
import math

import numpy as np
import pytest
from made_reports import make_report
from matplotlib import pyplot as plt

from reports.atlas_figures import FIGURES, draw_level
from reports.atlas_records import Atlas

DEPTHS = {"a": 4, "b": 4, "other": 6}


@pytest.fixture(scope="module")
def families():
    """Family A with the models a and b of one architecture, family B with one of another depth."""
    models = {}
    for number, (name, depth) in enumerate(DEPTHS.items()):
        initial = f"initial {depth}"
        family = "A" if name in "ab" else "B"
        models[name] = {"family": family, "random": initial, "report": make_report(number, depth=depth)}
        models.setdefault(initial, {"family": None, "random": initial, "report": make_report(number + 10, depth=depth)})
    return [*Atlas(models=models).families()]


@pytest.fixture(scope="module")
def drawn(families):
    """{name of the figure: its axes [family, column]}."""
    figures = {name: draw_level(families, columns) for name, columns in FIGURES.items()}
    yield {
        name: np.array(figure.axes).reshape(len(families), len(FIGURES[name]) + 1) for name, figure in figures.items()
    }
    plt.close("all")


def curves(axis):
    """{label: its points}."""
    return {line.get_label(): line.get_xydata() for line in axis.lines}


def test_curves_of_tokens_and_heads_are_the_reports_at_their_relative_depth(families, drawn):
    for level, key, column, first in (("embedding", "token_cosine", 0, 0), ("attention", "head_cosine", 0, 1)):
        axes = drawn["tokens" if level == "embedding" else "heads"]
        for (_, records), line in zip(families, axes, strict=True):
            points = curves(line[column])
            assert [*points] == [*records]
            for name, record in records.items():
                values, depth = record["report"][level][key], len(record["report"]["variance"]) - 1
                expected = [[(i + first) / depth, value] for i, value in enumerate(values)]
                assert points[name].tolist() == expected


def test_curves_of_weights_are_means_of_q_k_v(families, drawn):
    for (_, records), (cosine, effective, _, condition, _) in zip(families, drawn["weights"], strict=True):
        for name, record in records.items():
            report = record["report"]
            of = {key: [report["weight"][m][key] for m in "qkv"] for key in report["weight"]["q"]}
            means = [sum(values) / 3 for values in zip(*of["row_abscosine"], strict=True)]
            assert curves(cosine)[name][:, 1] == pytest.approx(means)
            means = [sum(values) / 3 / 6 for values in zip(*of["effective_rank"], strict=True)]  # 6 wide
            assert curves(effective)[name][:, 1] == pytest.approx(means)
            products = [math.prod(values) ** (1 / 3) for values in zip(*of["condition_number"], strict=True)]
            assert curves(condition)[name][:, 1] == pytest.approx(products)
        assert (cosine.get_yscale(), condition.get_yscale()) == ("linear", "log")


def test_initial_weights_are_dashed_in_the_colour_of_their_first_model(drawn):
    lines = {line.get_label(): line for line in drawn["tokens"][0, 0].lines}
    assert {name: line.get_linestyle() for name, line in lines.items()} == {"a": "-", "initial 4": "--", "b": "-"}
    colours = {name: line.get_color() for name, line in lines.items()}
    assert colours["a"] == colours["initial 4"] != colours["b"]


def test_the_legend_names_whose_initial_weights_they_are(drawn):
    first, second = ([text.get_text() for text in line[-1].get_legend().texts] for line in drawn["tokens"])
    assert first == ["a", "their initial weights", "b"] and second == ["other", "its initial weights"]


def test_families_have_one_scale_and_the_texts_fit_in(families, drawn):
    for axes in drawn.values():
        for column in axes.T[:-1]:
            assert column[0].get_ylim() == column[1].get_ylim()
    many = [(f"A family of number {i}", records) for i, (_, records) in enumerate(families * 2)]
    figure = draw_level(many, FIGURES["heads"])
    figure.canvas.draw()
    width, height = figure.canvas.get_width_height()
    for axis in figure.axes:
        box = axis.get_tightbbox()
        assert box is None or (box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height)
    legends = [axis.get_legend().get_window_extent() for axis in figure.axes if axis.get_legend()]
    assert len(legends) == 4 and all(above.y0 >= below.y1 for above, below in itertools.pairwise(legends))


def test_a_measure_that_a_model_lacks_is_no_curve():
    report = make_report(0)
    report["attention"], report["weight"] = {}, {"q": {"row_abscosine": [None] * 4}}
    families = [("A", {"a": {"family": "A", "random": None, "report": report}})]
    for level, texts in (("heads", [True, True, True, False]), ("weights", [True, True, True, True])):
        figure = draw_level(families, FIGURES[level])
        shown = [[text.get_text() for text in axis.texts] for axis in figure.axes[:-1]]
        assert ["not measured" in of_axis for of_axis in shown] == texts
        plt.close(figure)


def test_a_value_without_a_neighbour_is_a_point(families):
    """The maps of a Swin can be compared with those of the block before only where windows are the same."""
    report = make_report(0)
    report["attention"]["head_cosine"] = [0.5, None, 0.25, 0.75]
    of_run = {"family": "A", "random": "initial", "report": report}
    figure = draw_level([("A", {"a": of_run, "initial": of_run | {"family": None}})], FIGURES["heads"])
    trained, initial = figure.axes[0].lines
    assert trained.get_marker() == "o" and trained.get_markevery() is None
    assert (initial.get_linestyle(), initial.get_marker(), initial.get_markevery()) == ("--", "o", [0])
    assert figure.axes[1].lines[1].get_markevery() == []
    plt.close(figure)
