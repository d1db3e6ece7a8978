"""Check that every backend gives what the sequential one gives, or says why it cannot run an algorithm."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fedkdx_plugin.engine.rounds import Federation
from fedkdx_plugin.testing.case import AlgorithmCase, difference, figures, run
from fedkdx_plugin.testing.made import TinierNet, TinyNet, make_data
from fedkdx_plugin.testing.running import Checks, float64, require
from registry.errors import UserError
from registry.interface import Task

CHECKS = Checks()
SIZES = (40, 7, 65, 20, 33)  # whole batches of 16, less than one, and one window left over (65 = 4 · 16 + 1)
TOLERANCE = 1e-9  # in float64


@CHECKS
def check_parallel(case: AlgorithmCase) -> None:
    """Require the bits of the sequential backend from worker processes, where this machine can have them."""
    one = case.federation(make_data(SIZES), rounds=2, join_ratio=0.8)
    records = run(one)
    torch.set_num_threads(2)  # as many workers
    other = _made(lambda: case.federation(make_data(SIZES), rounds=2, join_ratio=0.8, backend="parallel"))
    if other is None:
        return
    found = run(other)
    wrong = difference(one.save(), other.save())
    require(
        not wrong,
        f"trained in processes of their own, clients come out differently ({wrong}): keep what a client remembers in "
        "`memory`, and let it know of others by messages alone",
    )
    for a, b in zip(records, found, strict=True):
        # evaluation takes place in this process, on two threads, and may round differently
        same = (a.train_loss, a.bytes_up, a.bytes_down) == (b.train_loss, b.bytes_up, b.bytes_down)
        require(same, f"round {a.round}: trained in processes of their own, clients send or lose otherwise")


@CHECKS
def check_stacked(case: AlgorithmCase) -> None:
    """Require the results of the sequential backend, to 1e-9, from clients that are trained together.

    An algorithm that cannot be stacked is refused in one line that says why.
    """
    require_stacked_alike(case, case.task(TinyNet, TinierNet))


def require_stacked_alike(case: AlgorithmCase, task: Task) -> None:
    """Require of an algorithm, on a task, what `check_stacked` says."""
    with float64():
        data = make_data(SIZES, shape=task.shape)
        one = case.federation(data, task, rounds=2, join_ratio=0.8)
        records = run(one)
        other = _made(lambda: case.federation(data, task, rounds=2, join_ratio=0.8, backend="stacked"))
        if other is None:
            return
        try:
            found = run(other)
        except UserError as error:  # how the backend refuses what it has tried
            require(str(error).strip() and "\n" not in str(error), "the stacked backend must say why in one line")
            return
    for a, b in zip(records, found, strict=True):
        require(figures(a)[-2:] == figures(b)[-2:], f"round {a.round}: stacked, others are selected or dropped")
    expected, state = one.save().tensors, other.save().tensors
    require(expected.keys() == state.keys(), "stacked, server or clients keep tensors of other names")
    for name, tensor in expected.items():
        require(
            torch.allclose(state[name], tensor, rtol=TOLERANCE, atol=TOLERANCE),
            f"stacked, '{name}' comes out differently: let `losses` use `nets`, `batch` and `context` alone, take "
            "means by `batch.mean`, and let `before_replies` change nothing but time",
        )


def _made(make: Callable[[], Federation]) -> Federation | None:
    """Make a federation; None where the backend refuses, which it must do in one line."""
    try:
        return make()
    except UserError as error:
        require(str(error).strip() and "\n" not in str(error), "a backend that refuses must say why in one line")
        return None
