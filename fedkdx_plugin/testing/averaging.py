"""Check that an algorithm that averages its clients does so as the options ask for it."""

from __future__ import annotations

from dataclasses import replace

from fedkdx_plugin.testing.case import AlgorithmCase, require_all_counted, require_finite, run
from fedkdx_plugin.testing.made import make_data
from fedkdx_plugin.testing.running import Checks, require
from registry.aggregation import RULES, Averaging

CHECKS = Checks()
SIZES = (12, 7, 20, 9, 15)  # five replies, which Krum needs with one assumed to be bad


@CHECKS
def check_averaging(case: AlgorithmCase) -> None:
    """Require that an algorithm with `averages` takes means by `self.average`, whatever rule that follows."""
    if not case.algorithm.averages:
        return  # the engine refuses any other rule than the mean
    for how in (*map(Averaging, RULES), Averaging(max_share=0.25)):
        task = replace(case.task(), averaging=how)
        federation = case.federation(make_data(SIZES), task, rounds=2, join_ratio=1, local_epochs=1)
        require_all_counted(run(federation))
        require_finite(federation.server.save().tensors)
        text = "declares `averages`, but its `aggregate` takes no mean by `self.average`: call it, or declare False"
        require(federation.server.average.used, f"{how.asked or 'the mean'}: the algorithm {text}")
