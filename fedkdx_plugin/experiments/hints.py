"""Hints after a comparison: what its own runs, or the preset `tuned`, say could be better."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedkdx_plugin.configuration.choice import RATE, Common, read_preset
from fedkdx_plugin.engine.evaluation import SERVED
from fedkdx_plugin.engine.participation import UNSEEN
from fedkdx_plugin.reports.people import same_clients
from fedkdx_plugin.reports.statistics import LEVEL, paired, signed_rank
from fedkdx_plugin.results.runs import Run

CLEARLY = 0.01  # least difference of accuracy that a hint is given for


def hints(runs: Sequence[Run]) -> list[str]:
    """Return hints on finished runs of one setting, a line each."""
    return [*_networks(runs), *_tuned(runs)]


def _networks(runs: Sequence[Run]) -> Iterator[str]:
    """Yield a line for each method of which one network alone predicts better than what its clients use.

    Only on validation windows: a network chosen on test windows would make the test too optimistic. By accuracy in the
    last round: a signed-rank test with the pairs of `statistics.paired`, corrected for the number of networks.
    """
    for name in dict.fromkeys(run.name for run in runs if run.evaluated_on == "validation"):
        same = [run for run in runs if run.name == name]
        last = [run.evaluated[-1].metrics for run in same]
        views = [view for view in last[0] if view not in (SERVED, UNSEEN)]
        served, follow = [metrics[SERVED] for metrics in last], same_clients(same)
        for view in views:
            over, better = paired([metrics[view] for metrics in last], served, follow)
            if better.any() and better.mean() >= CLEARLY and signed_rank(better) * len(views) < LEVEL:
                yield (
                    f"{name}: its network '{view}' alone is better on validation windows, by "
                    f"{100 * better.mean():.1f} points, mean over {over}"
                )


def _tuned(runs: Sequence[Run]) -> Iterator[str]:
    """Yield a line where the preset `tuned` has other hyper-parameters for some methods that ran with the defaults."""
    preset = read_preset("tuned")
    names = []
    for run in runs:
        if run.config.get("preset") != "paper":
            continue
        values = dict(preset.get(run.algorithm, {}))
        rate, usual = run.config.get(RATE), Common().local_learning_rate
        asked_for = rate not in (None, usual)  # which would hold with the preset, too
        other_rate = values.pop(RATE, usual) != usual and not asked_for
        if other_rate or any(run.config["set"].get(f"{run.algorithm}.{key}") != own for key, own in values.items()):
            names.append(run.algorithm)
    if names:
        yield (
            f"--preset tuned has other hyper-parameters for {', '.join(dict.fromkeys(names))}, chosen on validation "
            "windows of UCI-HAR and SLEEP: worth a try"
        )
