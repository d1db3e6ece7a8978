"""The comparison table: what its rows are means of."""

from __future__ import annotations

import dataclasses

import numpy as np

from fedkdx_plugin.reports import comparison_table
from tests.fedkdx_plugin.made_runs import make_run, sections_of


def test_a_network_has_a_row_for_every_seed_or_none(tmp_path):
    """With seed 1 the network predicts as the method does, so that its row is the method's there."""
    folders = [make_run(tmp_path / str(seed), "FedKDX", seed, views=("served", "student")) for seed in (0, 1, 2)]
    (section,) = sections_of(*folders)
    runs = list(section.methods[0].runs)
    last = runs[1].records[-1]
    same = dict.fromkeys(last.metrics, last.metrics["served"])
    runs[1] = dataclasses.replace(runs[1], records=[*runs[1].records[:-1], dataclasses.replace(last, metrics=same)])
    names = [(row.name, row.seed) for row in comparison_table.of_seeds(runs)]
    shown = runs[0].name
    assert names == [(name, seed) for seed in (0, 1, 2) for name in (shown, f"{shown} (student)")]
    own, student = (
        [row for row in comparison_table.of_seeds(runs) if row.name == n] for n in (shown, f"{shown} (student)")
    )
    assert student[1].values["accuracy"] == own[1].values["accuracy"]
    text = comparison_table.markdown(comparison_table.of_seeds(runs))
    mean = 100 * np.mean([row.values["accuracy"] for row in student])
    assert f"{mean:.2f} ± " in next(line for line in text.splitlines() if "(student)" in line)
