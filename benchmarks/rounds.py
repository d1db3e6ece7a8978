"""Seconds a round of the suite's backends against the textbook loop, where the time goes, and how it grows.

    python -m benchmarks.rounds [--device cpu] [--repeats 5] [--quick] [--out FOLDER]

Windows are random numbers in the sizes of SLEEP, UCI-HAR and PAMAP2: what they hold does not change the time.
Textbook and backends take turns in one process; figures are medians. Everything includes compression and the
evaluation of all clients. What is measured is written as it comes, so that an interrupted run leaves what it has.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import textbook
from fedkdx_plugin.algorithm import additions, student, updates
from fedkdx_plugin.algorithm.downlink import broadcast, differences
from fedkdx_plugin.engine.backends import selection
from fedkdx_plugin.engine.data import DeviceData, memory_format
from fedkdx_plugin.engine.randomness import sample_clients
from fedkdx_plugin.engine.rounds import Federation
from fedkdx_plugin.engine.schedule import Schedule
from fedkdx_plugin.engine.training import Settings
from fedkdx_plugin.models.cnn import CNN
from registry import catalog
from registry.errors import UserError
from registry.interface import Round, Task

ROUNDS = 500  # of the schedule that ε follows; a benchmark runs the first few
WHOLE_SECONDS = 120  # for a whole run on a GPU, which is cut short there
GROWTH = (10, 30, 100, 300, 1000)
# functions that compress or decompress, by the modules that call them
CODEC = {
    updates: ("compress_together",),
    student: ("decompress",),
    broadcast: ("move",),
    differences: ("compress_together", "move"),
    additions: ("compress_together", "residual_of"),
}


class Sizes(NamedTuple):
    """A data set's sizes: channels, samples, classes, and each client's windows, of which 80 % are for training."""

    channels: int
    samples: int
    classes: int
    windows: tuple[int, ...]


SIZES = {
    "SLEEP": Sizes(3, 100, 12, (588,) * 15),
    "UCI-HAR": Sizes(9, 128, 6, (343,) * 30),
    "PAMAP2": Sizes(36, 256, 12, (1932, 2031, 1348, 1788, 2108, 1932, 1798, 2027, 48)),
}


def windows(sizes: Sizes) -> tuple[list[textbook.Windows], list[textbook.Windows]]:
    """Training and test windows of each client, standard normal."""
    rng = torch.Generator().manual_seed(0)

    def some(n: int) -> textbook.Windows:
        x = torch.randn(n, sizes.channels, 1, sizes.samples, generator=rng)
        return textbook.Windows(x, torch.randint(sizes.classes, (n,), generator=rng))

    return [some(n - n // 5) for n in sizes.windows], [some(n // 5) for n in sizes.windows]


def federation(algorithm: str, sizes: Sizes, device: str, backend: str) -> Federation:
    """Return a federation on such data, by the common protocol."""
    train, test = windows(sizes)
    place = torch.device(device)
    counts = torch.tensor([len(part.y) for part in test])
    ends = counts.cumsum(0).tolist()
    data = DeviceData(
        train_x=[part.x.to(place, memory_format=memory_format(place)) for part in train],
        train_y=[part.y.to(place) for part in train],
        test_x=torch.cat([part.x for part in test]).to(place, memory_format=memory_format(place)),
        test_y=torch.cat([part.y for part in test]).to(place),
        test_client=torch.repeat_interleave(torch.arange(len(test)), counts).to(place),
        test_slices=[slice(end - count, end) for count, end in zip(counts.tolist(), ends, strict=True)],
    )
    server = catalog.load("algorithms", algorithm)
    task = Task((sizes.channels, 1, sizes.samples), sizes.classes, CNN, CNN)
    return Federation(server, task, server.Params(), data, Settings(), Schedule(ROUNDS), backend)


def seconds(work: Callable[[], object], device: str) -> float:
    """Wall time, the device's work included."""
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def wait(device: str) -> None:
    """Until a GPU has done all it was asked for."""
    if device != "cpu":
        torch.cuda.synchronize()


