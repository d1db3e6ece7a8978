"""Form of the protocol's messages; whatever arrives is checked here before it is used.

    step     to a client                                       from a client
    keys     (it has trained)                                  public keys c and s; layout of its reply
    share    U1 and their public keys                          a box with two shares for each other client, digests
    mask     U2, their boxes for this client, and digests      its masked values
    unmask   U3                                                its share of b_u of each u in U3, of s_u of the others

Clients are in the order of their numbers everywhere; keys, boxes, digests and shares are bytes (uint8).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedkdx_plugin.privacy.secure_aggregation.fixed_point import MOST_CLIENTS
from fedkdx_plugin.privacy.secure_aggregation.masks import TAG_BYTES
from fedkdx_plugin.privacy.secure_aggregation.shamir import SHARE_BYTES
from registry.messages import BadMessage, Message
from registry.text import shown

KEYS, SHARE, MASK, UNMASK = "keys", "share", "mask", "unmask"
STEPS = (SHARE, MASK, UNMASK)  # of which a client is asked; its keys come with the news that it has trained
FEWEST = 2  # clients; the sum of a single one is no secret
BOX_BYTES = 2 * SHARE_BYTES + TAG_BYTES
MOST_ID = 10**9


def threshold(clients: int) -> int:
    """Return t, of how many of so many clients the shares give a secret back: two thirds, rounded up."""
    return max(FEWEST, math.ceil(2 * clients / 3))


def of_bytes(rows: Sequence[bytes], *shape: int) -> Tensor:
    """Return rows of bytes as a tensor of this shape."""
    return torch.from_numpy(np.frombuffer(b"".join(rows), dtype=np.uint8).copy()).reshape(shape)


def rows_of(message: Message, name: str, *shape: int) -> list[bytes]:
    """Return the rows of a tensor of bytes. Raises BadMessage unless it has this shape, whose last axis is a row's."""
    tensor = tensor_of(message, name, torch.uint8, *shape)
    data, width = tensor.cpu().contiguous().numpy().tobytes(), shape[-1]
    return [data[start : start + width] for start in range(0, len(data), width)]


def check_only(message: Message, tensors: Collection[str], meta: Collection[str] = ()) -> None:
    """Raise BadMessage if a message holds tensors or metadata of other names."""
    for what, found, right in (("tensor", message.tensors, tensors), ("metadata", message.meta, meta)):
        if extra := sorted(found.keys() - set(right)):
            raise BadMessage(f"{what} '{extra[0]}' is not expected")


def tensor_of(message: Message, name: str, kind: torch.dtype, *shape: int) -> Tensor:
    """Return a tensor of a message. Raises BadMessage unless it has this type and shape."""
    tensor = message.tensors.get(name)
    if tensor is None:
        raise BadMessage(f"tensor '{name}' is missing")
    if tensor.dtype != kind or tuple(tensor.shape) != shape:
        raise BadMessage(f"tensor '{name}' is {tuple(tensor.shape)} {tensor.dtype}, not {shape} {kind}")
    return tensor


def clients_of(message: Message, name: str = "clients") -> list[int]:
    """Return the numbers of clients that a message states. Raises BadMessage unless they ascend and are bounded."""
    found: Any = message.meta.get(name)
    if not isinstance(found, list) or len(found) > MOST_CLIENTS:
        raise BadMessage(f"'{name}' is no list of clients")
    if not all(type(id) is int and 0 <= id <= MOST_ID for id in found) or found != sorted(set(found)):
        raise BadMessage(f"'{name}' is {shown(found)}; different numbers of clients in their order are right")
    return found
