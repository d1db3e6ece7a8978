"""Federated learning for wearable and healthcare data; `import fedkdx_plugin as fedkdx`.

    fedkdx.compare(data="SPAR", algorithms=["Local", "FedAvg", "FedKDX"], rounds=30)

Names are loaded when they are first used: the import itself loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from registry import __version__

if TYPE_CHECKING:
    from fedkdx_plugin import flower, testing
    from fedkdx_plugin.api import audit, compare, load_runs
    from fedkdx_plugin.experiments.experiment import Experiment
    from fedkdx_plugin.experiments.results import Results
    from fedkdx_plugin.prediction import export, load_model
    from fedkdx_plugin.tracking.callbacks import Callback
    from registry.errors import UserError

__all__ = [
    "Callback",
    "Experiment",
    "Results",
    "UserError",
    "__version__",
    "audit",
    "compare",
    "export",
    "flower",
    "load_model",
    "load_runs",
    "testing",
]

_HOMES = {
    "Callback": "fedkdx_plugin.tracking.callbacks",
    "Experiment": "fedkdx_plugin.experiments.experiment",
    "Results": "fedkdx_plugin.experiments.results",
    "UserError": "registry.errors",
    "audit": "fedkdx_plugin.api",
    "compare": "fedkdx_plugin.api",
    "export": "fedkdx_plugin.prediction",
    "load_model": "fedkdx_plugin.prediction",
    "load_runs": "fedkdx_plugin.api",
}


def __getattr__(name: str) -> Any:
    if name in ("flower", "testing"):
        return importlib.import_module(f"fedkdx_plugin.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
