"""Predictions with the model of a finished run, on windows and on whole recordings."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from dataset_utils.counts import many
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
    """Networks that a client predicts with, as one module: scaled windows (n, channels, 1, time) to logits.

    Args:
        nets: name -> network.
        serves: name of the network that predicts, or name -> share, as returned by `Client.serves`.
    """

    def __init__(self, nets: Mapping[str, nn.Module], serves: str | Mapping[str, float]) -> None:
        super().__init__()
        self.nets, self.serves = nn.ModuleDict(nets), serves

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n, classes); their softmax is the probabilities."""
        return mixture({name: net(x).logits for name, net in self.nets.items()}, self.serves)


@dataclass(frozen=True, eq=False, repr=False)
class Predicted:
    """Predictions, a row for each window.

    Attributes:
        classes: names of the classes.
        probabilities: (n, classes), float32; NaN for a window of which the model gives NaN or infinite values.
        time: (n, 2), start and end of each window in seconds on the recording's own clock (see `Cut`); None if not
            known.
        recordings: name of each window's recording; empty if not known.
        notes: lines about what was corrected, detected or left out in reading, and about windows without a class.
    """

    classes: tuple[str, ...]
    probabilities: np.ndarray
    time: np.ndarray | None = None
    recordings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """Return what it is in a line."""
        return f"<Predicted: {many(len(self.probabilities), 'window')}, {len(self.classes)} classes; see .table>"

    @property
    def labels(self) -> list[str | None]:
        """Name of the most probable class of each window; the first of a tie, None where there are no probabilities."""
        known = np.isfinite(self.probabilities).all(axis=1)
        best = self.probabilities.argmax(axis=1)
        return [self.classes[index] if there else None for index, there in zip(best, known, strict=True)]

    @functools.cached_property
    def table(self) -> pd.DataFrame:
        """The predictions as a table: `start`, `end` (s), `class`, `probability`, and `p(CLASS)` for each class.

        `start` and `end` are left out if they are not known; `recording` comes first if there are several. The fields
        of a window without a class are missing values.
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


@dataclass(frozen=True, eq=False, repr=False)
class Predictor:
    """Trained model with the preprocessing of its run; `load_model` returns one.

    Attributes:
        run: the finished run; of a site's model, without records.
        client: number of the model's client; None: the shared model.
        round: number of rounds of training.
        manifest: manifest of the run's data.
        network: networks that predict: scaled windows to logits.
        scaling: scaling of windows in physical units; None if the run's windows were not scaled.
        own_scaling: whether every client scales by its own windows, so that there is no scaling for `client` None.
        shard: number of the client's windows in the manifest: at a site, not the client's; None of the shared model.
        notes: lines about the model, which come with every prediction on a recording.
    """

    run: Run
    client: int | None
    round: int
    manifest: Mapping[str, Any]
    network: Served
    scaling: Scaling | None
    own_scaling: bool = False
    shard: int | None = None
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """Return in a line whose model it is, and of which windows."""
        whose = "shared model" if self.client is None else f"model of client {self.client}"
        channels, _, time = self.shape
        return (
            f"<Predictor: {self.run.name}, {whose} after round {self.round}; windows of {many(channels, 'channel')} "
            f"and {time} samples, {len(self.classes)} classes; {self.run.folder}>"
        )

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
        """Cutter of recordings. Raises UserError: the run's windows were not cut from recordings."""
        return Cutter(self.run.folder, self.manifest)

    def predict(self, recording: str | os.PathLike[str] | np.ndarray, rate: float | None = None) -> Predicted:
        """Predict on a recording, which is resampled, filtered, cut and scaled as those of the run were.

        Args:
            recording: a file, read as the run's data set was (see `Cutter.file`); or an array (channels, time) of the
                recorded channels in physical units, NaN where a value is missing.
            rate: sampling rate of an array, Hz.

        Raises:
            UserError: a file that is missing, damaged or lacks a channel, an array of another shape or type, a
                recording shorter than a window, or a model that gives no finite value for any window.
        """
        cut = self.windows(recording, rate)
        probabilities, notes = self._probabilities(self.scaled(cut.x))
        return Predicted(self.classes, probabilities, cut.time, cut.recordings, (*self.notes, *cut.notes, *notes))

    def predict_windows(self, x: np.ndarray, scaled: bool = False) -> Predicted:
        """Predict on windows that are already cut and filtered.

        Args:
            x: (n, channels, time) or (n, channels, 1, time).
            scaled: whether they are already scaled; otherwise they are in physical units.

        Raises:
            UserError: another shape, no window, values that are not finite, or a model that gives no finite value for
                any window.
        """
        x = self._checked(x)
        probabilities, notes = self._probabilities(x if scaled else self.scaled(x))
        return Predicted(self.classes, probabilities, notes=notes)

    def windows(self, recording: str | os.PathLike[str] | np.ndarray, rate: float | None = None) -> Cut:
        """Cut a recording into windows, in physical units. Arguments and errors as in `predict`."""
        if isinstance(recording, str | os.PathLike):
            if rate is not None:
                raise UserError(
                    f"{recording}: leave the rate out; the rate of a file is in its times or in the description"
                )
            return self.cutter.file(Path(recording))
        if rate is None:
            raise UserError("the rate of an array is missing; give `rate`, in Hz")
        return self.cutter.array(recording, rate)

    def scaled(self, x: np.ndarray) -> np.ndarray:
        """Scale windows (n, channels, 1, time) in physical units as the run's were. Raises UserError; see `scaling`."""
        if self.own_scaling and self.client is None:
            raise UserError(
                f"{self.run.folder}: every client scaled by its own training windows, so that the shared model has no "
                "scaling; name a client, or give windows that are scaled"
            )
        return x if self.scaling is None else self.scaling(x)

    @torch.inference_mode()
    def logits(self, x: np.ndarray) -> np.ndarray:
        """Return logits (n, classes), float32, of scaled windows (n, channels, 1, time), computed as in evaluation."""
        windows = torch.from_numpy(np.ascontiguousarray(x)).to(memory_format=memory_format(torch.device("cpu")))
        return torch.cat([self.network(chunk) for chunk in windows.split(CHUNK)]).numpy()

    def _probabilities(self, x: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
        """Return probabilities (n, classes) of scaled windows, and a note on the windows that have none, if any.

        A window has none, but NaN, where a logit is NaN or infinite, which evaluation counts as a wrong prediction.

        Raises:
            UserError: no window has any.
        """
        logits = self.logits(x)
        wrong = ~np.isfinite(logits).all(axis=1)
        count, whose = int(wrong.sum()), "shared model" if self.client is None else f"model of client {self.client}"
        if count == len(logits):
            raise UserError(
                f"{self.run.folder}: the {whose} gives NaN or infinite values for all {count} windows, so that it "
                "predicts nothing; use a run that did not diverge ('nonfinite' in its metrics.csv is 0)"
            )
        probabilities = torch.from_numpy(logits).softmax(1).numpy()
        probabilities[wrong] = np.nan
        note = f"windows without a class: {count} of {len(logits)}; the {whose} gives NaN or infinite values for them"
        return probabilities, (note,) if count else ()

    def _checked(self, x: np.ndarray) -> np.ndarray:
        """Return windows as (n, channels, 1, time), float32. Raises UserError."""
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
            raise UserError("there is no window to predict on; give at least one")
        with np.errstate(over="ignore"):
            x = x.astype(np.float32)
        if wrong := x.size - np.count_nonzero(np.isfinite(x)):
            raise UserError(
                f"{wrong} of {x.size} values of the windows are NaN, infinite or too large; leave those windows out"
            )
        return x
