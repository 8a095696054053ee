"""The figures of redundancy: what is drawn, read back from the axes."""

import dataclasses
import itertools

import numpy as np
import pytest
from made_reports import CIRCUITS, MATRICES, make_report

from diversity import MEASURES
from diversity.measures import measures_of
from reports.map_figures import layer_similarity
from reports.redundancy_figures import (
    circuits,
    redundancy_depth,
    variance,
    weight_depth,
    weight_spectra,
)

SWIN = [0, 2, 4, 10]


def curves_of(axis):
    """{label: (x, y)} of an axis' curves."""
    lines = [line for line in axis.lines if not line.get_label().startswith("_")]
    return {line.get_label(): (line.get_xdata(), line.get_ydata()) for line in lines}


def band_of(collection):
    """{x: (lowest, highest)} of a band."""
    points = np.concatenate([path.vertices for path in collection.get_paths()])
    return {x: (points[points[:, 0] == x, 1].min(), points[points[:, 0] == x, 1].max()) for x in set(points[:, 0])}


def borders_of(axis):
    """x of the vertical lines over the full height."""
    return [line.get_xdata()[0] for line in axis.lines if list(line.get_ydata()) == [0, 1]]


def depth_panels(figure):
    """{(level, key): axis} of `redundancy_depth`, in the order in which they are drawn."""
    places = [(level, key) for level in ("embedding", "attention", "mlp") for key in measures_of(level)]
    return dict(zip(places, figure.axes, strict=True))


def weight_panels(figure):
    """{(key, matrix): axis} of `weight_depth`, by place."""
    places = [(key, matrix) for key in measures_of("weight") for matrix in MATRICES]
    return dict(zip(places, figure.axes, strict=True))


def title_of(measure):
    """Its heading and arrow as a title or label shows them, on one line."""
    label = measure.label()
    return label[0].upper() + label[1:]


def on_one_line(text):
    return " ".join(text.split())


@pytest.fixture
def more_measures(monkeypatch):
    """Three further measures of embeddings, two of attention, and one of weights with geometric means."""
    registry = dict(MEASURES)
    for level, count in {"embedding": 3, "attention": 2, "weight": 1}.items():
        for i in range(count):
            name = f"{level}_new_{i}"
            new = {"name": name, "heading": f"new measure {i}", "unit": "unit", "geometric": level == "weight"}
            registry[name] = dataclasses.replace(MEASURES["token_cosine"], level=level, **new)
    monkeypatch.setattr("diversity.measures.registry.MEASURES", registry)


def assert_apart(figure):
    """No panel's axis overlaps another's or the legend, and everything lies within the figure."""
    figure.canvas.draw()
    (legend,) = figure.legends
    boxes = [axis.get_window_extent() for axis in figure.axes] + [legend.get_window_extent()]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    page = figure.bbox
    for box in [*(axis.get_tightbbox() for axis in figure.axes), legend.get_window_extent()]:
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1


def test_every_measure_has_a_panel_however_many_there_are(more_measures):
    configurations = {"plain": [make_report(0)], "all": [make_report(1)]}
    panels = depth_panels(figure := redundancy_depth(configurations))
    assert_apart(figure)
    for (level, key), axis in panels.items():
        assert on_one_line(axis.get_title()) == title_of(measures_of(level)[key])
        scale = " (log scale)" if measures_of(level)[key].geometric else ""
        assert axis.get_ylabel() == measures_of(level)[key].unit + scale
        np.testing.assert_allclose(curves_of(axis)["all"][1], configurations["all"][0][level][key])
    below = {level: {panels[level, key].get_subplotspec().rowspan.start for key in measures_of(level)}
             for level in ("embedding", "attention", "mlp")}  # fmt: skip
    assert max(below["embedding"]) < min(below["attention"]) and max(below["attention"]) <= min(below["mlp"])
    weights = weight_panels(figure := weight_depth(configurations))
    assert_apart(figure)
    axis = weights["new_0", "q"]
    assert on_one_line(axis.get_ylabel()).startswith("New measure 0 ↓") and axis.get_yscale() == "log"


def test_depth_curves_are_means_over_runs_with_their_range():
    configurations = {"plain": [make_report(0)], "all": [make_report(1), make_report(2), make_report(3)]}
    for (level, measure), axis in depth_panels(redundancy_depth(configurations)).items():
        drawn = curves_of(axis)
        assert list(drawn) == ["plain", "all (mean and range of 3 runs)"]
        runs = np.array([report[level][measure] for report in configurations["all"]])
        x, y = drawn["all (mean and range of 3 runs)"]
        assert list(x) == list(range(5 if level == "embedding" else 4))
        is_log = measures_of(level)[measure].geometric
        np.testing.assert_allclose(y, np.exp(np.log(runs).mean(axis=0)) if is_log else runs.mean(axis=0))
        np.testing.assert_allclose(drawn["plain"][1], configurations["plain"][0][level][measure])
        (band,) = axis.collections  # none for a single run
        bounds = band_of(band)
        np.testing.assert_allclose([bounds[i] for i in x], np.stack([runs.min(axis=0), runs.max(axis=0)], axis=1))
        assert axis.get_title() and axis.get_ylabel()
        assert axis.get_xlabel().split()[0] == ("layer" if level == "embedding" else "block")


