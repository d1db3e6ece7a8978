"""Plots of many methods, and of methods with long names: which are shown, and that nothing is cut off."""

from __future__ import annotations

import pytest

from dataset_utils import letters
from fedkdx_plugin.reports import plots
from fedkdx_plugin.reports.looks import COLOURS, Looks
from registry import catalog
from tests.fedkdx_plugin.made_runs import make_run, sections_of, set_accuracy

OTHERS = (
    "Ditto",
    "APFL",
    "FedBN",
    "FedPer",
    "FedRep",
    "MOON",
    "FedProx",
    "FedDyn",
    "FedNova",
    "SCAFFOLD",
    "IFCA",
    "CFL",
)
LONG = "local_learning_rate=0.00795, alpha=0.231, adaptive=False, and another one"


def test_of_many_methods_the_references_fedavg_and_the_best_of_each_algorithm_are_shown(tmp_path):
    folders = [set_accuracy(make_run(tmp_path / name, name), 0.5 + place / 100) for place, name in enumerate(OTHERS)]
    folders += [set_accuracy(make_run(tmp_path / name, name), 0.1) for name in ("FedAvg", "FedKDX")]
    folders += [set_accuracy(make_run(tmp_path / "worse", "CFL", label="worse"), 0.605)]
    (section,) = sections_of(*folders, references=["FedKDX"])
    assert len(section.methods) == 15
    # ten places are left, for the best ten of twelve; CFL reaches 0.61, its variant 0.605
    names = [method.name for method in plots.shown(section)]
    assert sorted(names) == sorted([*OTHERS[2:], "FedAvg", "FedKDX"])
    caption = next(plots.draw(section, tmp_path / "figures", Looks(names))).caption
    assert caption.endswith(
        "Of 15 methods 12 are shown: references, FedAvg, and the best of the others, at most one of each algorithm."
    )


def test_all_of_few_methods_are_shown_variants_too(tmp_path):
    folders = [make_run(tmp_path / str(n), "CFL", label=f"variant {n}") for n in range(plots.MANY)]
    (section,) = sections_of(*folders)
    assert len(plots.shown(section)) == plots.MANY


@pytest.mark.parametrize("kind", ["convergence", "loss", "clients", "compression", "seconds", "confusion"])
def test_long_names_are_shortened_and_leave_the_plot_its_room(tmp_path, kind):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    folders = [make_run(tmp_path / name, name, label=LONG, server=True) for name in ("APFL", "CFL", "FedAMP")]
    (section,) = sections_of(*folders)
    assert max(len(method.name) for method in section.methods) > 60
    looks = Looks(method.name for method in section.methods)
    with plots.style():
        figure, _ = getattr(plots, kind)(section, section.methods, looks)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        renderer = canvas.get_renderer()
        texts = [text for legend in figure.legends for text in legend.get_texts()]
        for axes in figure.axes:
            texts.append(axes.title)
            if kind in ("clients", "seconds", "confusion"):  # where names are beside the axis, all of which are visible
                texts += axes.get_yticklabels()
        boxes = [text.get_window_extent(renderer) for text in texts if text.get_text()]
    width, height = figure.get_size_inches() * figure.dpi
    assert boxes
    for box in boxes:
        assert box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height
    assert figure.axes[0].get_window_extent().width > figure.dpi


def test_a_single_evaluated_round_is_a_point(tmp_path):
    (section,) = sections_of(make_run(tmp_path / "run", done=1, global_rounds=1))
    figure, _ = plots.convergence(section, section.methods, Looks(["FedAvg"]))
    for axes in figure.axes:
        (line,) = axes.lines
        assert len(line.get_xdata()) == 1 and line.get_marker() == "o"
    assert figure.axes[0].get_xticks().tolist() == [1]


def test_points_of_methods_differ_also_where_their_colours_do_not(tmp_path):
    names = list(catalog.BUILT_IN["algorithms"])
    folders = [make_run(tmp_path / name, name, done=1, global_rounds=1) for name in names]
    (section,) = sections_of(*folders)
    figure, _ = plots.convergence(section, section.methods, Looks(names))
    seen = {(line.get_color(), line.get_marker()) for line in figure.axes[0].lines}
    assert len(names) > len(COLOURS) and len(seen) == len(names)


def test_letters_that_the_font_lacks_are_one_line_and_no_warnings(tmp_path, capsys, recwarn, monkeypatch):
    monkeypatch.setattr(letters, "_installed", lambda: {})  # whatever this machine has
    for cached in (letters.fonts_for, letters._say):
        cached.cache_clear()
    (section,) = sections_of(make_run(tmp_path / "run"))
    for run in section.methods[0].runs:
        object.__setattr__(run, "classes", ("走る", "sit", "walk"))
    names = [plot.name for plot in plots.draw(section, tmp_path / "figures", Looks(["FedAvg"]))]
    assert any(name.endswith("-confusion") for name in names)
    said = capsys.readouterr().err
    assert said.startswith("plots: no font of this machine has all letters of '走る', so") and said.count("\n") == 1
    assert not [str(one.message) for one in recwarn.list if "Glyph" in str(one.message)]
