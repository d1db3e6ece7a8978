"""Messages between server and clients, and checks of what a server receives."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from registry.tensors import copied
from registry.tensors import first_nonfinite as first_nonfinite  # belongs to the checks of a reply

LENGTH = 8  # bytes of the field that holds the header's length; the header is padded to a multiple of it


class BadMessage(ValueError):
    """Bytes or contents that are not a valid message; the text says what is wrong."""


class NonFinite(ValueError):
    """A tensor holds NaN or infinity; the text names it. The engine drops the client's update of this round."""


@dataclass(frozen=True)
class Message:
    """Named tensors and metadata, the only information that a server and a client exchange.

    Attributes:
        tensors: name -> tensor.
        meta: name -> JSON value (numbers, text, booleans, lists, dicts with text keys).
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Serialise the message as safetensors, with the metadata as JSON in the header. No pickle."""
        tensors, storages = {}, set()
        for name, tensor in self.tensors.items():
            tensor = tensor.detach().cpu().contiguous()
            storage = tensor.untyped_storage().data_ptr()
            tensors[name] = tensor.clone() if storage in storages else tensor  # safetensors refuses shared memory
            storages.add(storage)
        return safetensors.torch.save(tensors, {"meta": self._meta_text()})

    @staticmethod
    def from_bytes(data: bytes, device: torch.device | str = "cpu") -> Message:
        """Deserialise the message that `to_bytes` wrote. Raises BadMessage."""
        try:
            tensors = safetensors.torch.load(data)
            header = json.loads(data[LENGTH : LENGTH + int.from_bytes(data[:LENGTH], "little")])
            meta = json.loads(header["__metadata__"]["meta"])
        except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise BadMessage(f"not a message: {error}") from error
        if not isinstance(meta, dict):
            raise BadMessage("not a message: its metadata is no mapping")
        return Message({name: tensors[name].to(device) for name in sorted(tensors)}, meta)

    def size(self) -> int:
        """Compute the number of bytes of `to_bytes` without making them; nothing is fetched from a device."""
        meta = json.dumps(self._meta_text(), ensure_ascii=False).encode()
        kinds = tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in sorted(self.tensors.items()))
        header = _header_size(kinds) + len(meta) - len('""')
        data = sum(tensor.nbytes for tensor in self.tensors.values())
        return LENGTH + header + -header % LENGTH + data

    def copy(self, device: torch.device | str) -> Message:
        """Copy the message, as the other side would read it, to a device; see `copied` for the memory."""
        tensors = copied(self.tensors, device)
        return Message({name: tensors[name] for name in sorted(tensors)}, json.loads(self._meta_text()))

    def _meta_text(self) -> str:
        return json.dumps(self.meta, sort_keys=True, allow_nan=False)


@lru_cache(maxsize=4096)
def _header_size(kinds: tuple[tuple[str, tuple[int, ...], torch.dtype], ...]) -> int:
    """Return the bytes of a message's header without metadata, before it is padded to a multiple of `LENGTH`.

    Args:
        kinds: name, shape and dtype of each tensor.
    """
    # measured with the library, which decides the order of tensors and so the number of digits of their offsets
    data = safetensors.torch.save({name: torch.zeros(shape, dtype=kind) for name, shape, kind in kinds}, {"meta": ""})
    return len(data[LENGTH : LENGTH + int.from_bytes(data[:LENGTH], "little")].rstrip(b" "))


def check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise BadMessage unless tensors have the names, shapes and dtypes of the expected ones."""
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
    """Return the number of samples that a reply states. Raises BadMessage if it is missing or not positive."""
    samples = reply.meta.get("samples")
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise BadMessage(f"'samples' must be a positive whole number, not {samples!r}")
    return samples


def check_state(reply: Message, expected: Mapping[str, Tensor]) -> None:
    """Raise BadMessage unless a reply holds state of the expected form, and `samples`."""
    check_tensors(reply.tensors, expected)
    check_samples(reply)
