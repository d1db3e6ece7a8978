"""What is said of the time left is what the rounds ahead will take, each algorithm at its own pace."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedkdx_plugin.tracking import progress as module
from fedkdx_plugin.tracking.callbacks import RunInfo
from fedkdx_plugin.tracking.progress import Progress


def info(name: str, rounds: int, done: int = 0) -> RunInfo:
    return RunInfo(name, name, Path(name), {"global_rounds": rounds}, done)


def test_each_algorithm_goes_at_its_own_pace():
    """10 rounds of 1 s and 10 of 9 s: after the fast ones, 90 s are left, not 10."""
    with Progress({"fast": 10, "slow": 10}) as progress:
        assert math.isnan(progress.left())
        for _ in range(10):
            progress.step("fast", 1.0, "", False)
        assert progress.left() == pytest.approx(10.0)  # of the slow one nothing is known yet
        progress.step("slow", 9.0, "", False)
        assert progress.left() == pytest.approx(9 * 9.0)


def test_rounds_done_before_need_no_time():
    with Progress({"a": 20, "b": 20}) as progress:
        progress.on_run_start(info("a", 20, done=15))
        progress.step("a", 2.0, "", False)
        progress.skip("b", 18)
        assert progress.left() == pytest.approx(4 * 2.0 + 2 * 2.0)


def test_runs_side_by_side_share_the_time():
    with Progress({"a": 11, "b": 11}, at_once=2) as progress:
        progress.step("a", 1.0, "", False)
        progress.step("b", 3.0, "", False)
        assert progress.left() == pytest.approx((10 * 1.0 + 10 * 3.0) / 2)


def test_a_run_is_timed_by_its_own_rounds(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with Progress({"a": 3, "b": 3}, at_once=2) as progress:
        one, other = info("a", 3), info("b", 3)
        for run in (one, other):
            progress.on_run_start(run)
        record = SimpleNamespace(metrics={}, rejected={}, round=1, train_loss=0.5, server={})
        for run, seconds in ((one, 4.0), (other, 1.0), (one, 4.0)):  # b's first round took 5 s, as a's took 4
            now[0] += seconds
            progress.on_round_end(run, record)
        assert progress.seconds == {"a": 9.0, "b": 5.0}
    assert "a round 1/3 loss 0.500" in capsys.readouterr().err
