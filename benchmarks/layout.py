"""Channels last against contiguous: milliseconds of one training step on the CPU, medians of paired runs.

python benchmarks/layout.py [--threads 2]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch.nn import functional as F

from fedkdx_plugin.models.cnn import CNN
from fedkdx_plugin.models.cnn_lstm import CNNLSTM

SHAPES = {"UCI-HAR": (9, 1, 128), "SLEEP": (3, 1, 100), "PAMAP2": (36, 1, 256)}
FORMATS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
BATCH, STEPS, REPEATS = 32, 10, 15


def stepper(cls: type, shape: tuple[int, int, int], layout: torch.memory_format):
    """Return a function that takes one training step."""
    torch.manual_seed(0)
    model = cls(shape, 6).to(memory_format=layout)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = torch.randn(BATCH, *shape).to(memory_format=layout), torch.randint(6, (BATCH,))

    def step() -> None:
        optimiser.zero_grad()
        F.cross_entropy(model(x).logits, y).backward()
        optimiser.step()

    return step


def milliseconds(step) -> float:
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    return 1000 * (time.perf_counter() - start) / STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    print(f"{'model':10}{'shape of':10}{'contiguous':>12}{'channels last':>15}{'ratio':>7}")
    for cls in (CNN, CNNLSTM):
        for name, shape in SHAPES.items():
            steps = {label: stepper(cls, shape, layout) for label, layout in FORMATS.items()}
            for step in steps.values():
                milliseconds(step)  # warm up
            pairs = [[milliseconds(step) for step in steps.values()] for _ in range(REPEATS)]
            plain, last = (statistics.median(column) for column in zip(*pairs, strict=True))
            ratio = statistics.median(one / other for one, other in pairs)
            print(f"{cls.__name__:10}{name:10}{plain:12.2f}{last:15.2f}{ratio:7.2f}")


if __name__ == "__main__":
    main()
