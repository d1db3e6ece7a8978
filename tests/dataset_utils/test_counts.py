"""Lines about what was repaired or lost in reading: one of a kind, and several."""

from __future__ import annotations

import pytest

from dataset_utils.counts import Counts, Tally, some

ONE = {
    "unordered": "1 row was out of order and was sorted by time (in a)",
    "duplicates": "1 row repeats another row of the same time and was dropped (in a)",
    "averaged": "1 row shares its time with others and was averaged (in a)",
    "inserted": "1 sample was missing and was interpolated on the time axis (in a)",
    "gaps": "1 gap was too long to interpolate and cuts a recording (in a)",
    "missing": "1 row lacks a value in some channel (in a)",
    "restarts": "1 restart of the clock cuts a recording (in a)",
}


@pytest.mark.parametrize("kind", ONE)
def test_one_of_a_kind_is_singular_and_two_are_plural(kind):
    counts = Counts(recordings=[Tally("a", "s", **{kind: 1})])
    assert counts.lines() == [ONE[kind]]
    counts.recordings.append(Tally("b", "s", **{kind: 1}))
    (line,) = counts.lines()
    noun = ONE[kind].split()[1]
    assert line.startswith(f"2 {noun}s ") and line.endswith(" (in a, b)")


def test_names_beyond_six_are_counted():
    assert some("abcdef") == "a, b, c, d, e, f"
    assert some("abcdefgh", "; ") == "a; b; c; d; e; f and 2 more"
