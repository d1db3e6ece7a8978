"""Hints after a comparison: what its own runs, or the preset `tuned`, say could be better."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from fedkdx_plugin.configuration.choice import read_preset
from fedkdx_plugin.engine.evaluation import SERVED
from fedkdx_plugin.engine.participation import UNSEEN
from fedkdx_plugin.reports.statistics import LEVEL, client_mean
from fedkdx_plugin.results.runs import Run

CLEARLY = 0.01  # least difference of accuracy that a hint is given for


def hints(runs: Sequence[Run]) -> list[str]:
    """Return hints on finished runs of one setting, a line each."""
    return [*_networks(runs), *_tuned(runs)]


def _networks(runs: Sequence[Run]) -> Iterator[str]:
    """Yield a line for each method of which one network alone predicts better than what its clients use.

    Only on validation windows: a network chosen on test windows would make the test too optimistic. By accuracy in the
    last round, over clients, each averaged over seeds: a signed-rank test, corrected for the number of networks.
    """
    from scipy.stats import wilcoxon

    for name in dict.fromkeys(run.name for run in runs if run.evaluated_on == "validation"):
        same = [run for run in runs if run.name == name]
        views = [view for view in same[0].evaluated[-1].metrics if view not in (SERVED, UNSEEN)]
        served = _by_client(same, SERVED)
        for view in views:
            own = _by_client(same, view)
            known = ~np.isnan(own) & ~np.isnan(served)
            better = own[known] - served[known]
            if better.any() and better.mean() >= CLEARLY and wilcoxon(better).pvalue * len(views) < LEVEL:
                alone, together = 100 * own[known].mean(), 100 * served[known].mean()
                yield (
                    f"{name}: its network '{view}' alone is better on validation windows, {alone:.1f} against "
                    f"{together:.1f} %, mean over clients"
                )


def _by_client(runs: Sequence[Run], view: str) -> np.ndarray:
    """Return the accuracy of each client in the last round, (clients,), mean over seeds."""
    return client_mean(np.array([run.evaluated[-1].metrics[view].client_accuracy for run in runs], dtype=float))


def _tuned(runs: Sequence[Run]) -> Iterator[str]:
    """Yield a line where the preset `tuned` has other hyper-parameters for some methods that ran with the defaults."""
    preset = read_preset("tuned")
    names = []
    for run in runs:
        if run.config.get("preset") != "paper":
            continue
        used = run.config["set"]
        values = {f"{run.algorithm}.{key}": value for key, value in preset.get(run.algorithm, {}).items()}
        if any(used.get(key) != value for key, value in values.items()):
            names.append(run.algorithm)
    if names:
        yield (
            f"--preset tuned has other hyper-parameters for {', '.join(dict.fromkeys(names))}, chosen on validation "
            "windows of UCI-HAR and SLEEP: worth a try"
        )
