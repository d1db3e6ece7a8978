"""Federations under client-level privacy, for its tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fedkdx_plugin.engine.rounds import Federation
from fedkdx_plugin.privacy.options import CLIENT, Privacy
from fedkdx_plugin.testing.private_mean import NoNoise as NoNoise
from registry.interface import Server
from tests.conftest import make_data, make_federation, make_task

SIZES = (12, 7, 20, 9, 15)
BUDGET = Privacy(CLIENT, 8.0, 1e-2, 0.5)


def private(algorithm: type[Server], privacy: Privacy = BUDGET, **settings: Any) -> Federation:
    """Return a federation of five clients with group norm, all of which take part unless told otherwise."""
    task = replace(make_task(), norm="group")
    settings = {"join_ratio": 1, "local_epochs": 1, "rounds": 4, "backend": "sequential", **settings}
    return make_federation(algorithm, make_data(SIZES), task, privacy=privacy, **settings)
