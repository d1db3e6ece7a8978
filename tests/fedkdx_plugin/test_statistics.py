"""Significance in the report: pairs, tests, corrections."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from fedkdx_plugin.reports import content, statistics
from fedkdx_plugin.reports.statistics import holm
from tests.fedkdx_plugin.made_runs import client_accuracy, make_run, sections_of


def test_holm_against_a_worked_example():
    # sorted: 0.005·4, 0.01·3, 0.03·2, 0.04·1, which may not fall below its predecessor
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_few_seeds_are_paired_by_client(tmp_path):
    folders = {
        (n, s): make_run(tmp_path / f"{n}{s}", n, s, k) for n, k in (("FedKDX", 2.0), ("Local", 0.1)) for s in (0, 1)
    }
    means = {n: np.mean([client_accuracy(folders[n, s]) for s in (0, 1)], axis=0) for n in ("FedKDX", "Local")}
    difference = np.round(means["Local"] - means["FedKDX"], 12)
    (section,) = sections_of(*folders.values())
    (test,), untested = statistics.tests(section)
    assert (test.name, test.over, test.pairs, untested) == ("Local", "clients", 8, [])
    assert test.p == pytest.approx(scipy.stats.wilcoxon(difference).pvalue)
    assert test.difference == pytest.approx(difference.mean())
    # every client is worse: of the 2^8 sign patterns only two are as extreme
    assert (difference < 0).all() and test.worse == 8
    assert test.p == pytest.approx(statistics.smallest_p(8)) == pytest.approx(2 / 2**8)
    table, meaning = content.significance(section)
    assert table.rows[0][-1].text == "worse" and "by client" in meaning


def test_many_seeds_are_paired_by_seed(tmp_path):
    seeds = range(6)
    folders = [make_run(tmp_path / f"{n}{s}", n, s, k) for n, k in (("FedKDX", 2.0), ("Local", 0.1)) for s in seeds]
    (section,) = sections_of(*folders)
    (test,), _ = statistics.tests(section)
    assert (test.over, test.pairs, test.p) == ("seeds", 6, pytest.approx(2 / 2**6))


def test_no_significance_without_anything_to_compare(tmp_path):
    (section,) = sections_of(make_run(tmp_path / "0"))
    assert content.significance(section)[0] is None
    (section,) = sections_of(make_run(tmp_path / "1", "FedKDX", 0), make_run(tmp_path / "2", "Local", 1))
    table, why = content.significance(section)
    assert table is None and "Local" in why


def test_equal_methods_do_not_differ(tmp_path):
    one, two = make_run(tmp_path / "0", "FedKDX"), make_run(tmp_path / "1", "Local")
    (two / "results.h5").write_bytes((one / "results.h5").read_bytes())
    (section,) = sections_of(one, two)
    (test,), _ = statistics.tests(section)
    assert test.p == 1 and not test.significant
