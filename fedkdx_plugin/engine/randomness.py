"""All randomness comes from (seed, purpose, round, client, ...), never from the order of calls."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive(seed: int, *purpose: int | str) -> int:
    """A 63-bit seed for one purpose, independent of those for all others."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, *purpose: int | str) -> torch.Generator:
    """A generator on the CPU, so that every device draws the same."""
    return torch.Generator().manual_seed(derive(seed, *purpose))


def uniform(seed: int, *purpose: int | str) -> float:
    """One number in [0, 1)."""
    return float(np.random.default_rng(derive(seed, *purpose)).random())


@contextmanager
def seeded(seed: int, *purpose: int | str) -> Iterator[None]:
    """Run a block under a seed of its own (initial weights, dropout) and leave the global generators as they were."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(derive(seed, *purpose))
        yield


def count_selected(clients: int, ratio: float) -> int:
    """⌊ratio · clients⌋, at least 1."""
    return max(1, int(ratio * clients + 1e-9))  # 0.29 * 100 is 28.999...


def sample_clients(seed: int, round: int, clients: int, ratio: float) -> list[int]:
    """`count_selected` clients of a round, fewer where there are fewer, ascending; the same for every algorithm."""
    count = min(clients, count_selected(clients, ratio))
    rng = np.random.default_rng(derive(seed, "clients", round))
    return sorted(int(client) for client in rng.choice(clients, size=count, replace=False))
