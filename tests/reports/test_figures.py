"""The figures of attention maps and of a run's training curves: what is drawn, read back from the axes."""

import itertools
import json

import numpy as np
import pytest
from matplotlib import pyplot as plt

from reports import figures
from reports.map_figures import attention_heads


def make_maps(heads, tokens):
    maps = np.random.default_rng(0).random((heads, tokens, tokens))
    return maps / maps.sum(axis=-1, keepdims=True)


def panels_of(figure):
    """{title: (picture, axis)} of what is shown, with the title's number where it occurs more than once."""
    shown = [axis for axis in figure.axes if axis.images and axis.get_title()]
    titles = [axis.get_title() for axis in shown]
    numbered = [f"{title} {titles[:i].count(title)}" if titles.count(title) > 1 else title for i, title in
                enumerate(titles)]  # fmt: skip
    return {title: (np.asarray(axis.images[0].get_array()), axis) for title, axis in zip(numbered, shown, strict=True)}


def colour_bars(figure):
    return [axis for axis in figure.axes if axis.get_label() == "<colorbar>"]


def test_heads_are_shown_with_what_the_first_token_sees():
    maps, picture = make_maps(3, 14), np.random.default_rng(1).random((32, 32, 3))
    figure = attention_heads(maps, picture, ["class token", "distillation token"], (3, 4), "block 5")
    panels = panels_of(figure)
    assert list(panels) == [
        "image",
        *(f"head {i}" for i in range(3)),
        *(f"row of the class token {i}" for i in range(3)),
    ]
    np.testing.assert_array_equal(panels["image"][0], picture)
    for head in range(3):
        np.testing.assert_array_equal(panels[f"head {head}"][0], maps[head])
        np.testing.assert_array_equal(panels[f"row of the class token {head}"][0], maps[head, 0, 2:].reshape(3, 4))
    first = panels["head 0"][1]
    assert "0: class token" in first.get_ylabel() and first.get_xlabel() == "attended token (key)"
    assert 0 in first.get_xticks() and 0 in first.get_yticks()
    assert figure.get_suptitle() == "block 5"


def test_the_colours_of_a_row_are_of_one_scale_and_follow_the_square_root():
    maps = make_maps(3, 13)
    maps[1] *= 0.5
    panels = panels_of(figure := attention_heads(maps, None, ["class token"], (3, 4), ""))
    for kind, greatest in (("head", maps.max()), ("row of the class token", maps[:, 0, 1:].max())):
        norms = [panels[f"{kind} {head}"][1].images[0].norm for head in range(3)]
        assert [(norm.vmin, norm.vmax) for norm in norms] == [(0, greatest)] * 3
        assert norms[0](greatest / 4) == pytest.approx(0.5)
    bars = colour_bars(figure)
    assert len(bars) == 2 and all("square root" in bar.get_ylabel() for bar in bars)


def test_heads_wrap_at_six_a_line():
    figure = attention_heads(make_maps(16, 5), np.zeros((8, 8, 3)), ["class token"], (2, 2), "")
    panels = panels_of(figure)
    places = [panels[f"head {head}"][1].get_subplotspec() for head in range(16)]
    assert [(spec.rowspan.start, spec.colspan.start) for spec in places] == [
        (2 * (head // 6), 1 + head % 6) for head in range(16)
    ]
    below = [panels[f"row of the class token {head}"][1].get_subplotspec() for head in range(16)]
    assert [spec.rowspan.start for spec in below] == [spec.rowspan.start + 1 for spec in places]
    assert len(colour_bars(figure)) == 6


def test_registers_are_called_registers():
    figure = attention_heads(make_maps(2, 8), None, [f"register {i}" for i in range(4)], (2, 2), "")
    panels = panels_of(figure)
    assert list(panels) == ["head 0", "head 1", "row of the register 0 0", "row of the register 0 1"]
    assert "0: register 0" in panels["head 0"][1].get_ylabel()
    assert not any("class" in text.get_text() for text in figure.findobj(plt.Text))


@pytest.mark.parametrize(("prefix_tokens", "grid"), [([], (2, 2)), ([], None), (["class token"], None)])
def test_nothing_is_put_on_a_grid_without_a_prefix_token_or_a_grid(prefix_tokens, grid):
    panels = panels_of(attention_heads(make_maps(1, 4 + len(prefix_tokens)), None, prefix_tokens, grid, ""))
    assert list(panels) == ["head 0"]
    assert (":" in panels["head 0"][1].get_ylabel()) is bool(prefix_tokens)


@pytest.mark.parametrize(("lowest", "scale"), [(0.5, "log"), (-0.5, "symlog")])
def test_curves_of_a_run(lowest, scale, tmp_path, monkeypatch):
    records = [
        {"epoch": epoch, "train_loss": 2.0 - epoch, "test_loss": 3.0, "test_acc1": 10.0 * epoch, "train_mine": value}
        for epoch, value in enumerate([1.0, lowest])
    ]
    (tmp_path / "log.txt").write_text("".join(json.dumps(record) + "\n" for record in records))
    monkeypatch.setattr(figures.plt, "close", lambda figure: None)
    assert figures.curves(tmp_path, ["mine"]).stat().st_size > 5000
    loss, accuracy, terms = plt.gcf().axes
    drawn = [{line.get_label(): [*line.get_ydata()] for line in axis.lines} for axis in (loss, accuracy, terms)]
    assert drawn == [{"train, all terms": [2, 1], "test, raw": [3, 3]}, {"raw": [0, 10]}, {"mine": [1, lowest]}]
    assert terms.get_yscale() == scale and accuracy.get_ylabel() == "percent"


def test_more_curves_than_colours_differ_in_style():
    styles = list(itertools.islice(figures.curve_styles(), 4 * len(figures.COLOURS)))
    assert len({(style["color"], style["linestyle"]) for style in styles}) == len(styles)
    assert [style["color"] for style in styles[: len(figures.COLOURS)]] == list(figures.COLOURS)
