"""Limits on what is read from files: generous for real recordings, and checked before memory or time is taken.

The largest known inputs: PAMAP2 is 1.6 GB of text in a zip of 0.7 GB, Sleep-EDF has files of 50 MB and 8 GB in all,
WESAD has pickles of 1 GB. A header is believed only as far as its file can hold what it announces.
"""

from __future__ import annotations

import os

from registry.errors import UserError

UNPACKED = 50 << 30
"""Most bytes that a compressed file may hold; no data set here is larger."""
RATIO = 100
"""Largest compression ratio, checked above `RATIO_FROM` bytes: sensor text shrinks 4 to 20 times, a zip bomb 1000."""
RATIO_FROM = 1 << 28
MEMBERS = 1_000_000
"""Most files in a zip."""
HEADER = 1 << 16
"""Most bytes of the header of a WFDB record; real ones have some hundreds. NumPy limits its own to 10,000."""
YAML_BYTES, YAML_VALUES = 1 << 19, 100_000
"""Most bytes of a YAML file, and most values in it, each counted as often as aliases repeat it."""
DIGITS = 200
"""Most digits of a whole number in YAML; every such number, also in hexadecimal, is finite as a float."""
MANIFEST_BYTES = 512 << 20
"""Most bytes of a manifest; one of 100,000 clients takes 100 MB."""
PICKLED = 10_000_000
"""Most values in the lists and dictionaries of a pickle, each counted as often as it is referred to."""
CLASSES = 1_000
"""Most classes: a run's results hold a confusion matrix a round, and HDF5 takes at most 4,000 names."""
CHANNELS = 10_000
SUBJECTS = 100_000
RATE = 1e6
"""Highest sampling rate, Hz."""
WINDOW = 10_000_000
"""Most samples of a window."""
MEDIAN = 10_001
"""Widest median filter, samples."""
MAX_GAP = 3_600.0
"""Longest gap that may be interpolated, seconds."""


def check_unpacked(where: object, size: int, packed: int) -> None:
    """Raise UserError where `packed` bytes of a file cannot be what unpacks to `size` bytes.

    Args:
        where: name of the file, for the message.
        size: bytes that the contents would take, as a header announces them.
        packed: bytes of the file.
    """
    if size > UNPACKED or (size > RATIO_FROM and size > RATIO * packed):
        raise UserError(f"{where}: refused, {packed} bytes in it would unpack to {size} (a zip bomb?)")


def check_memory(where: object, size: float, advice: str) -> None:
    """Raise UserError where an array of `size` bytes is larger than this machine's memory."""
    memory = _memory()
    if size > memory:
        raise UserError(
            f"{where} would take {size / 1e9:.3g} GB of memory, this machine has {memory / 1e9:.3g} GB; {advice}"
        )


def check_count(where: object, count: int, most: int, what: str, advice: str) -> None:
    """Raise UserError for more than `most` classes, channels or subjects."""
    if count > most:
        raise UserError(f"{where}: {count} {what}, but at most {most} can be handled; {advice}")


def _memory() -> int:
    """Return the bytes of this machine's memory; where the system does not say, `UNPACKED`."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return UNPACKED