def compare(algorithm: str, data: str, device: str, repeats: int) -> list[dict[str, object]]:
    """Time the textbook loop and every backend that runs here, in turns; return a row for each."""
    sizes = SIZES[data]
    runs: dict[str, Federation] = {}
    startup: dict[str, float] = {}
    for backend in (name for name in selection.NAMES if name != "auto"):
        start = time.perf_counter()
        try:
            runs[backend] = federation(algorithm, sizes, device, backend)
        except UserError:
            continue
        startup[backend] = time.perf_counter() - start
    book = getattr(textbook, algorithm)(*windows(sizes), sizes.classes, device)
    clients = len(sizes.windows)
    times: dict[str, list[float]] = {"textbook": [], **{name: [] for name in runs}}
    for index in range(1, repeats + 2):
        selected = sample_clients(0, index, clients, 0.4)
        times["textbook"].append(seconds(lambda: book.round(selected), device))  # noqa: B023 - called at once
        for name, run in runs.items():
            times[name].append(seconds(lambda: run.round(Round(index, ROUNDS)), device))  # noqa: B023
    for run in runs.values():
        run.close()
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}  # the first warms up
    return [
        {
            "data": data,
            "algorithm": algorithm,
            "what": name,
            "s/round": median,
            "times textbook": medians["textbook"] / median,
            "start-up s": startup.get(name, float("nan")),
        }
        for name, median in medians.items()
    ]


@contextmanager
def clocked(owner: object, names: tuple[str, ...], spent: dict[str, float], label: str, device: str) -> Iterator[None]:
    """Add the time inside some functions of a module or object to `spent[label]`; earlier work is waited for first."""
    originals = {name: getattr(owner, name) for name in names}

    def timed(function: Callable) -> Callable:
        def call(*args: object, **kwargs: object) -> object:
            results: list[object] = []
            wait(device)
            took = seconds(lambda: results.append(function(*args, **kwargs)), device)
            spent[label] = spent.get(label, 0.0) + took
            return results[0]

        return call

    for name, function in originals.items():
        setattr(owner, name, timed(function))
    try:
        yield
    finally:
        for name, function in originals.items():
            setattr(owner, name, function)


def split(algorithm: str, data: str, device: str, repeats: int) -> dict[str, float]:
    """Seconds a round by what they went into: of the backend that `auto` takes, on a CPU of the sequential one."""
    backend = "sequential" if device == "cpu" else "auto"  # worker processes would keep their times to themselves
    with closing(federation(algorithm, SIZES[data], device, backend)) as run:
        run.round(Round(1, ROUNDS))
        spent: dict[str, float] = {}
        with ExitStack() as clocks:
            for module, names in CODEC.items():
                clocks.enter_context(clocked(module, names, spent, "compression", device))
            clocks.enter_context(clocked(run.transport, ("send_down", "send_up"), spent, "transport", device))
            clocks.enter_context(clocked(run, ("evaluate",), spent, "evaluation", device))
            total = seconds(lambda: [run.round(Round(index + 2, ROUNDS)) for index in range(repeats)], device)
    spent["training"] = total - sum(spent.values())
    return {label: spent.get(label, 0.0) / repeats for label in ("training", "compression", "evaluation", "transport")}


def whole(algorithm: str, data: str, device: str) -> dict[str, object]:
    """All rounds of a run, as many of them as there is time for."""
    with closing(federation(algorithm, SIZES[data], device, "auto")) as run:
        start, done = time.perf_counter(), 0
        while done < ROUNDS and time.perf_counter() - start < WHOLE_SECONDS:
            done += 1
            run.round(Round(done, ROUNDS))  # ends with figures fetched from the device
        took = time.perf_counter() - start
        return {
            "data": data,
            "algorithm": algorithm,
            "backend": run.backend.name,
            "rounds": done,
            "s": took,
            f"s for {ROUNDS}": took / done * ROUNDS,
        }


def memory() -> float:
    """GB: the most that this process had, and what its workers have to themselves, who keep what they once took.

    From Linux's /proc: `ru_maxrss` would begin with what the process that started this one had.
    """
    own = _kilobytes("self/status", "VmHWM")
    workers = (f"{child.pid}/smaps_rollup" for child in multiprocessing.active_children())
    return sum((_kilobytes(worker, "Private_\\w+") for worker in workers), own) * 1024 / 1e9


def _kilobytes(file: str, name: str) -> int:
    return sum(map(int, re.findall(rf"^{name}:\s+(\d+) kB", Path("/proc", file).read_text(), re.MULTILINE)))


