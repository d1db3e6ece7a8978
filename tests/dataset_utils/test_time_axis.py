"""Times against the stated rate: what fits passes unchanged, what can be mended is, and counted; the rest is refused.

Signals are ramps (a sample's value is its number on the true time axis), so that every sample tells where it belongs.
"""

import dataclasses

import numpy as np
import pytest

from dataset_utils.counts import Tally
from dataset_utils.recording import UNLABELLED, Preprocessing, Recording
from dataset_utils.time_axis import even, likely_unit, measured
from registry.errors import UserError

SETTINGS = Preprocessing(rate=50.0, window=10, overlap=0.5, max_gap=0.5)
N = 500


def put(time, values=None, labels=None, settings=SETTINGS, **about):
    """Pieces and tally of a recording whose channel is `values` (the true sample numbers by default)."""
    time = np.asarray(time, dtype=float)
    values = np.rint((time - time.min()) * 50) if values is None else np.asarray(values, dtype=float)
    labels = np.zeros(len(time), int) if labels is None else np.asarray(labels)
    recording = Recording("7", values[:, None], labels, time, "a.csv", **about)
    tally = Tally.of(recording)
    return list(even(recording, settings, tally)), tally


def clock(n=N, rate=50.0):
    return np.arange(n) / rate


def mended(tally):
    names = ("unordered", "restarts", "duplicates", "averaged", "uneven", "inserted", "gaps")
    return {name: getattr(tally, name) for name in names if getattr(tally, name)}


@pytest.mark.parametrize("rate", [50.0, 49.0, 52.0, 47.6, 52.4])
@pytest.mark.parametrize("begin", [0.0, 1.7e9])
def test_what_fits_stays_as_it_is(rate, begin):
    (piece,), tally = put(begin + clock(rate=rate), np.arange(N))
    np.testing.assert_array_equal(piece.signals[:, 0], np.arange(N))
    assert not mended(tally) and tally.rate == pytest.approx(rate, rel=1e-4)
    assert tally.possible == (N - 10) // 5 + 1 and piece.first == pytest.approx(begin)


@pytest.mark.parametrize(
    ("factor", "hint"),
    [
        (2.0, "measured rate 25 Hz, but the rate is said to be 50 Hz; correct 'rate'.*resample"),
        (50 / 80, "measured rate 80 Hz"),
        (50 / 53, "measured rate 53 Hz"),
        (50 / 46, "measured rate 46 Hz"),
        (1 / 60, "measured rate 3000 Hz.*minutes"),
        (1 / 3600, "measured rate 1.8e.05 Hz.*hours"),
        (1 / 86400, "days"),
    ],
)
def test_another_rate_is_an_error_that_names_it(factor, hint):
    with pytest.raises(UserError, match=rf"^a\.csv: .*{hint}"):
        put(clock() * factor, np.arange(N))


@pytest.mark.parametrize(("unit", "factor"), [("ms", 1e3), ("us", 1e6), ("ns", 1e9)])
def test_units_are_found_out_or_told_and_a_wrong_one_is_named(unit, factor):
    time = np.rint((1.7e9 + clock()) * factor)
    (piece,), tally = put(time, np.arange(N), unit=None)
    assert tally.unit and len(piece.labels) == N and tally.rate == pytest.approx(50)
    (piece,), tally = put(time, np.arange(N), unit=unit)
    assert not tally.unit and piece.first == pytest.approx(1.7e9)
    with pytest.raises(UserError, match=r"are its times in (milli|micro|nano)seconds"):
        put(time, np.arange(N), unit="s")


def test_the_rate_of_rounded_times_is_their_mean_not_their_median():
    assert measured(np.round(clock(2000, 60.0), 3)) == pytest.approx(60, rel=1e-3)
    assert 1 / np.median(np.diff(np.round(clock(2000, 60.0), 3))) < 59
    assert measured(np.round(clock(2000, 64.0), 2)) == pytest.approx(64, rel=1e-2)
    assert measured(np.zeros(5)) is None
    assert likely_unit(np.zeros(5), SETTINGS) == "s"


@pytest.mark.parametrize("rate", [60.0, 64.0, 128.0, 400.0, 700.0])
def test_rounded_times_move_no_sample(rate):
    """Times in whole milliseconds: the steps of an even clock vary, its samples do not."""
    settings = dataclasses.replace(SETTINGS, rate=rate)
    (piece,), tally = put(np.round(clock(2000, rate), 3), np.arange(2000), settings=settings)
    np.testing.assert_array_equal(piece.signals[:, 0], np.arange(2000))
    assert not mended(tally)


def test_rows_out_of_order_are_sorted():
    for order in (
        np.concatenate([np.arange(250, N), np.arange(250)]),  # the second half first
        np.random.default_rng(0).permutation(N),
        np.where(
            np.arange(N) % 200 == 50,
            np.arange(N) + 1,
            np.where(np.arange(N) % 200 == 51, np.arange(N) - 1, np.arange(N)),
        ),
    ):
        (piece,), tally = put(clock()[order], np.arange(N)[order], labels=order % 3)
        np.testing.assert_array_equal(piece.signals[:, 0], np.arange(N))
        np.testing.assert_array_equal(piece.labels, np.arange(N) % 3)
        assert mended(tally) == {"unordered": tally.unordered} and tally.unordered > 0
    assert tally.unordered == 3


