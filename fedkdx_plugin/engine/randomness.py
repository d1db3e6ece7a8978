"""Random numbers that depend on (seed, purpose, round, client, ...), never on the order of calls."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive(seed: int, *purpose: int | str) -> int:
    """Derive a 63-bit seed for one purpose, independent of those for all others."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, *purpose: int | str) -> torch.Generator:
    """Return a generator on the CPU, so that the numbers are the same for every device."""
    return torch.Generator().manual_seed(derive(seed, *purpose))


def uniform(seed: int, *purpose: int | str) -> float:
    """Draw one number in [0, 1)."""
    return float(np.random.default_rng(derive(seed, *purpose)).random())


@contextmanager
def seeded(seed: int, *purpose: int | str) -> Iterator[None]:
    """Run a block under its own seed (initial weights, dropout), and restore the global generators afterwards."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(derive(seed, *purpose))
        yield


def count_selected(clients: int, join_ratio: float) -> int:
    """Return ⌊join_ratio · clients⌋, at least 1."""
    return max(1, int(join_ratio * clients + 1e-9))  # 0.29 * 100 is 28.999...


def draw_clients(seed: int, round: int, clients: int, probability: float) -> list[int]:
    """Draw each client of a round by itself with a probability, ascending; there may be none."""
    return [client for client in range(clients) if uniform(seed, "poisson", round, client) < probability]


def sample_clients(seed: int, round: int, clients: int, join_ratio: float) -> list[int]:
    """Draw `count_selected` clients of a round (all, if there are fewer), ascending; the same for every algorithm."""
    count = min(clients, count_selected(clients, join_ratio))
    rng = np.random.default_rng(derive(seed, "clients", round))
    return sorted(int(client) for client in rng.choice(clients, size=count, replace=False))
