"""SPAR: shoulder physiotherapy exercises from a smartwatch, as the package `seglearn` carries them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dataset_utils.recording import Preprocessing, Recording, Source
from dataset_utils.safe_pickle import load_npy
from registry.errors import UserError

FILE = "watch_dataset.npy"
LABELS = ["PEN", "ABD", "FEL", "IR", "ER", "TRAP", "ROW"]
CHANNELS = ["ax", "ay", "az", "wx", "wy", "wz"]


class SPAR(Source):
    """Shoulder physiotherapy: 10 subjects, 7 exercises, both sides; a watch at 50 Hz; comes with seglearn."""

    name = "SPAR"
    paper = "Burns et al. 2018, Physiol. Meas. 39(7) 075007, doi:10.1088/1361-6579/aacfd9, arXiv:1802.01489"
    # Named as on the authors' page of the data set (github.com/dmbee/SPAR-dataset).
    classes = (
        "pendulum",
        "abduction",
        "forward elevation",
        "internal rotation",
        "external rotation",
        "lower trapezius row",
        "bent-over row",
    )
    channels = ("acc_x", "acc_y", "acc_z", "gyro_x", "gyro_y", "gyro_z")  # g, rad/s
    acceleration = ("acc_x", "acc_y", "acc_z")
    preprocessing = Preprocessing(rate=50.0, window=128, overlap=0.5)

    def find(self, raw: Path | None, data_root: Path, download: bool) -> Path:
        """Find the file in the package seglearn, which is not imported; see `Source.find`."""
        if raw is not None:
            path = raw / FILE if raw.is_dir() else raw
            if not path.is_file():
                raise UserError(f"{path}: there is no such file; SPAR is seglearn's '{FILE}' (pip install seglearn)")
            return path
        spec = importlib.util.find_spec("seglearn")
        folders = spec.submodule_search_locations if spec else None
        for folder in folders or []:
            path = Path(folder) / "data" / FILE
            if path.is_file():
                return path
        raise UserError(f"SPAR comes with the package seglearn: pip install seglearn (or --raw path/to/{FILE})")

    def files(self, path: Path) -> list[Path]:
        """Return the one file; see `Source.files`."""
        return [path]

    def load(self, path: Path) -> Iterator[Recording]:
        """Yield one recording for each exercise and side, in the order of subjects."""
        data = load_npy(path)
        if not isinstance(data, dict) or not {"X", "y", "subject", "y_labels", "X_labels"} <= data.keys():
            raise UserError(f"{path}: is not seglearn's '{FILE}' (no dictionary with X, y, subject and their labels)")
        signals, exercises, subjects = data["X"], np.asarray(data["y"]), np.asarray(data["subject"])
        if list(data["y_labels"]) != LABELS or list(data["X_labels"]) != CHANNELS:
            raise UserError(f"{path}: its labels or channels are not those of seglearn's '{FILE}'")
        if not len(signals) == len(exercises) == len(subjects) or not set(exercises) <= set(range(len(LABELS))):
            raise UserError(f"{path}: X, y and subject do not fit together")
        for index in np.argsort(subjects, kind="stable"):
            signal = np.asarray(signals[index])
            if signal.ndim != 2 or signal.shape[1] != len(CHANNELS) or signal.dtype.kind != "f":
                raise UserError(f"{path}: recording {index} is not a float array of (samples, {len(CHANNELS)})")
            labels = np.full(len(signal), exercises[index], dtype=np.int64)
            yield Recording(str(subjects[index]), signal, labels)
