"""The figure of function-level measures: what is drawn, read back from the axes."""

import itertools

import numpy as np
import pytest
from made_reports import make_function

from diversity.function_level import FUNCTION_MEASURES
from reports.function_figures import BARS, CURVES, function_level


def panels_of(figure):
    """{(measure, key): axis}, and the axis of the bars."""
    *curves, bars = figure.axes
    return dict(zip(CURVES, curves, strict=True)), bars


def test_curves_are_means_over_runs_with_their_range():
    configurations = {"plain": [make_function(0)], "all": [make_function(1), make_function(2)]}
    panels, _ = panels_of(figure := function_level(configurations))
    for (measure, key), axis in panels.items():
        assert axis.get_title() and axis.get_xlabel()
        plain, several = axis.lines
        runs = np.array([report["function"][measure][key] for report in configurations["all"]], dtype=float)
        np.testing.assert_allclose(several.get_ydata(), runs.mean(axis=0))
        np.testing.assert_allclose(plain.get_ydata(), np.array(make_function(0)["function"][measure][key], dtype=float))
        assert plain.get_xdata()[-1] == {"heads": 1, "tokens": 0.9, "blocks": 3}.get(measure, 4)
        assert len(axis.collections) == 1 and axis.get_ylim()[0] == 0
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.texts] == ["plain", "all (mean and range of 2 runs)"]
    assert [line.get_color() for line in legend.get_lines()] == [line.get_color() for line in axis.lines]


def test_bars_are_the_patch_probe_and_lines_its_baselines():
    configurations = {"plain": [make_function(0)], "all": [make_function(1), make_function(2)]}
    _, bars = panels_of(function_level(configurations))
    heights = [bar.get_height() for bar in bars.patches]
    values = {name: [r["function"]["patch_probe"] for r in reports] for name, reports in configurations.items()}
    expected = [np.mean([value[key] for value in of_runs]) for of_runs in values.values() for key in BARS]
    np.testing.assert_allclose(heights, expected)
    levels = [line.get_ydata()[0] for line in bars.lines if list(line.get_xdata()) == [0, 1]]
    assert levels == [80, 12]
    assert [text.get_text().replace("\n", " ") for text in bars.texts] == ["label of most patches", "chance"]


def test_what_a_model_lacks_is_left_out():
    one, other = make_function(0), make_function(1)
    for name in ("tokens", "patch_probe"):
        one["function"][name] = other["function"][name] = None
    one["function"]["heads"] = None
    panels, bars = panels_of(function_level({"a": [one], "b": [other]}))
    assert [len(panels["heads", "random"].lines), len(panels["tokens", "random"].lines)] == [1, 0]
    assert [text.get_text() for text in panels["tokens", "random"].texts] == ["does not apply"]
    assert [text.get_text() for text in bars.texts] == ["does not apply"] and not bars.patches
    other["function"]["patch_probe"] = make_function(2)["function"]["patch_probe"] | {"head": None}
    _, bars = panels_of(function_level({"a": [one], "b": [other]}))
    assert len(bars.patches) == len(BARS) - 1


def test_measures_that_were_not_chosen_have_no_panel():
    reports = [make_function(0), make_function(1)]
    for report in reports:
        report["function"] = {name: report["function"][name] for name in ("knn", "patch_probe")}
    figure = function_level({"a": reports[:1], "b": reports[1:]})
    curve, bars = figure.axes
    assert curve.get_title().startswith("k-NN") and len(curve.lines) == 2 and len(bars.patches) == 2 * len(BARS)
    for report in reports:
        report["function"] = {"accuracy": 50.0}
    (empty,) = function_level({"a": reports}).axes
    assert [text.get_text() for text in empty.texts] == ["does not apply"]


@pytest.mark.parametrize("count", [1, 9])
def test_everything_lies_within_the_figure_and_apart(count):
    names = [f"a configuration with quite a long name, such as --emb_contrast_cross_coef 0.{i}" for i in range(count)]
    figure = function_level({name: [make_function(2 * i), make_function(2 * i + 1)] for i, name in enumerate(names)})
    figure.canvas.draw()
    (legend,) = figure.legends
    boxes = [axis.get_window_extent() for axis in figure.axes] + [legend.get_window_extent()]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    for box in [*(axis.get_tightbbox() for axis in figure.axes), legend.get_window_extent()]:
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1


def test_every_measure_with_a_curve_has_a_panel():
    drawn = {measure for measure, _ in CURVES} | {"patch_probe", "accuracy"}  # accuracy: where the curves begin
    assert drawn == {*FUNCTION_MEASURES}
