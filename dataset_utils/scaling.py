"""Scaling of channels by statistics of training windows: of a client's own, or of all clients together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

MOST = 2**53  # samples; beyond, float64 does not represent every whole number
LARGEST = float(np.finfo(np.float32).max)  # largest sample, and so largest mean


class Statistics(NamedTuple):
    """Statistics of a client's training windows: three numbers for each channel.

    Attributes:
        count: (channels,), int64, number of samples; a sample that overlapping windows share counts in each.
        mean: (channels,), float64.
        variance: (channels,), float64, of the population (divided by the count).
    """

    count: np.ndarray  # type: ignore[assignment]  # hides tuple.count, which nobody calls
    mean: np.ndarray
    variance: np.ndarray

    def to_dict(self) -> dict[str, list[float]]:
        """Return the statistics as JSON values."""
        return {name: values.tolist() for name, values in self._asdict().items()}

    @staticmethod
    def from_dict(values: Mapping[str, Any], channels: int, samples: int | None = None) -> Statistics:
        """Return the statistics that `to_dict` converted.

        Args:
            values: result of `to_dict`, possibly from an untrusted source.
            channels: number of channels.
            samples: number of samples of each channel; None if it is not known.

        Raises:
            ValueError: these cannot be statistics of so many float32 samples.
        """
        try:
            found = {name: list(values[name]) for name in Statistics._fields}
        except (KeyError, TypeError) as error:
            raise ValueError(f"statistics without {error}") from error
        if any(len(own) != channels for own in found.values()):
            raise ValueError(f"statistics of other than {channels} channels")
        if any(isinstance(v, bool) or not isinstance(v, int | float) for own in found.values() for v in own):
            raise ValueError("statistics that are no numbers")
        if not all(isinstance(n, int) and 0 < n <= MOST and samples in (None, n) for n in found["count"]):
            raise ValueError(f"statistics of other than {samples or 'one or more'} samples")
        if not all(abs(v) <= LARGEST for v in found["mean"]):
            raise ValueError("a mean that is no number, or larger than a sample can be")
        if not all(0 <= v <= LARGEST**2 for v in found["variance"]):
            raise ValueError("a variance that is no number, negative, or larger than samples can give")
        return Statistics(
            np.array(found["count"], np.int64), np.array(found["mean"], float), np.array(found["variance"], float)
        )

    def scaling(self) -> Scaling:
        """Return the scaling to mean 0 and standard deviation 1."""
        deviation = np.sqrt(self.variance)
        return Scaling(self.mean, np.where(deviation > 0, deviation, 1.0))


class Scaling(NamedTuple):
    """Scaling of x to (x - offset) / scale.

    Attributes:
        offset, scale: (channels,), float64; a channel that is constant in the training windows has scale 1.
    """

    offset: np.ndarray
    scale: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Return a scaled copy of (n, channels, 1, time), float32."""
        scaled: np.ndarray = (x - self.offset[:, None, None]) / self.scale[:, None, None]
        return scaled.astype(np.float32)


def statistics(x: np.ndarray) -> Statistics:
    """Return the statistics of each channel of x (n, channels, 1, time), over all windows and samples."""
    low, high = _range(x)
    mean = x.mean(axis=(0, 2, 3), dtype=np.float64)
    variance = x.var(axis=(0, 2, 3), dtype=np.float64)
    # tested by equality, because rounding gives a constant channel a variance just above 0
    constant = low == high
    count = np.full(x.shape[1], x.size // x.shape[1], np.int64)
    return Statistics(count, np.where(constant, low, mean), np.where(constant, 0.0, variance))


def pooled(parts: Iterable[Statistics]) -> Statistics:
    """Pool statistics: those of all samples together, from those of the parts, added in the given order.

    Chan, Golub, LeVeque 1979 (Stanford report STAN-CS-79-773), in float64.
    """
    first, *others = parts
    count, mean, squares = first.count, first.mean, first.variance * first.count
    for part in others:
        total = count + part.count
        delta = part.mean - mean
        squares = squares + part.variance * part.count + delta**2 * (count * (part.count / total))
        mean = mean + delta * (part.count / total)
        count = total
    return Statistics(count, mean, squares / count)


def fit(x: np.ndarray, how: str) -> Scaling | None:
    """Return the scaling by a client's own training windows x (n, channels, 1, time); None for 'federated' and 'none'.

    `client` gives mean 0 and standard deviation 1, `minmax` the range 0 to 1.
    """
    if how in ("federated", "none"):
        return None
    if how == "client":
        return statistics(x).scaling()
    low, high = _range(x)
    return Scaling(low, np.where(high == low, 1.0, high - low))


def _range(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x.min(axis=(0, 2, 3)).astype(np.float64), x.max(axis=(0, 2, 3)).astype(np.float64)
