"""Letters that matplotlib's font lacks: taken from other fonts, or named in one line."""

from __future__ import annotations

import warnings

import matplotlib
import pytest

from dataset_utils import letters

OWN = ("sans-serif",)
PRIVATE = "\ue153"  # for private use: of matplotlib's own fonts, none but STIX NonUnicode gives it a shape


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    """Forget what was found and said before, and find matplotlib's own fonts alone, whatever this machine has."""
    for cached in (letters.fonts_for, letters._say):
        cached.cache_clear()
    found, own = letters._installed(), matplotlib.get_data_path()
    monkeypatch.setattr(letters, "_installed", lambda: {n: path for n, path in found.items() if path.startswith(own)})


def drawn(label: str, path) -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    figure.subplots().set_title(label)
    figure.savefig(path)


def test_letters_of_the_usual_font_need_no_other():
    assert letters.fonts_for(frozenset("gehen, läuft, ходьба, ε ≤ 8 \n"), OWN) == ((), frozenset())


def test_a_font_that_has_a_letter_is_fallen_back_to(tmp_path, capsys):
    assert letters.fonts_for(frozenset(f"walk {PRIVATE}走"), OWN) == (("STIXNonUnicode",), frozenset("走"))
    with warnings.catch_warnings(), letters.lettered([f"walk {PRIVATE}"]):
        warnings.simplefilter("error")
        drawn(f"walk {PRIVATE}", tmp_path / "a.png")
    assert not capsys.readouterr().err
    with pytest.warns(UserWarning, match="Glyph"):  # so it would be without
        drawn(f"walk {PRIVATE}", tmp_path / "b.png")


def test_labels_whose_letters_no_font_has_are_named_once_in_one_line(tmp_path, capsys, recwarn):
    names = ["walk", *(f"走{n}" for n in range(7)), PRIVATE]
    for _ in range(2):
        with letters.lettered(names):
            drawn(names[1], tmp_path / "a.pdf")
    said = capsys.readouterr().err
    assert said.startswith(
        "plots: no font of this machine has all letters of '走0', '走1', '走2', '走3', '走4' and 2 more, so that "
    )
    assert said.count("\n") == 1 and "fonts-noto-cjk" in said
    assert not recwarn.list
