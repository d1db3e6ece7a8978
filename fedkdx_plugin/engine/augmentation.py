"""Augmentation of training windows: Um et al. 2017, arXiv:1706.00527, on the device, the same on every backend.

Random numbers come from a counter, not from a generator with a state: number d of row r of batch b is a hash of the key
of (seed, purpose, round, client) and of (b, r, d). So they are drawn for many clients at once, also within a CUDA
graph, and depend neither on the order of calls nor on the device.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedkdx_plugin.engine.randomness import derive
from registry.errors import UserError

JITTER, SCALE, ROTATE, PERMUTE = "jitter", "scale", "rotate", "permute"
NAMES = (JITTER, SCALE, ROTATE, PERMUTE)  # in the order in which they are applied
SIGMA = 0.05  # standard deviation of the noise, in units of the windows as they are trained on
SPREAD = 0.1  # standard deviation of a channel's factor around 1
SEGMENTS = 4  # of a window, put into another order; their lengths differ by one sample at most
AXES = (("x", "y", "z"), ("X", "Y", "Z"))

# splitmix64: Steele, Lea and Flood 2014, doi:10.1145/2660193.2660195; constants as signed 64-bit numbers
GOLDEN, FIRST, SECOND = (c - 2**64 for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
BITS = 23  # of a uniform number, so that (k + 1/2) / 2^23 is exact in float32 and lies within (0, 1)


@dataclass(frozen=True)
class Augment:
    """Choice of the augmentations that windows get, and of the channels that are the axes of one sensor.

    Attributes:
        names: some of `NAMES`; none by default.
        triples: positions of the channels x, y and z of each sensor.
    """

    names: tuple[str, ...] = ()
    triples: tuple[tuple[int, int, int], ...] = ()

    @staticmethod
    def of(names: Sequence[str], channels: Sequence[str]) -> Augment:
        """Return augmentations by name for channels of these names. Raises UserError: there is nothing to rotate."""
        chosen = tuple(name for name in NAMES if name in names)
        found = triples(channels) if ROTATE in chosen else ()
        if ROTATE in chosen and not found:
            raise UserError(
                "--augment rotate: no three channels have names that differ in a final x, y, z alone "
                f"({', '.join(channels)}); leave rotate out"
            )
        return Augment(chosen, found)

    def keys(self, seed: int, round: int, client: int) -> list[int]:
        """Return the key of each augmentation for a client in a round."""
        return [derive(seed, f"augment {name}", round, client) for name in self.names]


def triples(channels: Sequence[str]) -> tuple[tuple[int, int, int], ...]:
    """Return the positions of each three channels whose names differ in a final x, y, z (or X, Y, Z) alone."""
    place = {name: position for position, name in enumerate(channels)}
    found = []
    for name in channels:
        for x, y, z in AXES:
            stem = name.removesuffix(x)
            if stem != name and stem + y in place and stem + z in place:
                found.append((place[name], place[stem + y], place[stem + z]))
    return tuple(found)


class Augmenter:
    """Augmentations for batches of one shape; all tensors that they need are on the device beforehand.

    Args:
        augment: which.
        like: windows, (..., channels, 1, time), on their device.
        batch_size: largest number of rows of a batch.
    """

    def __init__(self, augment: Augment, like: Tensor, batch_size: int) -> None:
        self.augment, self._batch_size = augment, batch_size
        self._axes = torch.tensor(augment.triples, dtype=torch.int64).to(like.device)
        self._orders = _orders(like.shape[-1]).to(like.device)

    def __call__(self, x: Tensor, keys: Tensor, batch: int | Tensor) -> Tensor:
        """Return augmented windows, in the memory format of `x`.

        Args:
            x: windows of one client, (n, channels, 1, time), or of several, (clients, n, channels, 1, time).
            keys: `Augment.keys`, (names,) or (clients, names), int64.
            batch: number of the batch in the round, from 0.
        """
        rows = batch * self._batch_size + torch.arange(x.shape[-4], device=x.device)
        new = x
        for name, key in zip(self.augment.names, keys.unbind(-1), strict=True):
            if name == JITTER:
                new = new + SIGMA * normal(key, rows, math.prod(x.shape[-3:]), x.dtype).view(x.shape)
            elif name == SCALE:
                new = new * (1 + SPREAD * normal(key, rows, x.shape[-3], x.dtype))[..., None, None]
            elif name == ROTATE:
                new = self._rotated(new, key, rows)
            else:
                chosen = top_bits(key, rows, 1).squeeze(-1) * len(self._orders) >> BITS
                new = new.gather(-1, self._orders[chosen][..., None, None, :].expand(x.shape))
        return torch.empty_like(x).copy_(new)

    def _rotated(self, x: Tensor, key: Tensor, rows: Tensor) -> Tensor:
        """Turn each sensor's axes by a rotation of its own, drawn uniformly: that of a normal quaternion."""
        sensors = len(self._axes)
        matrices = rotations(normal(key, rows, 4 * sensors, x.dtype).unflatten(-1, (sensors, 4)))
        own = x.index_select(-3, self._axes.flatten()).squeeze(-2).unflatten(-2, (sensors, 3))
        turned = (matrices.unsqueeze(-1) * own.unsqueeze(-3)).sum(-2)  # no product of matrices: TF32 would round it
        return x.index_copy(x.dim() - 3, self._axes.flatten(), turned.flatten(-3, -2).unsqueeze(-2))


