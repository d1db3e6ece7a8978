"""Metrics of a round as numbers by name, for trackers."""

from __future__ import annotations

import math

from fedkdx_plugin.engine.record import RoundRecord
from fedkdx_plugin.results.records import PARTS, SCALARS


def scalars(record: RoundRecord) -> dict[str, float]:
    """Return `<view>/<metric>`, `train_loss`, `bytes/...`, `seconds/...` and `server/...` of a round, without NaN."""
    found = {"train_loss": record.train_loss, "bytes/up": record.bytes_up, "bytes/down": record.bytes_down}
    found |= {f"seconds/{part}": record.seconds[part] for part in PARTS}
    found |= {f"server/{name}": value for name, value in record.server.items()}
    for view, metrics in record.metrics.items():
        found |= {f"{view}/{name}": getattr(metrics, name) for name in SCALARS}
    return {name: float(value) for name, value in found.items() if not math.isnan(value)}
