"""What travels between server and client, and how a server makes sure of what it was sent."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor


class BadMessage(ValueError):
    """Bytes or contents that are no message of this protocol; the text says what is wrong."""


class NonFinite(ValueError):
    """A tensor holds NaN or infinity; the text names it. The engine drops the client's work of this round."""


@dataclass(frozen=True)
class Message:
    """Named tensors and plain metadata: all that a server and a client know of each other.

    Attributes:
        tensors: name -> tensor.
        meta: name -> what JSON can say (numbers, text, booleans, lists, dicts with text keys).
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The message as it travels: safetensors, the metadata as JSON in its header. No pickle."""
        tensors, storages = {}, set()
        for name, tensor in self.tensors.items():
            tensor = tensor.detach().cpu().contiguous()
            storage = tensor.untyped_storage().data_ptr()
            tensors[name] = tensor.clone() if storage in storages else tensor  # safetensors refuses shared memory
            storages.add(storage)
        return safetensors.torch.save(tensors, {"meta": json.dumps(self.meta, sort_keys=True, allow_nan=False)})

    @staticmethod
    def from_bytes(data: bytes, device: torch.device | str = "cpu") -> Message:
        """The message that `to_bytes` wrote. Raises BadMessage."""
        try:
            tensors = safetensors.torch.load(data)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            meta = json.loads(header["__metadata__"]["meta"])
        except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise BadMessage(f"not a message: {error}") from error
        if not isinstance(meta, dict):
            raise BadMessage("not a message: its metadata is no mapping")
        return Message({name: tensors[name].to(device) for name in sorted(tensors)}, meta)


def first_nonfinite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first floating-point tensor that holds NaN or infinity; asks the device once for all.

    By least and greatest values, which let NaN through: `isfinite` of a large tensor takes twenty times as long.
    """
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel()}
    if not floats:
        return None
    # PyTorch knows of no order, and no infinity, in types of one byte
    wide = (tensor if tensor.itemsize > 1 else tensor.float() for tensor in floats.values())
    ends = torch.stack([end for tensor in wide for end in tensor.aminmax()])
    finite = ends.isfinite().view(-1, 2).all(1).tolist()
    return None if all(finite) else list(floats)[finite.index(False)]


def check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise BadMessage unless tensors have the expected ones' names, shapes and types."""
    for name, like in expected.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise BadMessage(f"tensor '{name}' is missing")
        if tensor.shape != like.shape or tensor.dtype != like.dtype:
            found, right = (f"{tuple(t.shape)} {t.dtype}" for t in (tensor, like))
            raise BadMessage(f"tensor '{name}' is {found}, not {right}")
    if extra := sorted(tensors.keys() - expected.keys()):
        raise BadMessage(f"tensor '{extra[0]}' is not expected")


def check_samples(reply: Message) -> int:
    """The number of samples that a reply states. Raises BadMessage where it is missing or not positive."""
    samples = reply.meta.get("samples")
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise BadMessage(f"'samples' must be a positive whole number, not {samples!r}")
    return samples


def check_state(reply: Message, expected: Mapping[str, Tensor]) -> None:
    """Raise BadMessage unless a reply holds state like the expected one, and `samples`."""
    check_tensors(reply.tensors, expected)
    check_samples(reply)
