"""MIT-BIH Arrhythmia: heartbeats by kind."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dataset_utils.recording import UNLABELLED, Preprocessing, Recording
from dataset_utils.sources.archive import open_archive
from dataset_utils.sources.fetch import ArchiveSource, Place
from dataset_utils.sources.own.description import Dialect
from dataset_utils.sources.own.signal_files import read_wfdb, wfdb_annotations
from dataset_utils.sources.own.table import Wanted
from registry.errors import UserError

RATE = 360.0
LEAD = "MLII"
KINDS = {"N": "NLRej", "S": "AaJS", "V": "VE", "F": "F"}
"""Classes of ANSI/AAMI EC57 and the symbols of their beats; the fifth, Q (unknown beats), is left out."""
UNKNOWN = "/fQ"
PACED = ("102", "104", "107", "217")
"""Records of patients with pacemakers, which EC57 leaves out."""
TWICE = {"202": "201"}
"""Records of the same patient."""


class MITBIH(ArchiveSource):
    """Heartbeats: 43 patients, 4 kinds of beats by ANSI/AAMI EC57; ECG lead MLII at 360 Hz; needs wfdb."""

    name = "MIT-BIH"
    paper = "Moody and Mark 2001, IEEE Eng. Med. Biol. 20(3) 45-50, doi:10.1109/51.932724; data doi:10.13026/C2F305"
    classes = tuple(KINDS)
    channels = (LEAD,)  # mV
    preprocessing = Preprocessing(
        rate=RATE, window=252, overlap=0.0, median=0, lowpass=0.0, gravity=0.0, before=90 / RATE
    )
    place = Place(
        key="100.hea",
        usual=("mit-bih-arrhythmia-database-1.0.0.zip", "mit-bih-arrhythmia-database-1.0.0", "mitdb"),
        link="https://doi.org/10.13026/C2F305",
    )
    members = ("[0-9]*.atr", "[0-9]*.dat", "[0-9]*.hea")

    def load(self, path: Path) -> Iterator[Recording]:
        """Yield one recording for each record, whose labels mark beats; a window of 0.7 s begins 0.25 s before each."""
        if path.is_file():
            raise UserError(f"{path}: records are read from a folder only; unpack the zip and name the folder")
        with open_archive(path, self.place.key) as archive:
            names, root = archive.match("[0-9]*.hea"), Path(archive.root)
        left = [Path(name).stem for name in names if Path(name).stem in PACED]
        if left:
            warnings.warn(f"records of patients with pacemakers are left out: {', '.join(left)}", stacklevel=2)
        for name in names:
            record = Path(name).stem
            if record in PACED:
                continue
            table = read_wfdb(root / name, Wanted((LEAD,), None, ()), Dialect())
            marks = wfdb_annotations((root / name).with_suffix(".atr"))
            labels = np.full(len(table.signals), UNLABELLED, dtype=np.int64)
            left_out: Counter[str] = Counter()
            for second, symbol in zip(marks.onset, marks.labels, strict=True):
                kind = next((index for index, symbols in enumerate(KINDS.values()) if symbol in symbols), None)
                if kind is not None:
                    labels[round(second * table.rate)] = kind
                elif symbol in UNKNOWN:
                    left_out["beats of class Q"] += 1
            yield Recording(
                TWICE.get(record, record), table.signals, labels, name=record, rate=table.rate, left_out=left_out
            )
