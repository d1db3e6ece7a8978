"""The report's overview: its form, clients set apart, mean ranks."""

from __future__ import annotations

import pytest
import scipy.stats

from fedkdx_plugin.reports import overview
from tests.fedkdx_plugin.made_runs import client_accuracy, column, last_accuracy, make_run, sections_of


def test_overview_changes_its_form_with_the_number_of_sections(tmp_path):
    def sections(ratios, names):
        where = tmp_path / f"{len(ratios)}-{len(names)}"
        return sections_of(*(make_run(where / f"{n}{r}", n, join_ratio=r) for r in ratios for n in names))

    assert overview.overview(sections([0.1], ["FedAvg"])) == []
    (abreast,) = overview.overview(sections([0.1, 0.2], ["FedAvg", "Local"]))
    assert len(abreast.columns) == 1 + 2 * 4 and abreast.groups()[1] == ("made, join ratio 0.1", 4)
    (down,) = overview.overview(sections([0.1, 0.2, 0.3, 0.4, 0.5], ["FedAvg"]))
    assert [row[0].text for row in down.rows] == [f"join ratio {r}" for r in (0.1, 0.2, 0.3, 0.4, 0.5)]
    *wide, ranks = overview.overview(sections([0.1, 0.2, 0.3, 0.4, 0.5], ["FedAvg", "Local", "MOON", "FedKD"]))
    assert ranks.name == "overview-ranks"
    assert [table.name for table in wide] == [
        f"overview-made-{metric}" for metric in ("accuracy", "auc", "f1", "recall")
    ]
    assert all(len(table.columns) == 1 + 5 + 1 and len(table.rows) == 4 for table in wide)


def test_overview_has_clients_set_apart_and_mean_ranks(tmp_path):
    names = {"Local": 0.3, "FedAvg": 0.6, "MOON": 0.6, "FedKDX": 1.2, "Centralised": 2.0}
    settings = [{"rare": "0.3@0.1"}, {"unseen": 0.2}, {"late": "0.3@2"}, {"train_fraction": 0.1}, {}]
    of = {"rare": [1, 5], "unseen": [3], "late": [0, 7]}
    folders = {}
    for i, setting in enumerate(settings):
        groups = {name: ids for name, ids in of.items() if name in setting}
        for name, skill in names.items():
            views = ("served", "unseen") if "unseen" in setting and name != "Local" else ("served",)
            where = tmp_path / f"{i}-{name}"
            folders[i, name] = make_run(where, name, skill=skill, views=views, groups=groups, **setting)
    del folders[4, "MOON"]
    accuracy, _, f1, _, over_all = overview.overview(sections_of(*folders.values()))

    rare = column(accuracy, "rare", "rare 0.3@0.1")
    for name in names:
        assert rare[name].value == pytest.approx(100 * client_accuracy(folders[0, name])[[1, 5]].mean())
    assert max(names, key=lambda n: rare[n].rank == 1) == "FedKDX"  # the ceiling is not ranked
    unseen = column(accuracy, "unseen", "unseen 0.2")
    assert unseen["FedAvg"].value == pytest.approx(last_accuracy(folders[1, "FedAvg"], "unseen"))
    assert unseen["Local"].text == "–"
    assert ("rare 0.3@0.1", "rare") not in f1.columns and ("unseen 0.2", "unseen") in f1.columns

    ranks = column(accuracy, "mean rank")
    there = ["Local", "FedAvg", "FedKDX"]  # all that every setting has
    table = [[-round(last_accuracy(folders[i, name]), 2) for name in there] for i in range(5)]
    expected = scipy.stats.rankdata(table, axis=1).mean(0)
    assert [ranks[name].value for name in there] == pytest.approx(expected)
    assert ranks["MOON"].text == ranks["Centralised"].text == "–"
    assert [column(over_all, "accuracy", "mean rank")[name].value for name in there] == pytest.approx(expected)
    assert column(over_all, "sections")["MOON"].text == "4 of 5"
