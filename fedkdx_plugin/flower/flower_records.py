"""Our bytes in Flower's records, and back: one array of bytes in an ArrayRecord, which no pickle ever touches."""

from __future__ import annotations

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict

from registry.interface import BadMessage

RECORD, ARRAY = "fedkdx", "message"


def pack(data: bytes) -> RecordDict:
    """A message's bytes as the content of a Flower message."""
    return RecordDict({RECORD: ArrayRecord({ARRAY: Array(np.frombuffer(data, dtype=np.uint8))})})


def unpack(content: RecordDict) -> bytes:
    """What `pack` packed. Raises BadMessage."""
    try:
        array = content.array_records[RECORD][ARRAY].numpy()
    except (KeyError, TypeError, ValueError) as error:
        raise BadMessage(f"not one of our messages: {type(error).__name__} {error}") from error
    if array.dtype != np.uint8 or array.ndim != 1:
        raise BadMessage(f"not one of our messages: an array of {array.dtype}, {array.ndim} dimensions")
    return array.tobytes()
