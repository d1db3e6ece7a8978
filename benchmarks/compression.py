"""Decompositions for the codec: time and error by shape, and the codec on the paper's model.

    python benchmarks/compression.py

Prints the best time of several calls, in milliseconds (others may share the cores), and the relative error of
the truncation to the energy threshold. The matrices' singular values fall as 1/j, as an update's roughly do.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fedkdx_plugin.algorithm import compression
from fedkdx_plugin.models.cnn import CNN

SHAPES = [(256, 1664), (256, 1216), (128, 256), (64, 288), (32, 27)]
BATCH = 12
UCI_HAR = ((9, 1, 128), 6)


def matrix(shape: tuple[int, ...]) -> Tensor:
    """Return a float32 matrix of that shape with singular values 1, 1/2, 1/3, ..."""
    left, _, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    return left / torch.arange(1, left.shape[1] + 1) @ right


def milliseconds(function: Callable[[], object], repeats: int) -> float:
    """Best time of a call; the first call is not counted."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(1000 * (time.perf_counter() - start))
    return min(times)


def by_svd32(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Compress with torch.linalg.svd in single precision, for comparison with the Gram matrix."""
    left, values, right = torch.linalg.svd(matrix.float(), full_matrices=False)
    basis = left if matrix.shape[0] <= matrix.shape[1] else right.T
    return values.double() ** 2, basis.double()


METHODS = {
    "eigh of Gram, float64": compression._by_eigh,
    "torch svd, float32": by_svd32,
    "torch svd, float64": compression._by_svd,
    "scipy gesvd, float64": compression._by_gesvd,
}


def compare_methods(epsilon: float, repeats: int) -> None:
    """One line a shape and method."""
    print(f"{'shape':>12}  {'method':<22} {'ms':>7} {'rank':>5} {'error':>9}  (at most {(1 - epsilon) ** 0.5:.6f})")
    for shape in SHAPES:
        tensors = {"w": matrix(shape)}
        for name, method in METHODS.items():
            compression.METHODS = (method,)
            payload, ranks = compression.compress(tensors, epsilon)
            restored = compression.decompress(payload, {"w": tensors["w"].shape})["w"].double()
            error = torch.linalg.norm(restored - tensors["w"].double()) / torch.linalg.norm(tensors["w"].double())
            spent = milliseconds(partial(method, tensors["w"].double()), repeats)
            print(f"{shape[0]:>7}x{shape[1]:<4}  {name:<22} {spent:7.2f} {ranks['w']:5d} {error.item():9.6f}")
    compression.METHODS = (compression._by_eigh, compression._by_svd, compression._by_gesvd)


def compare_batches(repeats: int) -> None:
    """Matrices of one shape decomposed one by one and stacked."""
    print(f"\n{BATCH} matrices of one shape, eigh of Gram: ms one by one, ms stacked")
    for shape in SHAPES:
        stack = torch.stack([matrix(shape).double() for _ in range(BATCH)])
        single = milliseconds(lambda stack=stack: [compression._by_eigh(one) for one in stack], repeats)
        shorter = stack if shape[0] <= shape[1] else stack.mT
        stacked = milliseconds(lambda s=shorter: torch.linalg.eigh(s @ s.mT), repeats)
        print(f"{shape[0]:>7}x{shape[1]:<4}  {single:8.2f} {stacked:8.2f}")


def whole_model(repeats: int) -> None:
    """Time the codec on an update of the paper's CNN for UCI-HAR."""
    model = CNN(*UCI_HAR)
    update = {name: weight.detach() for name, weight in model.named_parameters()}
    update |= {n: matrix(t.flatten(1).shape).reshape(t.shape) for n, t in update.items() if t.ndim > 1}
    shapes = {name: tensor.shape for name, tensor in update.items()}
    dense = sum(tensor.numel() for tensor in update.values())
    print(f"\nupdate of CNN for UCI-HAR, {dense} values: share sent, ms to compress, ms to decompress")
    for epsilon in (0.9, 0.95, 0.98):
        payload = compression.compress(update, epsilon).payload
        sent = sum(tensor.numel() for tensor in payload.values()) / dense
        there = milliseconds(lambda e=epsilon: compression.compress(update, e), repeats)
        back = milliseconds(lambda p=payload: compression.decompress(p, shapes), repeats)
        print(f"  epsilon {epsilon:<5} {100 * sent:6.1f} % {there:8.2f} {back:8.2f}")


def main() -> None:
    """Print all three tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epsilon", type=float, default=0.98)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    compare_methods(options.epsilon, options.repeats)
    compare_batches(max(options.repeats // 2, 1))
    whole_model(options.repeats)


if __name__ == "__main__":
    main()