def grow(algorithm: str, clients: int, device: str, each: int, backend: str) -> dict[str, object]:
    """Time a round of many clients of `each` SLEEP windows in a separate process, with its peak of memory."""
    sizes = SIZES["SLEEP"]._replace(windows=(each,) * clients)
    with closing(federation(algorithm, sizes, device, backend)) as run:
        run.round(Round(1, ROUNDS))
        took = seconds(lambda: run.round(Round(2, ROUNDS)), device)
        return {
            "algorithm": algorithm,
            "clients": clients,
            "backend": run.backend.name,
            "s/round": took,
            "ms a client": 1000 * took / clients,
            "GB": torch.cuda.max_memory_allocated() / 1e9 if device != "cpu" else memory(),
        }


def growth(device: str, each: int, counts: tuple[int, ...]) -> Iterator[dict[str, object]]:
    """Rows of `grow`, as they come; on a GPU the sequential backend, too, as long as it does not take minutes."""
    for clients in counts:
        for algorithm in ("FedAvg", "FedKDX"):
            for backend in ("auto",) if device == "cpu" or clients > 100 else ("stacked", "sequential"):
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    yield pool.submit(grow, algorithm, clients, device, each, backend).result()


def table(rows: list[dict[str, object]]) -> str:
    """Markdown."""
    head = list(rows[0])
    lines = [head, ["---"] * len(head)]
    lines += [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(path: Path, compared: list[dict], splits: dict[str, dict[str, float]], growth: list[dict]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.5), layout="constrained")
    bars, parts, grown = figure.subplots(1, 3)
    labels = [f"{row['algorithm']} {row['data']}, {row['what']}" for row in compared]
    bars.barh(labels, [row["s/round"] for row in compared])
    bars.set(xlabel="seconds a round")
    bars.invert_yaxis()
    bars.tick_params(axis="y", labelsize=7)
    for index, (name, share) in enumerate(splits.items()):
        left = 0.0
        for colour, (label, value) in enumerate(share.items()):
            parts.barh(name, value, left=left, color=f"C{colour}", label=label if index == 0 else None)
            left += value
    parts.set(xlabel="seconds a round")
    parts.legend(fontsize=7)
    for label in dict.fromkeys(f"{row['algorithm']}, {row['backend']}" for row in growth):
        same = [row for row in growth if f"{row['algorithm']}, {row['backend']}" == label]
        grown.plot([row["clients"] for row in same], [row["ms a client"] for row in same], "o-", label=label)
    grown.set(xlabel="clients", ylabel="milliseconds a round and client", xscale="log", ylim=(0, None))
    grown.legend(fontsize=7)
    figure.savefig(path, dpi=150)


class Report:
    """Text that is shown and written as it comes."""

    def __init__(self, path: Path) -> None:
        self.path, self.parts = path, []

    def add(self, *parts: str) -> None:
        print(*parts, sep="\n\n", end="\n\n", flush=True)
        self.parts += parts
        self.path.write_text("\n\n".join(self.parts) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="(%(default)s)",
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="SLEEP alone, and growth to 100 clients")
    parser.add_argument("--out", type=Path, default=Path("benchmarks-out"))
    options = parser.parse_args()
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here: nothing is measured")
        return
    options.out.mkdir(parents=True, exist_ok=True)
    report = Report(options.out / "rounds.md")
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    report.add(f"{name}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}")

    algorithms = ("FedAvg", "FedKDX")
    compared = []
    for data in ["SLEEP"] if options.quick else SIZES:
        rows = [row for algorithm in algorithms for row in compare(algorithm, data, device, options.repeats)]
        report.add(table(rows))
        compared += rows
    splits = {f"{algorithm} SLEEP": split(algorithm, "SLEEP", device, options.repeats) for algorithm in algorithms}
    report.add("What a round's seconds go into:", table([{"": name} | share for name, share in splits.items()]))
    if device == "cuda":
        report.add("Whole runs:", table([whole(algorithm, "SLEEP", device) for algorithm in algorithms]))
    # on a CPU small clients, so that a thousand of them take seconds and not minutes
    each = 588 if device == "cuda" else 60
    report.add(f"Growth, clients of {each} windows, join ratio 0.4:")
    grown = []
    for row in growth(device, each, GROWTH[:3] if options.quick else GROWTH):
        grown.append(row)
        print(row, flush=True)
    report.add(table(grown))
    draw(options.out / "rounds.png", compared, splits, grown)


if __name__ == "__main__":
    main()
