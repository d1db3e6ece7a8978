"""Milliseconds of a training step on one CPU thread, and what they go into.

    python -m benchmarks.step [--repeats 9]

Forward, backward, losses and SGD are the time inside the compiled operations; the rest is being asked for: Python,
autograd, and the few operations that are PyTorch's. GFLOP are those of convolutions and linear layers as they are
defined, whatever the way they are computed in.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import reduce
from operator import add
from typing import Any
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.rounds import ROUNDS, SIZES, Sizes, federation, table
from fedkdx_plugin.engine.backends.parallel import keep_freed_memory
from fedkdx_plugin.engine.steps import mover
from fedkdx_plugin.engine.training import batches
from fedkdx_plugin.native import library
from registry.interface import Batch, Round

PARTS = {
    "forward": ("chain_forward",),
    "backward": ("chain_backward",),
    "losses": ("mutual_losses", "contrastive_loss"),
    "SGD": ("clip_and_move",),
}


class Clocked:
    """The compiled operations, with the seconds that each has taken."""

    def __init__(self) -> None:
        self._operations = library.operations()
        self.seconds: dict[str, float] = defaultdict(float)

    def __getattr__(self, name: str) -> Callable:
        operation = getattr(self._operations, name)

        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            result = operation(*args)
            self.seconds[name] += time.perf_counter() - start
            return result

        return timed


def stepper(algorithm: str, sizes: Sizes) -> Callable[[], None]:
    """Return a function that takes one training step of client 0, on its first batch of the first round."""
    run, first = federation(algorithm, sizes, "cpu", "sequential"), Round(1, ROUNDS)
    client = run.backend.begin(0, run.server.message(0, first), first)
    x, y, _ = client.data
    index = next(batches(len(y), first, 0, run.settings, x.device))
    context = client.context()
    move = mover([list(net.parameters()) for net in client.nets.values()], client.learning_rate, 10.0)
    for net in client.nets.values():
        net.train()

    def step() -> None:
        reduce(add, client.losses(client.nets, Batch(x[index], y[index]), context).values()).backward()
        move()

    return step


def measure(algorithm: str, sizes: Sizes, repeats: int) -> dict[str, float]:
    """Measure a step: medians over many steps."""
    clocked = Clocked()
    whole: list[float] = []
    parts: dict[str, list[float]] = {part: [] for part in PARTS}
    with mock.patch.object(library, "operations", lambda: clocked):
        step = stepper(algorithm, sizes)
        for repeat in range(40 * repeats):
            clocked.seconds.clear()
            start = time.perf_counter()
            step()
            took = time.perf_counter() - start
            if repeat >= 20 * repeats:  # the first ones warm up
                whole.append(1000 * took)
                for part, names in PARTS.items():
                    parts[part].append(1000 * sum(clocked.seconds[name] for name in names))
    with library.left_out():
        step = stepper(algorithm, sizes)
        with FlopCounterMode(display=False) as counter:  # it sees PyTorch's operations alone
            step()
    medians = {f"{part} ms": statistics.median(values) for part, values in parts.items()}
    all_ms = statistics.median(whole)
    gigaflop = counter.get_total_flops() / 1e9
    networks = medians["forward ms"] + medians["backward ms"]
    return {
        "step ms": all_ms,
        **medians,
        "asked for ms": all_ms - sum(medians.values()),
        "GFLOP": gigaflop,
        "GFLOP/s of forward and backward": 1000 * gigaflop / networks,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    if library.operations() is None:
        print("no C compiler here: nothing is measured")
        return
    torch.set_num_threads(1)
    keep_freed_memory()
    rows = []
    for data in ("SLEEP", "UCI-HAR"):
        for algorithm in ("FedAvg", "FedKDX"):
            rows.append({"data": data, "algorithm": algorithm} | measure(algorithm, SIZES[data], options.repeats))
    print(table(rows))


if __name__ == "__main__":
    main()
