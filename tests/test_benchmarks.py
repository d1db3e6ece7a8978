"""The benchmarks run: what they time is where they look for it."""

from __future__ import annotations

import torch

from benchmarks import fused, gpu, rounds, step
from fedkdx_plugin.engine.backends.stacked.step import EAGER

TINY = rounds.Sizes(3, 40, 4, (12, 9, 12))


def test_every_part_of_a_round_is_timed(monkeypatch):
    monkeypatch.setitem(rounds.SIZES, "tiny", TINY)
    spent = rounds.split("FedKDX", "tiny", "cpu", repeats=1)
    assert list(spent) == ["training", "compression", "evaluation", "transport"]
    assert all(seconds > 0 for seconds in spent.values())


def test_textbook_and_backends_are_compared(monkeypatch):
    monkeypatch.setitem(rounds.SIZES, "tiny", TINY)
    rows = rounds.compare("FedKDX", "tiny", "cpu", repeats=1)
    assert [row["what"] for row in rows][:2] == ["textbook", "sequential"]
    assert all(row["s/round"] > 0 for row in rows)
    assert rounds.table(rows).count("\n") == len(rows) + 1


def test_steps_with_and_without_the_compiled_operations_take_turns():
    (plain, ours) = fused.step_times("FedAvg", TINY, repeats=1)
    assert plain > 0 and ours > 0


def test_a_step_is_taken_apart():
    """Two convolutions and three linear layers: the first of each network needs no gradient by its input."""
    found = step.measure("FedAvg", TINY, repeats=1)
    assert found.pop("losses ms") == 0 < step.measure("FedKDX", TINY, repeats=1)["losses ms"]
    weights = [(3 * 9, 32, 32), (32 * 9, 64, 8), (256, 256, 1), (256, 128, 1), (128, 4, 1)]  # inputs, outputs, places
    flops = [2 * 10 * inputs * outputs * places for inputs, outputs, places in weights]
    assert round(found["GFLOP"] * 1e9) == 3 * sum(flops) - flops[0]
    assert min(found.values()) > 0


def test_memory_is_of_the_processes_themselves():
    held = torch.ones(500_000_000)  # 2 GB, which are not those of the processes that are measured
    rows = list(rounds.growth("cpu", 5, (4,)))
    assert [row["algorithm"] for row in rows] == ["FedAvg", "FedKDX"] and len(held)
    assert all(0.1 < row["GB"] < 1.8 for row in rows)  # PyTorch alone takes 0.4 to 1


def test_what_is_measured_on_a_gpu_runs(monkeypatch, tmp_path, capsys):
    """As far as a CPU goes; without a GPU the command says so."""
    monkeypatch.setitem(rounds.SIZES, "tiny", TINY)
    row = gpu.a_round("FedKDX", "tiny", "tf32", EAGER, "cpu")
    assert row["taken"] == EAGER and row["s/round"] > 0
    assert gpu.the_textbook("FedKDX", "tiny", "cpu")["s/round"] > 0
    assert len(dict(gpu.jobs())) == len(gpu.jobs()) > 10
    assert {key[:2] for key in gpu.GOALS} <= {("FedKDX", "SLEEP"), ("FedAvg", "SLEEP"), ("FedKDX", "PAMAP2")}
    if not torch.cuda.is_available():
        monkeypatch.setattr("sys.argv", ["gpu", "--out", str(tmp_path / "out")])
        gpu.main()
        assert capsys.readouterr().out == "no CUDA device here: nothing is measured\n"
