"""Milliseconds of a training step on one CPU thread, and of its products: within the step, and by themselves.

    python -m benchmarks.step [--repeats 9]

Products are convolutions and matrix products, forward and backward, PyTorch's or compiled. By themselves, repeated
with their operands in the cache, they are what no arrangement of a step around them can go below.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.rounds import ROUNDS, SIZES, Sizes, federation, table
from fedkdx_plugin.engine.parallel import keep_freed_memory
from fedkdx_plugin.engine.training import batches, mover
from fedkdx_plugin.fused import layers
from fedkdx_plugin.fused.native import left_out
from registry.interface import Batch, Round

aten = torch.ops.aten
PRODUCTS = {aten.convolution.default, aten.convolution_backward.default, aten.mm.default, aten.addmm.default}
COMPILED = ("_convolve", "_convolve_backward")


class Products(TorchDispatchMode):
    """Notes every product, and the seconds it took."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], Any]] = []
        self.seconds = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.noted(func)(*args, **(kwargs or {})) if func in PRODUCTS else func(*args, **(kwargs or {}))

    def noted(self, func: Callable) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(lambda: func(*args, **kwargs))
            start = time.perf_counter()
            out = func(*args, **kwargs)
            self.seconds += time.perf_counter() - start
            return out

        return timed


@contextmanager
def products() -> Iterator[Products]:
    """Notes those within, compiled ones as well."""
    noting = Products()
    compiled = {name: noting.noted(getattr(layers, name)) for name in COMPILED}
    with mock.patch.multiple(layers, **compiled), noting:
        yield noting


def milliseconds(work: Callable[[], object], repeats: int) -> float:
    """The median; the first run warms up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def stepper(algorithm: str, sizes: Sizes) -> Callable[[], None]:
    """What takes one training step of client 0, on its first batch of the first round."""
    run, first = federation(algorithm, sizes, "cpu", "sequential"), Round(1, ROUNDS)
    client = run.backend.begin(0, run.server.message(0, first))
    x, y, _ = client.data
    index = next(batches(len(y), first, 0, run.settings, x.device))
    context = client.context()
    move = mover([list(net.parameters()) for net in client.nets.values()], client.learning_rate, 10.0)
    for net in client.nets.values():
        net.train()

    def step() -> None:
        losses = client.losses(client.nets, Batch(x[index], y[index]), context)
        torch.stack(list(losses.values())).sum().backward()
        move()

    return step


def measure(algorithm: str, sizes: Sizes, repeats: int) -> dict[str, float]:
    """A step's figures."""
    step = stepper(algorithm, sizes)
    whole = milliseconds(step, 20 * repeats)
    inside = []
    for _ in range(repeats + 1):
        with products() as noted:
            step()
        inside.append(1000 * noted.seconds)
    alone = sum(milliseconds(call, 20 * repeats) for call in noted.calls)
    with left_out(), FlopCounterMode(display=False) as counter:  # it sees PyTorch's alone
        step()
    gigaflop = counter.get_total_flops() / 1e9
    return {
        "step ms": whole,
        "products in it ms": statistics.median(inside[1:]),
        "products alone ms": alone,
        "GFLOP": gigaflop,
        "GFLOP/s alone": 1000 * gigaflop / alone,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    rows = []
    for data in ("SLEEP", "UCI-HAR"):
        for algorithm in ("FedAvg", "FedKDX"):
            rows.append({"data": data, "algorithm": algorithm} | measure(algorithm, SIZES[data], options.repeats))
    print(table(rows))


if __name__ == "__main__":
    main()