def test_a_missing_value_breaks_the_curve_and_an_empty_panel_says_so():
    reports = [make_report(seed) for seed in range(2)]
    for report in reports:
        report["attention"]["previous_cosine"][0] = None
        report["attention"]["head_cosine"] = [None] * 4
    reports[1]["embedding"]["token_cosine"][2] = None
    panels = depth_panels(redundancy_depth({"all": reports}))
    label = "all (mean and range of 2 runs)"
    assert list(np.isnan(curves_of(panels["attention", "previous_cosine"])[label][1])) == [True, False, False, False]
    assert (
        list(np.isnan(curves_of(panels["embedding", "token_cosine"])[label][1])) == [False] * 2 + [True] + [False] * 2
    )
    notes = {place: [text.get_text() for text in axis.texts] for place, axis in panels.items()}
    assert notes.pop(("attention", "head_cosine")) == ["nothing to compare"]
    assert not any(notes.values())


@pytest.mark.parametrize(("stages", "note"), [(SWIN, "grey lines: stages"), ([0], "")])
def test_lines_separate_the_stages(stages, note):
    configurations = {"plain": [make_report(0, stages, depth=12)]}
    depth, weights = redundancy_depth(configurations), weight_depth(configurations)
    for (level, _), axis in depth_panels(depth).items():
        between = [first + 0.5 if level == "embedding" else first - 0.5 for first in stages[1:]]
        assert borders_of(axis) == between
    assert all(borders_of(axis) == [first - 0.5 for first in stages[1:]] for axis in weights.axes)
    assert depth.legends[0].get_title().get_text() == note
    assert weights.legends[0].get_title().get_text() == note


def test_weights_are_drawn_for_each_matrix():
    configurations = {"plain": [make_report(0), make_report(1)], "all": [make_report(2)]}
    figure = weight_depth(configurations)
    for (measure, matrix), axis in weight_panels(figure).items():
        x, y = curves_of(axis)["plain (mean and range of 2 runs)"]
        runs = np.array([report["weight"][matrix][measure] for report in configurations["plain"]])
        logarithmic = measure == "condition_number"
        np.testing.assert_allclose(y, np.sqrt(runs.prod(axis=0)) if logarithmic else runs.mean(axis=0))
        assert list(x) == [0, 1, 2, 3] and axis.get_yscale() == ("log" if logarithmic else "linear")
        assert (axis.get_title() == matrix) is (measure == "effective_rank")
        assert bool(axis.get_ylabel()) is (matrix == "q")
        left = figure.axes[list(measures_of("weight")).index(measure) * 6]
        assert axis.get_ylim() == left.get_ylim()
    assert "degrees" in figure.axes[-6].get_ylabel() and figure.axes[-6].get_xlabel() == "block"


def test_a_matrix_that_the_model_lacks_has_no_column():
    report = make_report(0)
    for key in ("weight", "spectra"):
        report[key] = {"proj": report[key]["proj"]}
    assert len(weight_depth({"plain": [report]}).axes) == len(measures_of("weight"))
    assert len(weight_spectra({"plain": [report]}).axes) == 1


def relative_spectra(reports, matrix, first_block=0):
    """[blocks of all runs, width] singular values over the largest of their block."""
    rows = [values for report in reports for values in report["spectra"][matrix][first_block:]]
    return np.array([np.array(values) / values[0] for values in rows])


def test_spectra_are_geometric_means_over_blocks_and_runs():
    reports = [make_report(0), make_report(1)]
    figure = weight_spectra({"plain": reports})
    assert [axis.get_title() for axis in figure.axes] == MATRICES  # a single row
    for axis, matrix in zip(figure.axes, MATRICES, strict=True):
        rows = relative_spectra(reports, matrix)
        ((x, y),) = curves_of(axis).values()
        assert list(x) == [1, 2, 3, 4, 5, 6]
        np.testing.assert_allclose(y, rows.prod(axis=0) ** (1 / 8))
        bounds = band_of(axis.collections[0])
        np.testing.assert_allclose([bounds[i] for i in x], np.stack([rows.min(axis=0), rows.max(axis=0)], axis=1))


def test_a_second_row_compares_spectra_with_the_first_configuration():
    configurations = {"plain": [make_report(0)], "all": [make_report(1)], "half": [make_report(2), make_report(3)]}
    figure = weight_spectra(configurations)
    assert len(figure.axes) == 12 and "plain" in figure.axes[6].get_ylabel()
    for above, below in zip(figure.axes[:6], figure.axes[6:], strict=True):
        spectra = [y for _, y in curves_of(above).values()]
        ratios = [line.get_ydata() for line in below.lines]
        assert list(ratios[0]) == [1] * 6
        np.testing.assert_allclose(ratios, np.array(spectra) / spectra[0])
        assert [line.get_color() for line in below.lines] == [line.get_color() for line in above.lines]


