"""One configuration has one colour in all figures of a study."""

import pytest
from analyzing import analyzed
from matplotlib import pyplot as plt
from run_folders_on_disk import make_run, tabulated

from reports import figures, run_folders


@pytest.fixture
def study(tmp_path):
    return {name: make_run(tmp_path / "study" / name / "seed0") for name in ("mine", "all", "plain", "other")}


def colours(folders):
    places = [folder and run_folders.place_in_study(folder) for folder in folders]
    return [style["color"] for style in figures.study_styles(places)]


def test_a_configuration_keeps_its_style_in_every_selection(study):
    plain, first, mine, other = colours([study[name] for name in ("plain", "all", "mine", "other")])
    assert [plain, first, mine, other] == [*figures.COLOURS[:4]]
    assert colours([study["other"], study["plain"]]) == [other, plain]
    assert colours([study["mine"]]) == [mine]


def test_what_is_not_of_the_study_has_a_free_style(study, tmp_path):
    elsewhere = make_run(tmp_path / "more" / "plain")
    first, second, third, *_ = figures.COLOURS
    assert colours([None, study["plain"], study["all"]]) == [third, first, second]
    assert colours([study["plain"], elsewhere, None]) == [first, second, third]


def test_a_study_of_sixteen_rows_keeps_its_styles(tmp_path):
    folders = [make_run(tmp_path / f"row{number:02}" / "seed0") for number in range(16)]
    assert figures.study_styles([run_folders.place_in_study(folders[15])]) == figures.study_styles(range(16))[15:]


def test_many_folders_beside_each_other_are_no_study(tmp_path):
    folders = [make_run(tmp_path / f"run{number:02}") for number in range(30)]
    assert colours(folders[28:]) == [*figures.COLOURS[:2]]


def test_the_curves_of_the_table_have_these_styles(study, tmp_path, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure))
    tabulated(capsys, study["plain"], study["other"], "--curves", tmp_path / "curves.png")
    (figure,) = drawn
    assert {line.get_color() for line in figure.axes[0].lines} == {figures.COLOURS[0], figures.COLOURS[3]}


def test_the_figures_of_analyze_have_these_styles(runs, tmp_path, monkeypatch):
    drawn = {}

    def keep(figure, path):
        drawn[path.name] = {line.get_color() for axis in figure.axes for line in axis.lines}
        plt.close(figure)

    monkeypatch.setattr(figures, "save", keep)
    analyzed(tmp_path, runs / "watched", runs / "plain", "--num-images", "4")
    plain, _, watched, *_ = figures.COLOURS  # beside other
    for name in ("depth", "weights", "spectra"):
        assert {plain, watched} <= drawn[name] and figures.COLOURS[1] not in drawn[name]


def test_losses_of_different_objectives_are_not_drawn():
    record = {"epoch": 0, "test_acc1": 1.0, "test_loss": 3.0, "train_loss": 9.0, "train_cls_ce": 2.0}
    figure = figures.training_curves([("plain", [record], True)])
    values = [axis.lines[0].get_ydata()[0] for axis in figure.axes]
    assert values == [1.0, 3.0, 2.0]
    assert [axis.get_title() for axis in figure.axes][1:] == ["Test loss, raw weights", "Training loss, classification"]
