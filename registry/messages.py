"""Messages between server and clients, and checks of what a server receives."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from registry.tensors import copied
from registry.tensors import first_nonfinite as first_nonfinite  # belongs to the checks of a reply
from registry.text import is_shown_as_it_is, shown

LARGEST_HEADER = 1 << 24  # bytes; a thousand layers take a hundredth of it
LONGEST_TENSOR_NAME = 1000  # letters
MOST_DIMENSIONS = 16
MOST_VALUES = 1 << 31  # as which the dimensions of a tensor without any may multiply
DEEPEST = 32  # nesting of metadata
LARGEST_WHOLE = 1 << 63  # what tensors and files hold as a whole number
MOST_SAMPLES = 10**12  # that one client may state
VARIANCE = ".running_var"  # how names of running variances end
LEAST_VARIANCE = -1e-6  # that rounding may leave of 0, and that the ε of batch norm makes up for
METADATA = "__metadata__"  # in a header, beside the tensors' names
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
        """Deserialise the message that `to_bytes` wrote, checked whole before anything of it is used.

        Header and metadata are bounded (see `LARGEST_HEADER` and what follows it) and hold no NaN or infinity; no
        tensor claims more than the data hold. Values of tensors may be anything.

        Raises:
            BadMessage: whatever else the bytes are; no other exception passes.
        """
        try:
            meta = _checked_meta(_checked_header(data))
            tensors = safetensors.torch.load(data)
        except BadMessage:
            raise
        except Exception as error:  # a library's own errors on bytes from outside, of any type
            raise BadMessage(f"not a message: {shown(error)}") from error
        return Message({name: tensors[name].to(device) for name in sorted(tensors)}, meta)

    def size(self) -> int:
        """Compute the number of bytes of `to_bytes` without making them; nothing is fetched from a device."""
        meta = json.dumps(self._meta_text(), ensure_ascii=False).encode()
        kinds = ((name, tensor.shape, tensor.dtype) for name, tensor in self.tensors.items())
        header = _header_size(kinds) + len(meta) - len('""')
        data = sum(tensor.nbytes for tensor in self.tensors.values())
        return LENGTH + header + -header % LENGTH + data

    def copy(self, device: torch.device | str) -> Message:
        """Copy the message, as the other side would read it, to a device; see `copied` for the memory."""
        tensors = copied(self.tensors, device)
        return Message({name: tensors[name] for name in sorted(tensors)}, json.loads(self._meta_text()))

    def _meta_text(self) -> str:
        return json.dumps(self.meta, sort_keys=True, allow_nan=False)


def _checked_header(data: bytes) -> Mapping[str, Any]:
    """Return the header of a message. Raises BadMessage unless it is bounded and its tensors fit into the data."""
    length = int.from_bytes(data[:LENGTH], "little")
    if not LENGTH + length <= len(data):
        raise BadMessage("not a message: it ends within its header")
    if length > LARGEST_HEADER:
        raise BadMessage(f"not a message: a header of {length} bytes; at most {LARGEST_HEADER} are allowed")
    header = json.loads(data[LENGTH : LENGTH + length])
    if not isinstance(header, dict):
        raise BadMessage("not a message: its header is no mapping")
    for name, tensor in header.items():
        if name == METADATA:
            continue
        if not is_shown_as_it_is(name, LONGEST_TENSOR_NAME):
            raise BadMessage(f"not a message: '{shown(name)}' cannot name a tensor")
        shape = tensor["shape"]
        if len(shape) > MOST_DIMENSIONS or any(type(size) is not int or size < 0 for size in shape):
            raise BadMessage(f"not a message: tensor '{name}' has the shape {shown(shape)}")
        # a tensor without values may have any other dimensions, which PyTorch multiplies all the same
        if math.prod(max(size, 1) for size in shape) > max(len(data), MOST_VALUES):
            raise BadMessage(f"not a message: tensor '{name}' has the shape {shown(shape)}")
    return header


def _checked_meta(header: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message's metadata. Raises BadMessage unless they are bounded, and finite."""
    meta = json.loads(header[METADATA]["meta"], parse_constant=_refuse_constant)
    if not isinstance(meta, dict):
        raise BadMessage("not a message: its metadata is no mapping")
    waiting: list[tuple[Any, int]] = [(meta, 0)]
    while waiting:
        value, depth = waiting.pop()
        if depth > DEEPEST:
            raise BadMessage(f"not a message: metadata nested more than {DEEPEST} deep")
        if isinstance(value, dict):
            waiting += [(inner, depth + 1) for inner in value.values()]
        elif isinstance(value, list):
            waiting += [(inner, depth + 1) for inner in value]
        elif isinstance(value, int) and not -LARGEST_WHOLE <= value < LARGEST_WHOLE:
            raise BadMessage("not a message: a whole number in its metadata has more than 64 bits")
        elif isinstance(value, float) and not math.isfinite(value):
            raise BadMessage("not a message: a number in its metadata is not finite")
    return meta


