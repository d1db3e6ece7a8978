"""Checks of an algorithm, the same for built-in and other ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedkdx_plugin.testing import averaging, backends, parameters, private_mean, replies, runs, secrets, sums, windows
from fedkdx_plugin.testing.case import AlgorithmCase
from fedkdx_plugin.testing.running import Check, run_all
from registry.interface import Server


def algorithm_checks() -> list[Check]:
    """Return the checks of an algorithm, each a function of an `AlgorithmCase`, for pytest to run one by one.

    `@pytest.mark.parametrize("check", algorithm_checks())` gives each a test of its own name.
    """
    groups = (runs, secrets, parameters, averaging, sums, private_mean, windows, backends, replies)
    return [check for group in groups for check in group.CHECKS]


def check_algorithm(
    algorithm: type[Server],
    *,
    params: Mapping[str, Any] | None = None,
    without_effect: Mapping[str, str] | None = None,
    skip: Mapping[str, str] | None = None,
) -> None:
    """Check that an algorithm has the properties that the engine and its users rely on, in small runs on the CPU.

    Args:
        algorithm: the server class.
        params: hyper-parameters of all runs that differ from the defaults.
        without_effect: hyper-parameter -> why no short run can show its effect.
        skip: name of a check -> why it does not apply to this algorithm.

    Raises:
        AssertionError: names the class, and every check that failed with what is wrong and what to do.
        ValueError: a name in `skip` or `without_effect` is unknown, or has no reason.
    """
    case = AlgorithmCase(algorithm, params or {}, without_effect or {})
    run_all(algorithm.__name__, algorithm_checks(), case, skip)
