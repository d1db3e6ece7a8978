"""A client's windows as somebody's own code loads them: arrays, tensors, or PyTorch's Datasets and DataLoaders."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index  # of a number that is whole: int would make 1 of 1.7
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from dataset_utils.shards import Shard
from fedkdx_plugin.flower.apps.models import as_shape
from fedkdx_plugin.flower.site import LocalData, SiteSetup
from registry.errors import UserError

NAME = "app"  # of the data, which are somebody's own
FORMS = "(x_train, y_train, x_test, y_test), or a Dataset or DataLoader for training and one for testing"


class AppData(LocalData):
    """A client's windows, in memory.

    Args:
        client: the client's number.
        loaded: what the user's function returned.
        own: shape of one window, as the user's networks take it.
        classes: number of classes.
        device: device to compute on.

    Raises:
        UserError: what was loaded are no windows of this shape, or no labels of these classes.
    """

    def __init__(self, client: int, loaded: object, own: Sequence[int], classes: int, device: torch.device) -> None:
        nowhere = Path()  # nothing of an app's client lies on disk
        self.setup = SiteSetup(client, nowhere, 0, nowhere, device)
        own = tuple(own)
        parts = tuple(loaded) if isinstance(loaded, (tuple, list)) else ()
        if len(parts) == 2:
            parts = (*_of_dataset(parts[0], "training"), *_of_dataset(parts[1], "test"))
        if len(parts) != 4:
            raise UserError(f"data: the function must return {FORMS}, not {_described(loaded)}")
        self.train = _shard(parts[0], parts[1], own, classes, "training")
        self.test = _shard(parts[2], parts[3], own, classes, "test")
        if not len(self.train.y):
            raise UserError("data: no training windows; every client needs one at least")
        self.manifest: dict[str, Any] = {
            "name": NAME,
            "shape": as_shape(own),
            "classes": [str(number) for number in range(classes)],
            "clients": [{}],
        }


def _of_dataset(given: object, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Return all windows and labels of a Dataset, in its order; of a DataLoader, its Dataset's."""
    data: Any = given.dataset if isinstance(given, DataLoader) else given
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__") or isinstance(data, (str, bytes, dict)):
        raise UserError(f"data: the {what} windows must be a Dataset with a length, not {type(data).__name__}")
    try:
        pairs = [data[number] for number in range(len(data))]
        x, y = zip(*pairs, strict=True) if pairs else ((), ())
        return _stacked(x), np.array([index(label) for label in y], dtype=np.int64)
    except (TypeError, ValueError) as error:
        raise UserError(f"data: each {what} window of the Dataset must be a pair (x, label): {error}") from error


def _stacked(windows: Sequence[Any]) -> np.ndarray:
    return np.stack([np.asarray(window) for window in windows]) if windows else np.empty(0)


def _shard(x: object, y: object, own: tuple[int, ...], classes: int, what: str) -> Shard:
    """Return windows (n, channels, 1, values), float32, and labels, int64. Raises UserError."""
    x, y = _array(x, f"{what} windows"), _array(y, f"{what} labels")
    if not len(x) and not len(y):
        x, y = np.empty((0, *own)), np.empty(0, dtype=np.int64)
    if x.shape[1:] not in (own, as_shape(own)):
        raise UserError(f"data: {what} windows of shape {x.shape[1:]}, but the strategy has shape={own}")
    if y.shape != x.shape[:1]:
        raise UserError(f"data: {len(x)} {what} windows, but labels of shape {y.shape}")
    if y.dtype.kind not in "iu":
        raise UserError(f"data: {what} labels are {y.dtype}; whole numbers from 0 to {classes - 1} are right")
    if len(y) and not 0 <= int(y.min()) <= int(y.max()) < classes:
        raise UserError(
            f"data: {what} labels from {y.min()} to {y.max()}; with classes={classes}, 0 to {classes - 1} are right"
        )
    with np.errstate(over="ignore"):  # which the next lines find
        x = x.reshape(len(x), *as_shape(own)).astype(np.float32)
    if not np.isfinite(x).all():
        raise UserError(f"data: {what} windows hold NaN or infinity, or what is too large for float32")
    return Shard(x, y.astype(np.int64))


def _array(values: object, what: str) -> np.ndarray:
    try:
        found = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    except (TypeError, ValueError) as error:
        raise UserError(f"data: {what} are no array: {error}") from error
    if found.dtype.kind not in "fiub" or not found.ndim:
        raise UserError(f"data: {what} are no array of numbers, but {found.dtype}")
    return found


def _described(loaded: object) -> str:
    return f"{len(loaded)} parts" if isinstance(loaded, (tuple, list)) else type(loaded).__name__
