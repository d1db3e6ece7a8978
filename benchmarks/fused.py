"""Milliseconds of a training step with PyTorch's operations alone and with the compiled ones, one thread, taking turns.

python -m benchmarks.fused [--repeats 9]
"""

from __future__ import annotations

import argparse
import statistics
import time
from unittest import mock

import torch

from benchmarks.rounds import ROUNDS, SIZES, Sizes, federation, table
from fedkdx_plugin.engine import training
from fedkdx_plugin.engine.backends.parallel import keep_freed_memory
from fedkdx_plugin.native import library
from registry.interface import Round


def step_times(algorithm: str, sizes: Sizes, repeats: int) -> tuple[float, float]:
    """Medians over clients' rounds, in milliseconds a step: PyTorch's operations, compiled ones."""
    works = []
    for found in (None, library.operations()):
        with mock.patch.object(library, "operations", lambda found=found: found):
            run = federation(algorithm, sizes, "cpu", "sequential")
        client = run.backend.begin(0, run.server.message(0, Round(1, ROUNDS)), Round(1, ROUNDS))
        works.append((found, run, client))
    times: list[list[float]] = [[], []]
    for repeat in range(repeats + 1):  # the first warms up
        for own, (found, run, client) in zip(times, works, strict=True):
            with mock.patch.object(library, "operations", lambda found=found: found):
                start = time.perf_counter()
                training.train(client, Round(1, ROUNDS), run.settings)
                took = time.perf_counter() - start
            steps = len(list(training.batches(client.samples, Round(1, ROUNDS), 0, run.settings, torch.device("cpu"))))
            if repeat:
                own.append(1000 * took / steps)
    return statistics.median(times[0]), statistics.median(times[1])


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
            plain, ours = step_times(algorithm, SIZES[data], options.repeats)
            times = {"PyTorch ms": plain, "compiled ms": ours, "times faster": plain / ours}
            rows.append({"data": data, "algorithm": algorithm} | times)
    print(table(rows))


if __name__ == "__main__":
    main()
