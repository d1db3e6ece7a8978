"""Checks and measurements on an NVIDIA GPU, unattended: what matters most first, written as it comes, ended in time.

    python -m benchmarks.gpu [--minutes 6] [--out FOLDER]

First the tests marked `cuda`; then seconds a round of FedKDX and FedAvg against the textbook loop, by each way of
running a training step, with float32 and TF32 products; then a whole run, PAMAP2's sizes, growth. What there was no
time for is named at the end. FOLDER/gpu.md holds all of it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import torch

from benchmarks import rounds, textbook
from fedkdx_plugin.engine.backends.stacked.backend import Stacked
from fedkdx_plugin.engine.backends.stacked.step import COMPILED, EAGER, GRAPH
from fedkdx_plugin.engine.randomness import sample_clients
from registry.interface import Round

REPEATS = 5
TESTS_AT_ONCE = min(8, os.cpu_count() or 1)  # processes that share the GPU
TESTS_SHARE = 0.4  # of the time, at most: the rest is for measuring
GOALS = {  # seconds a round
    ("FedKDX", "SLEEP", "float32"): 0.060,
    ("FedAvg", "SLEEP", "float32"): 0.030,
    ("FedKDX", "SLEEP", "tf32"): 0.045,
    ("FedAvg", "SLEEP", "tf32"): 0.022,
    ("FedKDX", "PAMAP2", "float32"): 0.25,
}
WHOLE_GOAL = 40.0  # seconds of 500 rounds of FedKDX on SLEEP


@contextmanager
def products(precision: str) -> Iterator[None]:
    """Within, products on the GPU are of float32 or TF32 numbers."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def stacked(way: str) -> Callable[..., Stacked]:
    return lambda workspace, data, settings: Stacked(workspace, data, settings, demanded=True, way=way)


def a_round(algorithm: str, data: str, precision: str, way: str, device: str = "cuda") -> dict[str, object]:
    """Median seconds of a round, evaluation and compression included, and of the first, which prepares the others."""
    with products(precision), closing(rounds.federation(algorithm, rounds.SIZES[data], device, stacked(way))) as run:
        order = (Round(index, rounds.ROUNDS) for index in range(1, REPEATS + 2))
        times = [rounds.seconds(partial(run.round, round), device) for round in order]
        median = statistics.median(times[1:])
        return {
            "algorithm": algorithm,
            "data": data,
            "products": precision,
            "step": way,
            "s/round": median,
            "goal": GOALS.get((algorithm, data, precision), float("nan")),
            "first round": times[0],
            "taken": run.backend.way,
        }


def the_textbook(algorithm: str, data: str, device: str = "cuda") -> dict[str, object]:
    """Median seconds of a round of the textbook loop."""
    sizes = rounds.SIZES[data]
    book = getattr(textbook, algorithm)(*rounds.windows(sizes), sizes.classes, device)
    times = []
    for index in range(1, 4):
        selected = sample_clients(0, index, len(sizes.windows), 0.4)
        times.append(rounds.seconds(lambda: book.round(selected), device))  # noqa: B023 - called at once
    return {"algorithm": algorithm, "data": data, "step": "textbook", "s/round": statistics.median(times[1:])}


def profile(algorithm: str, device: str = "cuda") -> dict[str, object]:
    """Kernels of a round, and their time on the device."""
    from torch.profiler import ProfilerActivity, profile

    with closing(rounds.federation(algorithm, rounds.SIZES["SLEEP"], device, "auto")) as run:
        for index in (1, 2):
            run.round(Round(index, rounds.ROUNDS))
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            run.round(Round(3, rounds.ROUNDS))
        kernels = [event for event in seen.events() if event.device_type.name == "CUDA"]
        busy = sum(event.time_range.elapsed_us() for event in kernels) / 1e3
        return {"algorithm": algorithm, "kernels": len(kernels), "ms on the device": busy}


def tests(seconds: float, log: Path) -> str:
    """Run the tests marked `cuda`, all they print into `log`; return the last line and what failed."""
    command = [sys.executable, "-m", "pytest", "-v", "-n", str(TESTS_AT_ONCE), "--maxprocesses", str(TESTS_AT_ONCE)]
    command += ["-m", "cuda and not slow", "tests/fedkdx_plugin/test_cuda.py"]
    with log.open("w") as out:
        try:
            subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, timeout=seconds, check=False)
            ended = ""
        except subprocess.TimeoutExpired:
            ended = f"not ended after {seconds:.0f} s"
    lines = log.read_text(errors="replace").splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR", "E   "))]
    return "\n".join([*failed, ended or lines[-1], f"{sum(' PASSED ' in line for line in lines)} passed by then"])


Job = tuple[str, Callable[[], object]]


def jobs() -> list[Job]:
    """List what is measured, the most important first."""
    planned: list[Job] = []
    for algorithm in ("FedKDX", "FedAvg"):
        planned.append((f"textbook {algorithm} SLEEP", partial(the_textbook, algorithm, "SLEEP")))
        for way in (GRAPH, COMPILED):
            planned.append((f"{algorithm} SLEEP {way}", partial(a_round, algorithm, "SLEEP", "float32", way)))
    planned += [(f"profile of {algorithm}", partial(profile, algorithm)) for algorithm in ("FedKDX", "FedAvg")]
    planned.append(("FedKDX PAMAP2", partial(a_round, "FedKDX", "PAMAP2", "float32", GRAPH)))
    planned.append(("parts of a round", lambda: rounds.split("FedKDX", "SLEEP", "cuda", REPEATS)))
    for clients in (10, 100, 1000):
        planned.append((f"{clients} clients", partial(rounds.grow, "FedKDX", clients, "cuda", 588, "auto")))
    planned.append(("500 rounds of FedKDX on SLEEP", partial(rounds.whole, "FedKDX", "SLEEP", "cuda")))
    for algorithm in ("FedKDX", "FedAvg"):
        planned.append((f"{algorithm} SLEEP TF32", partial(a_round, algorithm, "SLEEP", "tf32", COMPILED)))
    planned.append(("FedKDX SLEEP without graphs", partial(a_round, "FedKDX", "SLEEP", "float32", EAGER)))
    planned.append(("FedKDX PAMAP2 compiled", partial(a_round, "FedKDX", "PAMAP2", "float32", COMPILED)))
    return planned


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=6.0, help="for all of it (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks-out"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing is measured")
        return
    end = time.monotonic() + 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    report = rounds.Report(options.out / "gpu.md")
    report.add(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}")
    report.add("Tests marked cuda:", tests(60 * options.minutes * TESTS_SHARE, options.out / "tests.txt"))
    left = jobs()
    while left and time.monotonic() < end:
        name, job = left.pop(0)
        start = time.monotonic()
        try:
            torch.cuda.reset_peak_memory_stats()
            found = job()
        except Exception as error:  # one that fails must not take the others' time with it
            found = {"failed": f"{type(error).__name__}: {error}"[:2000]}
        told = ", ".join(f"{key}: {v:.4g}" if isinstance(v, float) else f"{key}: {v}" for key, v in found.items())
        report.add(
            f"**{name}** ({time.monotonic() - start:.0f} s, {torch.cuda.max_memory_allocated() / 1e9:.2f} GB): {told}"
        )
    report.add("No time was left for: " + (", ".join(name for name, _ in left) or "nothing"))


if __name__ == "__main__":
    main()