def _refuse_constant(name: str) -> None:
    raise BadMessage(f"not a message: {name} in its metadata")


def _header_size(kinds: Iterable[tuple[str, torch.Size, torch.dtype]]) -> int:
    """Return the bytes of a message's header without metadata, before it is padded to a multiple of `LENGTH`.

    Args:
        kinds: name, shape and dtype of each tensor.
    """
    kinds = list(kinds)
    types = _types_in_order(frozenset(kind for _, _, kind in kinds))
    header: dict[str, Any] = {METADATA: {"meta": ""}}
    end = 0
    for name, shape, kind in sorted(kinds, key=lambda one: (types[one[2]].place, one[0].encode())):
        start, end = end, end + shape.numel() * kind.itemsize
        header[name] = {"dtype": types[kind].name, "shape": shape, "data_offsets": (start, end)}
    return len(json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode())


class _Type(NamedTuple):
    """Name of a dtype in the library's files, and the place of its tensors among those of other dtypes."""

    name: str
    place: int


@lru_cache
def _types_in_order(types: frozenset[torch.dtype]) -> Mapping[torch.dtype, _Type]:
    """Ask the library in which order it stores tensors of several dtypes; those of one dtype are ordered by name."""
    data = safetensors.torch.save({str(kind): torch.zeros(1, dtype=kind) for kind in types})
    header = json.loads(data[LENGTH : LENGTH + int.from_bytes(data[:LENGTH], "little")])
    order = sorted(types, key=lambda kind: header[str(kind)]["data_offsets"])
    return {kind: _Type(header[str(kind)]["dtype"], place) for place, kind in enumerate(order)}


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
    """Return the number of samples that a reply states. Raises BadMessage if it is missing or out of range."""
    samples = reply.meta.get("samples")
    if isinstance(samples, bool) or not isinstance(samples, int) or not 1 <= samples <= MOST_SAMPLES:
        raise BadMessage(f"'samples' must be a whole number from 1 to {MOST_SAMPLES}, not {shown(repr(samples))}")
    return samples


def check_state(reply: Message, expected: Mapping[str, Tensor]) -> None:
    """Raise BadMessage unless a reply holds state of the expected form, and `samples`."""
    check_tensors(reply.tensors, expected)
    check_variances(reply.tensors)
    check_samples(reply)


def check_variances(state: Mapping[str, Tensor]) -> None:
    """Raise BadMessage if a running variance of batch norm is negative, so that its root would be NaN."""
    named = [name for name in state if name.endswith(VARIANCE)]
    if named and bool(torch.cat([state[name].flatten() for name in named]).amin() < LEAST_VARIANCE):
        name = next(name for name in named if bool((state[name] < LEAST_VARIANCE).any()))
        raise BadMessage(f"tensor '{name}' holds a negative variance")
