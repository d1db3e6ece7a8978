"""What every algorithm of the catalog must do, whatever it is: the checks that anybody's algorithm can be given."""

from __future__ import annotations

import pytest

from fedkdx_plugin.testing import AlgorithmCase, algorithm_checks
from registry import catalog

NAMES = list(catalog.BUILT_IN["algorithms"])
NOT_FOR = {  # (algorithm, check): why it does not apply
    ("Local", "check_learning_from_others"): "every client trains alone",
    (
        "Per-FedAvg",
        "check_no_replies",
    ): "one step of the given rate for two batches, after which weights are still finite",
    ("FedALA", "check_renaming_clients"): "draws windows by (seed, client)",
    ("FedFomo", "check_renaming_clients"): "holds windows out and explores by (seed, round, client)",
}
WITHOUT_EFFECT = {  # algorithm -> hyper-parameter -> why the checks' runs cannot show its effect
    "FedFTL": {"layers": "the checks' model has two layers above its first, which is the least that is retrained"},
    "FedRep": {"body_epochs": "a round of the checks has two epochs, one of which is the head's"},
}


@pytest.mark.parametrize("check", algorithm_checks())
@pytest.mark.parametrize("name", NAMES)
def test_built_in(name, check):
    if reason := NOT_FOR.get((name, check.__name__)):
        pytest.skip(reason)
    check(AlgorithmCase(catalog.load("algorithms", name), without_effect=WITHOUT_EFFECT.get(name, {})))
