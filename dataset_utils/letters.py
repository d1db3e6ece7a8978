"""Letters of the labels in plots: other fonts of this machine for what matplotlib's font lacks. Needs matplotlib."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from unicodedata import category

FEW = 5  # labels that a message names
NO_FONTS = "Last Resort"  # begins the names of fonts that have nothing but boxes


@contextmanager
def lettered(texts: Iterable[str]) -> Iterator[None]:
    """Let plots that are made or written within this context draw the letters of these texts.

    Letters that matplotlib's font lacks are taken from other fonts of this machine. If no font has them, a line on
    standard error says so, once, in place of matplotlib's warning for each letter.

    Args:
        texts: labels that the plots show, such as names of classes.
    """
    import matplotlib

    own, labels = tuple(matplotlib.rcParams["font.family"]), tuple(dict.fromkeys(texts))
    others, unknown = fonts_for(frozenset("".join(labels)), own)
    _say(tuple(label for label in labels if unknown & set(label)))
    with matplotlib.rc_context({"font.family": [*own, *others]}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .*missing from")
        yield


@lru_cache(64)
def fonts_for(letters: frozenset[str], families: tuple[str, ...]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Return the fonts to fall back to for letters, those with most of them first, and the letters that no font has.

    Args:
        letters: letters to draw.
        families: fonts that are used anyway.
    """
    lacking = frozenset(letter for letter in letters if category(letter) != "Cc") - _has(families, letters)
    chosen: list[str] = []
    if lacking:
        having = {name: _in_file(path, lacking) for name, path in sorted(_installed().items())}
        while best := max(having, key=lambda name: len(having[name] & lacking), default=""):
            if not having[best] & lacking:
                break
            chosen.append(best)
            lacking -= having[best]
    return tuple(chosen), lacking


def _has(families: tuple[str, ...], letters: frozenset[str]) -> frozenset[str]:
    """Return the letters that any of these fonts has."""
    from matplotlib.font_manager import FontProperties, findfont

    return frozenset().union(*(_in_file(findfont(FontProperties(family=[name])), letters) for name in families))


def _in_file(path: str, letters: frozenset[str]) -> frozenset[str]:
    """Return the letters that the font in a file has."""
    from matplotlib.font_manager import get_font

    font = get_font(path)
    return frozenset(letter for letter in letters if font.get_char_index(ord(letter)))


def _installed() -> dict[str, str]:
    """Return name -> file of all upright fonts of usual weight and width that matplotlib knows."""
    from matplotlib.font_manager import fontManager

    return {
        one.name: one.fname
        for one in fontManager.ttflist
        if (one.style, one.stretch) == ("normal", "normal")
        and one.weight in (400, "normal", "regular")
        and not one.name.startswith(NO_FONTS)
    }


@lru_cache(64)  # the same plots are made in several steps
def _say(labels: tuple[str, ...]) -> None:
    """Print which labels have letters that no font has, if there are any, and what to do."""
    if not labels:
        return
    import matplotlib

    more = f" and {len(labels) - FEW} more" if len(labels) > FEW else ""
    print(
        f"plots: no font of this machine has all letters of {', '.join(map(repr, labels[:FEW]))}{more}, so that boxes "
        "stand for them; install one that has, such as Noto Sans CJK (package fonts-noto-cjk), and remove "
        f"{matplotlib.get_cachedir()}/fontlist*.json, in which matplotlib keeps the fonts that it found before",
        file=sys.stderr,
        flush=True,
    )