def hashed(key: Tensor, counter: Tensor) -> Tensor:
    """Return number `counter` of the stream of splitmix64 with seed `key`: 64 bits, as int64."""
    z: Tensor = key + (counter + 1) * GOLDEN
    z = (z ^ _right(z, 30)) * FIRST
    z = (z ^ _right(z, 27)) * SECOND
    return z ^ _right(z, 31)


def _right(bits: Tensor, by: int) -> Tensor:
    """Return the bits moved to the right, zeros before them, whatever the sign."""
    return bits >> by & (1 << 64 - by) - 1


def _numbers(key: Tensor, rows: Tensor, count: int) -> Tensor:
    """Return `count` numbers of 64 bits for each row: (..., n, count) for keys (...,) and rows (n,)."""
    counter = rows.unsqueeze(1) * count + torch.arange(count, device=rows.device)
    return hashed(key[..., None, None], counter)


def top_bits(key: Tensor, rows: Tensor, count: int) -> Tensor:
    """Return `count` whole numbers in [0, 2^23) for each row, (..., n, count)."""
    return _right(_numbers(key, rows, count), 64 - BITS)


def normal(key: Tensor, rows: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Return `count` standard normal numbers for each row, (..., n, count), by Box and Muller from 46 bits each."""
    bits = _numbers(key, rows, count)
    first, second = _right(bits, 64 - BITS), _right(bits, 64 - 2 * BITS) & (1 << BITS) - 1
    u, v = ((part.to(dtype) + 0.5) / 2**BITS for part in (first, second))
    numbers: Tensor = (-2 * u.log()).sqrt() * (2 * torch.pi * v).cos()
    return numbers


def rotations(quaternions: Tensor) -> Tensor:
    """Return the rotation matrices (..., 3, 3) of quaternions (w, x, y, z) of any length but 0, (..., 4)."""
    w, x, y, z = (quaternions / torch.linalg.vector_norm(quaternions, dim=-1, keepdim=True)).unbind(-1)
    entries = [
        *(1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        *(2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        *(2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    ]
    return torch.stack(entries, -1).view(*w.shape, 3, 3)


def _orders(time: int) -> Tensor:
    """Return the samples of a window in every order of its segments, (24, time)."""
    segments = torch.arange(time).tensor_split(SEGMENTS)
    return torch.stack([torch.cat(order) for order in itertools.permutations(segments)])
