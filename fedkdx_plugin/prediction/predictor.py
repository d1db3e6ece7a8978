"""What a client of a finished run predicts with, on windows and on whole recordings."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from dataset_utils.scaling import Scaling
from fedkdx_plugin.engine.data import memory_format
from fedkdx_plugin.engine.evaluation import CHUNK
from fedkdx_plugin.prediction.recordings import Cut, Cutter
from fedkdx_plugin.results.runs import Run
from registry.errors import UserError
from registry.interface import mixture

if TYPE_CHECKING:
    import pandas as pd


class Served(nn.Module):
    """The networks that a client predicts with, as one module: scaled windows (n, channels, 1, time) to logits.

    Args:
        nets: by name.
        serves: which of them, or their shares, as `Client.serves` says.
    """

    def __init__(self, nets: Mapping[str, nn.Module], serves: str | Mapping[str, float]) -> None:
        super().__init__()
        self.nets, self.serves = nn.ModuleDict(nets), serves

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n, classes), of which a softmax gives the probabilities."""
        return mixture({name: net(x).logits for name, net in self.nets.items()}, self.serves)


@dataclass(frozen=True, eq=False)
class Predicted:
    """Predictions, a row for each window.

    Attributes:
        classes: names of the classes.
        probabilities: (n, classes), float32.
        time: (n, 2), when each window begins and ends, seconds on the recording's own clock (see `Cut`); None for
            windows whose time is not known.
        recordings: name of the recording that each window is of; empty where that is not known.
        notes: what was mended, found out or left out in reading, a line each.
    """

    classes: tuple[str, ...]
    probabilities: np.ndarray
    time: np.ndarray | None = None
    recordings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def labels(self) -> list[str]:
        """Name of the most probable class of each window; of two as probable, the first."""
        return [self.classes[index] for index in self.probabilities.argmax(axis=1)]

    @functools.cached_property
    def table(self) -> pd.DataFrame:
        """The predictions as a table: `start`, `end` (s), `class`, `probability`, and `p(CLASS)` for each class.

        `start` and `end` are left out where they are not known; `recording` comes first where there are several.
        """
        import pandas as pd

        columns: dict[str, Any] = {}
        if len(set(self.recordings)) > 1:
            columns["recording"] = self.recordings
        if self.time is not None:
            columns |= {"start": self.time[:, 0], "end": self.time[:, 1]}
        columns |= {"class": self.labels, "probability": self.probabilities.max(axis=1)}
        columns |= {f"p({name})": self.probabilities[:, k] for k, name in enumerate(self.classes)}
        return pd.DataFrame(columns)


@dataclass(frozen=True, eq=False)
class Predictor:
    """A trained model with the preprocessing of its run; `load_model` makes one.

    Attributes:
        run: the finished run.
        client: whose model it is; None: the one that all clients share.
        round: after which it was saved.
        manifest: of the run's data.
        network: takes scaled windows, gives logits.
        scaling: of windows in physical units; None where the run's windows were not scaled.
        own_scaling: every client scales by its own windows, so that there is no scaling for `client` None.
    """

    run: Run
    client: int | None
    round: int
    manifest: Mapping[str, Any] = field(repr=False)
    network: Served = field(repr=False)
    scaling: Scaling | None = field(repr=False)
    own_scaling: bool = False

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.run.classes

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of a window's channels, after filtering."""
        return tuple(self.manifest["channels"])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, 1, time) of a window."""
        channels, one, time = self.manifest["shape"]
        return channels, one, time

    @functools.cached_property
    def cutter(self) -> Cutter:
        """What cuts recordings into windows. Raises UserError where the run's windows came cut or imported."""
        return Cutter(self.run.folder, self.manifest)

    def predict(self, recording: str | os.PathLike[str] | np.ndarray, rate: float | None = None) -> Predicted:
        """Predict on a recording, which is resampled, filtered, cut and scaled as the run's own were.

        Args:
            recording: a file, read as the run's data set was (see `Cutter.file`); or an array (channels, time) of the
                recorded channels in physical units, NaN where a value is missing.
            rate: of an array, Hz.

        Raises:
            UserError: a file that is missing, damaged or lacks a channel, values that do not fit, or less than a
                window.
        """
        cut = self.windows(recording, rate)
        logits = self.logits(self.scaled(cut.x))
        return Predicted(self.classes, _probabilities(logits), cut.time, cut.recordings, cut.notes)

    def predict_windows(self, x: np.ndarray, scaled: bool = False) -> Predicted:
        """Predict on windows that are cut and filtered already.

        Args:
            x: (n, channels, time) or (n, channels, 1, time).
            scaled: they are scaled already; otherwise they are in physical units.

        Raises:
            UserError: another shape, no window, or values that are not finite.
        """
        x = self._checked(x)
        return Predicted(self.classes, _probabilities(self.logits(x if scaled else self.scaled(x))))

    def windows(self, recording: str | os.PathLike[str] | np.ndarray, rate: float | None = None) -> Cut:
        """Cut a recording into windows, in physical units. Arguments and errors as of `predict`."""
        if isinstance(recording, str | os.PathLike):
            if rate is not None:
                raise UserError(f"{recording}: leave the rate out; times, or the description, say the rate of a file")
            return self.cutter.file(Path(recording))
        if rate is None:
            raise UserError("a recording that is an array needs its rate, in Hz")
        return self.cutter.array(recording, rate)

    def scaled(self, x: np.ndarray) -> np.ndarray:
        """Scale windows (n, channels, 1, time) in physical units as the run's were. Raises UserError; see `scaling`."""
        if self.own_scaling and self.client is None:
            raise UserError(
                f"{self.run.folder}: every client scaled by its own training windows, so that the shared model alone "
                "cannot scale: name a client, or give windows that are scaled"
            )
        return x if self.scaling is None else self.scaling(x)

    @torch.inference_mode()
    def logits(self, x: np.ndarray) -> np.ndarray:
        """Return logits (n, classes), float32, of scaled windows (n, channels, 1, time), computed as in evaluation."""
        windows = torch.from_numpy(np.ascontiguousarray(x)).to(memory_format=memory_format(torch.device("cpu")))
        return torch.cat([self.network(chunk) for chunk in windows.split(CHUNK)]).numpy()

    def _checked(self, x: np.ndarray) -> np.ndarray:
        """Windows as (n, channels, 1, time), float32."""
        x = np.asarray(x)
        given, (channels, _, time) = x.shape, self.shape
        if x.ndim == 3:
            x = x[:, :, None]
        if x.ndim != 4 or x.shape[1:] != self.shape or x.dtype.kind not in "fiu":
            raise UserError(
                f"windows must be numbers of shape (n, {channels}, {time}) or (n, {channels}, 1, {time}), "
                f"not {x.dtype} of shape {given}"
            )
        if not len(x):
            raise UserError("there is no window to predict on")
        with np.errstate(over="ignore"):
            x = x.astype(np.float32)
        if wrong := x.size - np.count_nonzero(np.isfinite(x)):
            raise UserError(f"{wrong} of {x.size} values of the windows are NaN, infinite or too large")
        return x


def _probabilities(logits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(logits).softmax(1).numpy()
