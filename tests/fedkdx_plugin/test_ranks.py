"""Mean ranks, Friedman's test and the critical difference, by hand and against Demšar 2006."""

from __future__ import annotations

import math

import pytest

from fedkdx_plugin.reports import ranks
from tests.fedkdx_plugin.made_runs import column, make_run, sections_of, set_accuracy

ORDERED = [{"a": 3.0, "b": 2.0, "c": 1.0}] * 4


def test_equal_values_share_the_mean_of_their_ranks():
    """By hand: 1.5, 1.5, 3 and 1, 2, 3; `d` is not in the second block, and nobody's rank depends on it."""
    blocks = [{"a": 1.0, "b": 1.0, "c": 0.0, "d": 0.5}, {"a": 2.0, "b": 1.0, "c": 0.0}]
    assert ranks.mean_ranks(blocks) == {"a": 1.25, "b": 1.75, "c": 3.0}
    assert ranks.mean_ranks([{"a": 1.0}, {"a": 1.0, "b": 2.0}]) == {}  # one alone has no rank


def test_friedman_by_hand():
    """By hand: 12 / (4·3·4) · (4² + 8² + 12²) − 3·4·4 = 8, and with two degrees of freedom p = exp(−8/2)."""
    test = ranks.friedman(ORDERED)
    assert (test.methods, test.blocks) == (3, 4)
    assert test.p == pytest.approx(math.exp(-4))
    assert test.critical == pytest.approx(2.343 * math.sqrt(3 * 4 / (6 * 4)), abs=1e-3)


def test_friedman_of_equal_and_of_too_few():
    assert ranks.friedman([{"a": 1.0, "b": 1.0, "c": 1.0}] * 3).p == 1
    assert ranks.friedman([{"a": 1.0, "b": 2.0}] * 3) is None
    assert ranks.friedman(ORDERED[:1]) is None


@pytest.mark.parametrize(("methods", "q"), [(2, 1.960), (3, 2.343), (4, 2.569), (5, 2.728), (10, 3.164)])
def test_critical_differences_are_those_of_demsars_table(methods, q):
    assert ranks.critical_difference(methods, 14) == pytest.approx(
        q * math.sqrt(methods * (methods + 1) / (6 * 14)), abs=1e-3
    )


def made(place, accuracies, **options):
    """Return sections with these accuracies: (data set, join ratio) -> method -> accuracy in the last round."""
    folders = []
    for number, ((data, ratio), own) in enumerate(accuracies.items()):
        for name, accuracy in own.items():
            about = {"name": data, "manifest_sha256": data[0] * 64}
            folder = make_run(place / f"{number}{name}", name, data=about, join_ratio=ratio, **options)
            folders.append(set_accuracy(folder, accuracy))
    return sections_of(*folders)


def test_the_table_over_all_sections(tmp_path):
    """By hand: ranks 1 2 3, 1 2 3, 2 1 3, 1 2 3; MOON is in one section alone, Centralised the best of one."""
    order = {"FedAvg": 0.9, "FedKDX": 0.8, "Local": 0.7}
    sections = made(
        tmp_path,
        {
            ("first", 0.1): order,
            ("first", 0.2): order,
            ("second", 0.1): {"FedKDX": 0.9, "FedAvg": 0.8, "Local": 0.7, "MOON": 0.95, "Centralised": 0.99},
            ("second", 0.2): order,
        },
    )
    (table,) = ranks.overview(sections)
    assert [row[0].text for row in table.rows] == ["FedAvg", "FedKDX", "Local", "MOON"]
    assert [row[1].text for row in table.rows] == ["4 of 4"] * 3 + ["1 of 4"]
    assert [row[2].value for row in table.rows] == [1.25, 1.75, 3.0, None]
    # 12 / (4·3·4) · (5² + 7² + 12²) − 48 = 6.5, p = exp(−3.25) = 0.0388; critical difference 1.66 as above
    assert "over 4 sections, among the 3 methods" in table.caption and "Centralised is not ranked" in table.caption
    assert "p = 0.039" in table.caption and "(Nemenyi, 0.05) is 1.66" in table.caption
    # over data sets: FedAvg 1, FedKDX 2, Local 3 in the first; 1.5, 1.5, 3 in the second: sums 2.5, 3.5, 6.
    # 12 / (2·3·4) · (2.5² + 3.5² + 6²) − 3·2·4 = 3.25; with ties / (1 − 6 / (2·3·8)) = 3.714, p = exp(−1.857) = 0.156
    assert "Over the 2 data sets" in table.caption and "p = 0.156" in table.caption


def test_a_method_that_one_section_lacks_moves_no_rank_of_a_data_set(tmp_path):
    """By hand: without MOON, which the second data set lacks, FedAvg and Local have ranks 1 and 2 in both."""
    sections = made(
        tmp_path,
        {("first", 0.1): {"FedAvg": 0.9, "MOON": 0.8, "Local": 0.7}, ("second", 0.1): {"FedAvg": 0.9, "Local": 0.7}},
    )
    assert ranks.by_data(sections, "accuracy") == [{"FedAvg": -1, "Local": -2}] * 2
    assert ranks.overview(sections) == []  # two methods in common are too few for the test


def test_one_data_set_says_nothing_of_others(tmp_path):
    order = {"FedAvg": 0.9, "FedKDX": 0.8, "Local": 0.7}
    (table,) = ranks.overview(made(tmp_path, {("first", ratio): order for ratio in (0.1, 0.2)}))
    assert table.caption.endswith("With one data set, nothing can be said of others.")
    # two sections: 12 / (2·3·4) · (4 + 16 + 36) − 24 = 4, p = exp(−2) = 0.135
    assert "p = 0.135" in table.caption and "show no difference" in table.caption


def test_sections_on_validation_windows_are_not_ranked_with_others(tmp_path):
    order = {"FedAvg": 0.9, "FedKDX": 0.8, "Local": 0.7}
    sections = made(tmp_path / "a", {("first", ratio): order for ratio in (0.1, 0.2, 0.3)})
    about = {"name": "second", "evaluated_on": "validation"}
    folders = [make_run(tmp_path / "b" / name, name, data=about) for name in order]
    (table,) = ranks.overview([*sections, *sections_of(*folders)])
    assert "over 3 sections" in table.caption
    assert column(table, "sections")["FedAvg"].text == "3 of 3"