@pytest.mark.parametrize(("smallest", "scale"), [(1, "linear"), (0.11, "linear"), (0.09, "log")])
def test_ratios_of_spectra_far_from_one_are_drawn_on_a_log_axis(smallest, scale):
    ours, theirs = make_report(0), make_report(0)
    theirs["spectra"]["q"] = [[*values[:-1], values[-1] * smallest] for values in ours["spectra"]["q"]]
    figure = weight_spectra({"plain": [ours], "all": [theirs]})
    assert figure.axes[6].get_yscale() == scale and f"{scale} scale" in figure.axes[6].get_ylabel()


def test_spectra_of_a_swin_are_those_of_the_last_stage():
    reports = [make_report(0, SWIN, depth=12), make_report(1, SWIN, depth=12)]
    figure = weight_spectra({"plain": reports})
    assert "last stage" in figure.get_suptitle()
    assert "stage" not in weight_spectra({"plain": [make_report(0)]}).get_suptitle()
    ((_, y),) = curves_of(figure.axes[3]).values()
    np.testing.assert_allclose(y, relative_spectra(reports, "proj", 10).prod(axis=0) ** (1 / 4))
    assert len(y) == 6 * 8


def test_circuits_are_drawn_with_their_spectra():
    configurations = {"plain": [make_report(0)], "all": [make_report(1), make_report(2)]}
    figure = circuits(configurations)
    assert_apart(figure)
    rows = np.array(figure.axes).reshape(-1, 2)
    assert [axis.get_title() for axis in rows[0]] == ["QK circuits", "OV circuits"]
    for column, name in zip(rows.T, CIRCUITS, strict=True):
        for axis, key in zip(column, measures_of("circuit"), strict=False):
            runs = np.array([report["circuit"][name][key] for report in configurations["all"]])
            np.testing.assert_allclose(curves_of(axis)["all (mean and range of 2 runs)"][1], runs.mean(axis=0))
        x, y = curves_of(column[-1])["plain"]
        np.testing.assert_allclose(y, np.mean(configurations["plain"][0]["circuit_spectra"][name], axis=0))
        assert list(x) == [1, 2, 3]
    assert all(axis.get_ylabel() for axis in rows[:, 0])


@pytest.mark.parametrize("first", [True, False])
def test_a_configuration_without_circuits_is_left_out_of_their_figure(first):
    without = {"differential": [make_report(3) | {"circuit": {}, "circuit_spectra": {}}]}
    having = {"plain": [make_report(0)], "all": [make_report(1)]}
    configurations = without | having if first else having | without
    styles = [{"color": f"C{i}"} for i in range(3)]
    figure = circuits(configurations, styles)
    for axis in figure.axes:
        assert [line.get_label() for line in axis.lines if not line.get_label().startswith("_")] == ["plain", "all"]
        assert [line.get_color() for line in axis.lines[:2]] == (["C1", "C2"] if first else ["C0", "C1"])


def test_similarity_of_layers_is_a_map_for_each_configuration():
    configurations = {"plain": [make_report(0)], "all": [make_report(1), make_report(2)]}
    figure = layer_similarity(configurations)
    *maps, bar = figure.axes
    assert [axis.get_title() for axis in maps] == ["plain", "all (mean of 2 runs)"] and "CKA" in bar.get_ylabel()
    for axis, reports in zip(maps, configurations.values(), strict=True):
        (image,) = axis.images
        np.testing.assert_allclose(image.get_array(), np.mean([report["cka"] for report in reports], axis=0))
        assert image.get_clim() == (0, 1)


def test_variance_adds_up_shares_in_the_first_middle_and_last_layer():
    reports = [make_report(0, SWIN, depth=12), make_report(1, SWIN, depth=12)]
    figure = variance({"plain": reports})
    titles = ["layer 0, input of block 0", "layer 6, output of block 5", "layer 12, output of block 11"]
    assert [axis.get_title() for axis in figure.axes] == titles
    for axis, layer in zip(figure.axes, (0, 6, 12), strict=True):
        shares = 100 * np.mean([np.cumsum(report["variance"][layer]) for report in reports], axis=0)
        x, y = curves_of(axis)["plain (mean and range of 2 runs)"]
        np.testing.assert_allclose(y, shares)
        assert list(x) == list(range(1, len(shares) + 1)) and len(axis.collections) == 1
        assert [text.get_text() for text in axis.texts] == ["90 %"]
        assert [90, 90] in [list(line.get_ydata()) for line in axis.lines]
    assert "percent" in figure.axes[0].get_ylabel()


@pytest.mark.parametrize("draw", [redundancy_depth, weight_depth, weight_spectra, variance, circuits])
def test_a_legend_lies_within_the_figure(draw):
    names = [f"_a configuration with quite a long name, such as --emb_contrast_cross_coef 0.{i}" for i in range(7)]
    figure = draw({name: [make_report(2 * i), make_report(2 * i + 1)] for i, name in enumerate(names)})
    figure.canvas.draw()
    (legend,) = figure.legends
    assert [" ".join(text.get_text().split()) for text in legend.texts] == [
        f"{name} (mean and range of 2 runs)" for name in names
    ]
    box, page = legend.get_window_extent(), figure.bbox
    assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
