"""A message's bytes as the content of one of Flower's messages: one array in an ArrayRecord, never a pickle.

Imports no PyTorch, which a site's connection does without.
"""

from __future__ import annotations

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict

RECORD, ARRAY = "fedkdx", "message"  # names in a Flower message


def pack(data: bytes) -> RecordDict:
    """Return a message's bytes as the content of a Flower message."""
    return RecordDict({RECORD: ArrayRecord({ARRAY: Array(np.frombuffer(data, dtype=np.uint8))})})


def unpack(content: RecordDict) -> bytes:
    """Return the bytes that `pack` packed. Raises ValueError."""
    try:
        array = content.array_records[RECORD][ARRAY].numpy()
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not one of our messages: {type(error).__name__} {error}") from error
    if array.dtype != np.uint8 or array.ndim != 1:
        raise ValueError(f"not one of our messages: an array of {array.dtype}, {array.ndim} dimensions")
    return bytes(array.tobytes())