def test_rows_in_reverse_are_sorted():
    (piece,), tally = put(clock()[::-1], np.arange(N)[::-1])
    np.testing.assert_array_equal(piece.signals[:, 0], np.arange(N))
    assert tally.unordered == N - 1


@pytest.mark.parametrize("offset", [0.0, 0.007, 3.0])
def test_recordings_one_after_the_other_are_cut_where_the_clock_restarts(offset):
    """On the same grid, on another one, or partly at the same times: mingled they would be nonsense."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=2 * N)
    pieces, tally = put(np.concatenate([clock(), offset + clock()]), values)
    assert [len(piece.labels) for piece in pieces] == [N, N] and mended(tally) == {"restarts": 1}
    np.testing.assert_array_equal(np.concatenate([p.signals[:, 0] for p in pieces]), values)


@pytest.mark.parametrize("times", [2, 3])
def test_repeated_rows_are_dropped(times):
    for order in (np.repeat(np.arange(N), times), np.tile(np.arange(N), times)):
        (piece,), tally = put(clock()[order], np.arange(N)[order])
        np.testing.assert_array_equal(piece.signals[:, 0], np.arange(N))
        assert tally.duplicates == (times - 1) * N and not tally.averaged and not tally.gaps and not tally.restarts


def test_repeated_rows_with_missing_values_are_the_same_too():
    values = np.arange(N, dtype=float)
    values[100] = np.nan
    order = np.repeat(np.arange(N), 2)
    (piece,), tally = put(clock()[order], values[order])
    np.testing.assert_array_equal(piece.signals[:, 0], values)
    assert mended(tally) == {"duplicates": N}


def test_a_few_rows_that_share_a_time_are_averaged():
    time, values = np.insert(clock(), 100, clock()[100]), np.insert(np.arange(N, dtype=float), 100, 104.0)
    (piece,), tally = put(time, values)
    expected = np.arange(N, dtype=float)
    expected[100] = 102.0
    np.testing.assert_array_equal(piece.signals[:, 0], expected)
    assert mended(tally) == {"averaged": 2}
    with pytest.raises(UserError, match="rows share their time with others and differ"):
        put(time, values, settings=dataclasses.replace(SETTINGS, repeated="error"))


def test_many_rows_that_share_a_time_are_averaged_only_when_asked():
    time, values = np.repeat(clock(), 2), np.random.default_rng(0).normal(size=2 * N)
    with pytest.raises(UserError, match=r"1000 of 1000 rows share their time with others and differ; name the column"):
        put(time, values)
    (piece,), tally = put(time, values, settings=dataclasses.replace(SETTINGS, repeated="average"))
    np.testing.assert_allclose(piece.signals[:, 0], (values[::2] + values[1::2]) / 2)
    assert mended(tally) == {"averaged": 2 * N}


def test_rows_of_one_time_and_two_labels_are_an_error():
    settings = dataclasses.replace(SETTINGS, repeated="average")
    with pytest.raises(UserError, match="two rows at 0 s after its begin have different labels"):
        put(np.repeat(clock(), 2), np.arange(2 * N), np.arange(2 * N) % 2, settings)


def test_a_clock_too_coarse_is_said():
    with pytest.raises(UserError, match="50 rows share each time, so its clock is too coarse for 50 Hz"):
        put(np.floor(clock()), np.random.default_rng(0).normal(size=N))
    with pytest.raises(UserError, match="2 rows share each time"):
        put(np.floor(clock() * 25) / 25, np.random.default_rng(0).normal(size=N))


def test_missing_rows_stand_as_missing_on_the_time_axis():
    """80 of every 100 rows: gaps of 0.4 s are to be interpolated; glued together they would be 0.8 times as long."""
    kept = np.flatnonzero(np.arange(N) % 100 < 80)
    (piece,), tally = put(clock()[kept], kept, np.where(kept < 250, 0, 1))
    assert len(piece.labels) == 480 and mended(tally) == {"inserted": 80}  # the last 20 rows are missing, too
    expected = np.where(np.arange(480) % 100 < 80, np.arange(480), np.nan)
    np.testing.assert_array_equal(piece.signals[:, 0], expected)
    np.testing.assert_array_equal(piece.labels, np.arange(480) >= 250)
    assert tally.possible == (480 - 10) // 5 + 1


def test_labels_of_missing_rows_are_those_of_the_nearer_neighbour():
    kept = np.r_[0:100, 110:N]
    (piece,), _ = put(clock()[kept], kept, np.where(kept < 105, 0, 1))
    np.testing.assert_array_equal(piece.labels, np.arange(N) >= 105)


def test_one_hertz_with_missing_rows_stays_one_hertz():
    kept = np.flatnonzero(np.random.default_rng(0).random(N) < 0.8)
    settings = dataclasses.replace(SETTINGS, rate=1.0, max_gap=10.0)
    (piece,), tally = put(kept.astype(float), kept, settings=settings)
    valid = np.flatnonzero(~np.isnan(piece.signals[:, 0]))
    np.testing.assert_array_equal(piece.signals[valid, 0], kept)
    assert len(piece.labels) == kept[-1] - kept[0] + 1 == len(kept) + tally.inserted and tally.rate == 1


def test_longer_gaps_cut():
    # 25 missing samples are 0.5 s, which is to be interpolated; 26 cut
    kept = np.r_[0:100, 125:200, 226:N]
    pieces, tally = put(clock()[kept], kept)
    assert [len(p.labels) for p in pieces] == [200, 274] and mended(tally) == {"gaps": 1, "inserted": 25}
    assert pieces[1].first == pytest.approx(226 / 50)
    assert tally.possible == (474 - 10) // 5 + 1  # of as many samples in one piece


def test_without_a_gap_allowed_one_missing_row_cuts():
    kept = np.delete(np.arange(N), 100)
    pieces, tally = put(clock()[kept], kept, settings=dataclasses.replace(SETTINGS, max_gap=0.0))
    assert [len(p.labels) for p in pieces] == [100, 399] and mended(tally) == {"gaps": 1}


def test_jitter_of_less_than_half_a_step_moves_no_sample():
    jitter = np.random.default_rng(0).uniform(0, 0.0099, N)
    (piece,), tally = put(clock() + jitter, np.arange(N))
    np.testing.assert_array_equal(piece.signals[:, 0], np.arange(N))
    assert not mended(tally)


def test_more_jitter_does_not_bias_the_rate():
    """Steps of 4 to 36 ms: the mean of those near the median is off by 2 %, the line through all is not."""
    jitter = np.random.default_rng(0).uniform(-0.008, 0.008, 5000)
    (piece,), tally = put(clock(5000) + jitter, np.arange(5000))
    assert tally.rate == pytest.approx(50, rel=1e-3) and not mended(tally) and len(piece.labels) == 5000


def test_a_rate_remarkably_off_is_said():
    assert put(clock(rate=49.0), np.arange(N))[1].odd_rate and not put(clock(rate=49.9), np.arange(N))[1].odd_rate


def test_wild_times_are_interpolated_onto_an_even_grid():
    rng = np.random.default_rng(0)
    time = np.cumsum(rng.choice([0.004, 0.02, 0.036], N))
    (piece,), tally = put(time, 3 * time, np.where(time < 5, 0, 1))
    assert tally.uneven and piece.rate == pytest.approx(50, rel=0.02)
    grid = time[0] + np.arange(len(piece.labels)) / piece.rate
    np.testing.assert_allclose(piece.signals[:, 0], 3 * grid, atol=1e-9)  # a line stays one on the true axis
    assert np.count_nonzero(piece.labels != (grid >= 5)) <= 1
    assert grid[-1] <= time[-1] < grid[-1] + 1 / piece.rate


def test_events_are_neither_lost_nor_doubled_on_another_grid():
    settings = dataclasses.replace(SETTINGS, before=0.05)
    labels = np.full(N, UNLABELLED)
    labels[[50, 150, 310]] = [2, 0, 1]
    kept = np.delete(np.arange(N), np.r_[100:110])
    (piece,), _ = put(clock()[kept], kept, labels[kept], settings)
    assert np.flatnonzero(piece.labels >= 0).tolist() == [50, 150, 310]
    rng = np.random.default_rng(0)
    time = np.cumsum(rng.choice([0.004, 0.02, 0.036], N))
    (piece,), _ = put(time, time, labels, settings)
    found = np.flatnonzero(piece.labels >= 0)
    assert piece.labels[found].tolist() == [2, 0, 1]
    np.testing.assert_allclose(time[0] + found / piece.rate, time[[50, 150, 310]], atol=0.5 / piece.rate + 1e-9)


def test_without_times_the_rate_that_the_file_states_is_checked():
    recording = Recording("7", np.zeros((N, 1)), np.zeros(N, int), None, "a.edf", rate=100.0)
    with pytest.raises(UserError, match=r"a\.edf: measured rate 100 Hz, but the rate is said to be 50 Hz"):
        list(even(recording, SETTINGS, Tally.of(recording)))


def test_any_rate_will_do_where_recordings_are_resampled_unless_it_is_absurd():
    settings = dataclasses.replace(SETTINGS, resample=True)
    for rate in (25.0, 100.0, 31.25):
        (piece,), tally = put(clock(rate=rate), np.arange(N), settings=settings)
        assert piece.rate == pytest.approx(rate) and tally.rate == pytest.approx(rate)
    with pytest.raises(UserError, match="measured rate 3000 Hz, to be resampled to 50 Hz; are its times in minutes"):
        put(clock() / 60, np.arange(N), settings=settings)


def test_an_empty_recording_and_one_of_a_few_rows_give_no_error():
    assert put([0.0])[0][0].signals.shape == (1, 1)
    assert len(put([0.0, 9.0, 10.0])[0]) == 1
    recording = Recording("7", np.zeros((0, 1)), np.zeros(0, int), np.zeros(0))
    assert list(even(recording, SETTINGS, Tally.of(recording))) == []
