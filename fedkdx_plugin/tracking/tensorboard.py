"""`--tensorboard`: a run's figures as scalars, while it runs."""

from __future__ import annotations

from pathlib import Path

from fedkdx_plugin.engine.rounds import Callback, RoundRecord
from fedkdx_plugin.results.records import PARTS, SCALARS
from registry.errors import UserError

FOLDER = "tensorboard"


def check() -> None:
    """Raises UserError where the package is missing."""
    try:
        import tensorboard  # noqa: F401
    except ImportError as error:
        raise UserError("--tensorboard needs a package: pip install tensorboard") from error


class TensorBoard:
    """A callback that writes each round into `tensorboard/` in a run's folder, and passes it on to another callback.

    Args:
        folder: the run's.
        then: the other callback.
    """

    def __init__(self, folder: Path, then: Callback) -> None:
        self.folder, self.then = folder, then
        self._writer = None

    def on_round(self, record: RoundRecord) -> None:
        """`<view>/<figure>`, `train_loss`, `bytes/...`, `seconds/...` and `server/...` of a round."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # rounds that an interrupted run wrote, but did not save, are not shown any more
            self._writer = SummaryWriter(str(self.folder / FOLDER), purge_step=record.round)
        scalars = {"train_loss": record.train_loss, "bytes/up": record.bytes_up, "bytes/down": record.bytes_down}
        scalars |= {f"seconds/{part}": record.seconds[part] for part in PARTS}
        scalars |= {f"server/{name}": value for name, value in record.server.items()}
        for view, metrics in record.metrics.items():
            scalars |= {f"{view}/{name}": getattr(metrics, name) for name in SCALARS}
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, record.round)
        self._writer.flush()
        self.then.on_round(record)
